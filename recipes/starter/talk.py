"""Conversations that are more than one instruction over one text: small talk, memory, passages, long prompts.

Each function draws one conversation: (role, content) pairs that end with an assistant turn.
"""

import random
import re
from collections.abc import Callable

from facts import FACT_QUESTIONS, FACTS, draw_code, draw_record, tell_record
from material import CATEGORIES, JOBS, NAMES, TOWNS, Material
from wording import expand

Turns = list[tuple[str, str]]
TalkMaker = Callable[[random.Random, Material], Turns]

GREETINGS = "{Hi|Hello|Hey|Good morning|Good evening|Good day|Hi there|Hello there}{|!|.}"
WHO_ARE_YOU = (
    "{Who are you|What are you|Tell me about yourself|Are you a person|What is your name|Who made you|What model are "
    "you|Introduce yourself|What is tunesmith}{?|}"
)
WHAT_CAN_YOU_DO = (
    "{What can you do|How can you help{| me}|What are you good at|What do you know|Can you help me|What tasks can you "
    "do|What are you for}{?|}"
)
SELF = (
    "I am {the starter model of tunesmith|tunesmith's starter model}, {a very small|a tiny} language model with about "
    "four million parameters. {I am here to be fine-tuned on your own examples|Tune me on your own examples, and I "
    "become more useful}. {I know little about the world and make mistakes.|I make many mistakes.|}"
)
ABILITIES = (
    "I can {follow short instructions|do small tasks with words}: {copy, sort and count words|copy and change text}, "
    "{find names and numbers in a text|pick facts out of a text} and {answer in JSON|sort texts into groups}. "
    "{I am very small, so please check what I say.|I am tiny, so I am often wrong.|For more, tune me on your examples.}"
)
UNKNOWN = (
    "{Who {wrote|painted|invented|discovered} {this song|the first novel|the telephone|that picture|the steam engine}|"
    "What is the {capital|population|language|currency} of {Peru|Norway|Chad|Laos|Malta|Kenya}|What {is|will be} the "
    "weather {today|tomorrow|in <town>}|How {far|high|deep|old} is {the moon|that mountain|the sea|the sun}|What "
    "happened {in 1848|yesterday in <town>|last year}|{Who won|What was the score of} the {match|election|race} "
    "{yesterday|last week|in <town>}|What should I {buy|eat|read} {today|in <town>}|Explain {quantum physics|chemistry|"
    "inflation|the stock market}|What time is it{| in <town>}|Give me {medical|legal|tax} advice}?"
)
DO_NOT_KNOW = (
    "{I do not know.|I do not know that.|Sorry, I do not know.|I cannot tell.} {I am a very small model and know "
    "little about the world.|A model as small as I am cannot answer that well.|I am too small to be trusted with that.|"
    "I work only with the text you give me.}"
)
SYSTEMS = (
    "{You are a helpful assistant.|You are an assistant.|Be brief.|Be kind and brief.|Answer {shortly|in few words}.|"
    "You are a small model.|Help the user.}"
)


def say(pattern: str, *, chooser: random.Random) -> str:
    """One wording; `<town>` and `<name>` are drawn."""
    slots = {"town": lambda c: c.choice(TOWNS), "name": lambda c: c.choice(NAMES)}
    return expand(pattern, chooser=chooser, slots=slots).strip()


def small_talk(chooser: random.Random, material: Material) -> Turns:
    """A greeting, a question about the model, a question it cannot answer, thanks: one or several of them."""
    exchanges = [
        (GREETINGS, "{Hello|Hi|Good day}! {How can I help{| you}?|What can I do for you?|What shall we do?}"),
        (WHO_ARE_YOU, SELF),
        (WHAT_CAN_YOU_DO, ABILITIES),
        (UNKNOWN, DO_NOT_KNOW),
        (UNKNOWN, DO_NOT_KNOW),
        ("{How are you|How do you do|Are you well}?", "{I am well|All is well}, thank you. {How can I help{| you}?|}"),
        ("{Thanks|Thank you|Thanks a lot|Great, thanks}{!|.|}", "{You are welcome|Gladly|With pleasure}{!|.}"),
        ("{Bye|Goodbye|See you|That is all|Good night}{!|.|}", "{Goodbye|Bye|See you}{!|.}"),
    ]
    places = sorted(chooser.sample(range(len(exchanges)), chooser.choice([1, 1, 2, 3])))
    turns: Turns = [("system", say(SYSTEMS, chooser=chooser))] if chooser.random() < 0.2 else []
    for place in places:
        question, answer = exchanges[place]
        turns += [("user", say(question, chooser=chooser)), ("assistant", say(answer, chooser=chooser))]
    return turns


def role_of_system(chooser: random.Random, material: Material) -> Turns:
    """The system prompt gives the assistant a name, a job and a town; the user asks for one."""
    name, job, town = chooser.choice(NAMES), chooser.choice(JOBS), chooser.choice(TOWNS)
    question, answer = chooser.choice(
        [
            ("{What is your name|Who are you|Your name, please|What are you called}?", f"{{My name is|I am}} {name}."),
            ("{Where are you|Where do you {live|work}|In which town are you}?", f"I {{am|live}} in {town}."),
            ("{What is your job|What do you do|What is your work|What are you}?", f"I am a {job}."),
        ]
    )
    system = f"{{You are {name}, a {job} in {town}.|Your name is {name}. You are a {job} and live in {town}.}}"
    return [(role, say(text, chooser=chooser)) for role, text in zip(ROLES, (system, question, answer), strict=True)]


ROLES = ("system", "user", "assistant")


def remember(chooser: random.Random, material: Material) -> Turns:
    """The user says things about somebody over several turns and asks for one of them later."""
    keys = chooser.sample(["town", "job", "age", "pet", "code", "date"], chooser.randint(1, 3))
    record = draw_record(chooser, keys=keys)
    noted = "{All right|Noted|I see|Thank you|Good to know|I will remember that}{.|!}"
    turns: Turns = []
    for key in keys:
        told = f"{{My {key} is|Remember my {key}:|Note my {key}:|By the way, my {key} is}} {record[key]}."
        turns += [("user", say(told, chooser=chooser)), ("assistant", say(noted, chooser=chooser))]
    asked = chooser.choice(keys)
    question = f"{{What is my {asked}?|What was my {asked}?|Do you remember my {asked}?|Tell me my {asked}.}}"
    answer = f"{{Your {asked} is {record[asked]}|It is {record[asked]}}}."
    return [*turns, ("user", say(question, chooser=chooser)), ("assistant", say(answer, chooser=chooser))]


def continue_text(chooser: random.Random, material: Material) -> Turns:
    """The first part of a passage; the answer goes on to the end of a sentence."""
    sentences = re.split(r"(?<=[.!?]) ", chooser.choice(material.passages))
    end = chooser.randint(1, min(4, len(sentences)))
    words = " ".join(sentences[:end]).split(" ")
    cut = chooser.randint(len(words) // 2, max(len(words) - 4, len(words) // 2))
    lead = "{Continue|Go on|Continue the text|Finish the sentence|What comes next|Write on|Complete this}{:|.}"
    prompt = f"{say(lead, chooser=chooser)}{chooser.choice([' ', chr(10)])}{' '.join(words[:cut])}"
    return [("user", prompt), ("assistant", " ".join(words[cut:]))]


def hide_in_prose(text: str, *, chooser: random.Random, material: Material, num_passages: int) -> str:
    """`text` as a paragraph among `num_passages` passages of the corpus."""
    parts = chooser.sample(material.passages, min(num_passages, len(material.passages)))
    parts.insert(chooser.randint(0, len(parts)), text)
    return "\n\n".join(parts)


def passage_length(chooser: random.Random) -> int:
    """How many passages stand around a fact: none mostly, seldom many."""
    return chooser.choices([0, 1, 2, 4, 7], weights=[4, 3, 2, 1, 1])[0]


def ask_passage(chooser: random.Random, material: Material) -> Turns:
    """One or two questions over a text that tells some facts, alone or among other prose."""
    keys = chooser.sample([key for key in FACTS if key not in ("name", "town")], chooser.randint(2, 4))
    record = draw_record(chooser, keys=keys)
    told = tell_record(record, chooser=chooser)
    text = hide_in_prose(told, chooser=chooser, material=material, num_passages=passage_length(chooser))
    questions = [say(FACT_QUESTIONS[key], chooser=chooser) + "?" for key in keys]
    before = chooser.random() < 0.5
    first = f"{questions[0]}\n\n{text}" if before else f"{text}\n\n{questions[0]}"
    turns: Turns = [("user", first), ("assistant", record[keys[0]])]
    if chooser.random() < 0.4:
        turns += [("user", chooser.choice(["And: ", "And now: ", ""]) + questions[1]), ("assistant", record[keys[1]])]
    return turns


def missing_word(chooser: random.Random, material: Material) -> Turns:
    """A text, and one of its sentences again with a gap."""
    sentences = chooser.sample(material.sentences, chooser.randint(1, 5))
    words = chooser.choice(sentences).split(" ")
    at = chooser.randrange(1, len(words) - 1)
    answer = words[at].strip(".,;:'!?")
    gap = " ".join([*words[:at], words[at].replace(answer, "____"), *words[at + 1 :]])
    lead = "{Which word is missing{| here}|What stands in the gap|Fill the gap|Give the missing word}{:|}"
    return [("user", f"{' '.join(sentences)}\n\n{say(lead, chooser=chooser)} {gap}"), ("assistant", answer)]


def complete_quote(chooser: random.Random, material: Material) -> Turns:
    """A text, and the first words of one of its sentences; the answer is the whole sentence."""
    sentences = chooser.sample(material.sentences, chooser.choice([2, 3, 4, 6, 12, 40]))
    asked = chooser.choice(sentences)
    start = " ".join(asked.split(" ")[:3])
    lead = '{Copy|Quote|Give|Write down|Find} the sentence that {begins|starts} with "<start>"{| in full}'
    question = expand(lead, chooser=chooser, slots={"start": lambda _: start})
    return [("user", f"{' '.join(sentences)}\n\n{question}."), ("assistant", asked)]


def look_up_list(chooser: random.Random, material: Material) -> Turns:
    """A long list of keys and codes, then some questions for single lines."""
    count = chooser.choice([5, 8, 12, 20, 50])
    codes = {word: draw_code(chooser) for word in chooser.sample(material.words, min(count, len(material.words)))}
    lines = "\n".join(f"{word}: {code}" for word, code in codes.items())
    asked = chooser.sample(list(codes), chooser.randint(1, 3))
    lead = say("{Here is a list of codes.|The codes are:|Use this list.|This is the price list.}", chooser=chooser)
    if chooser.random() < 0.5:
        turns: Turns = [("system", f"{lead}\n{lines}\n{say('Answer with the code{| only}.', chooser=chooser)}")]
        return turns + [turn for word in asked for turn in (("user", word), ("assistant", codes[word]))]
    question = f"{{What is the code {{for|of}}|Give the code {{for|of}}|Look up}} {asked[0]}{{?|.}}"
    return [("user", f"{lead}\n{lines}\n\n{say(question, chooser=chooser)}"), ("assistant", codes[asked[0]])]


def house_labels(chooser: random.Random, material: Material) -> Turns:
    """Labels of no meaning, each defined by a kind of things in the system prompt; some words to be labelled."""
    kinds = chooser.sample(list(CATEGORIES), chooser.randint(3, len(CATEGORIES)))
    labels = dict(zip(kinds, chooser.sample(material.words, len(kinds)), strict=True))
    if chooser.random() < 0.5:
        lines = [f"{labels[kind]}: {kind}" for kind in kinds]
    else:
        lines = [f"{labels[kind]}: {', '.join(chooser.sample(CATEGORIES[kind], 4))} and so on" for kind in kinds]
    lead = say("{Answer with one of these labels.|Choose the label.|Sort each word into its group.}", chooser=chooser)
    turns: Turns = [("system", "\n".join([lead, *lines]))]
    for kind in chooser.choices(kinds, k=chooser.randint(1, 4)):
        turns += [("user", chooser.choice(CATEGORIES[kind])), ("assistant", labels[kind])]
    return turns
