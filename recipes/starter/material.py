"""What the instruction rows are made of: sentences and passages of the prose corpus, and word lists of our own."""

import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from prepare_corpus import is_validation, read_documents, training_files
from wording import listed, pairs

ATTRIBUTION_NEEDED = "technical-01"  # CC BY 4.0: read in pre-training, not copied into rows
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)(?<!St\.)(?<!\b[A-Z]\.) (?=[A-Z])")
PLAIN_SENTENCE = re.compile(r"[A-Z][A-Za-z',;: -]+[a-z][.!?]")
ABBREVIATION_END = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|Esq|Messrs|Rev|Gen|Col|Capt|[A-Z])\.$")
LEFT_OUT = re.compile(
    r"\b(?:kill\w*|murder\w*|savage\w*|negro\w*|jew\w*|gyps\w*|whore\w*|slave\w*|rape\w*|naked\w*|damn\w*|"
    r"suicid\w*|corpse\w*|hang(?:ed|ing)|bastard\w*|breast\w*|lust\w*|hell|blood\w*|dead|die[sd]?|death\w*)\b",
    re.IGNORECASE,
)

NAMES = listed(
    "Ada Alma Amir Anna Arthur Beth Boris Carla Cecil Chen Dana Daniel Dora Edwin Elena Emma Eric Esther Fatima "
    "Felix Fiona Frank George Grace Hana Harold Helen Henry Ida Ivan Jane Jasper Joan Julia Karl Kate Kenji Laura "
    "Leo Lucy Marco Maria Martin Max Mia Nadia Nina Nora Omar Oscar Otto Paul Peter Priya Rachel Ravi Rita Robert "
    "Ruth Samir Sara Simon Stella Theo Thomas Tom Ursula Vera Victor Walter Wanda Yusuf Zara"
)
SURNAMES = listed(
    "Abbott Baker Barnes Bell Brooks Carter Clarke Cole Cooper Dalton Drake Ellis Fisher Ford Foster Gray Hall "
    "Harper Hayes Hill Hughes Jensen Kim Lane Lopez Marsh Mason Meyer Miller Moreno Nash Novak Okoro Olsen Page "
    "Parker Patel Perry Quinn Reed Rossi Rowe Shaw Silva Stone Tanaka Turner Vance Wade Walsh Ward Weber West Wood "
    "Young"
)
TOWNS = listed(
    "Lisbon Oslo Cairo Lima Turin Leeds Boston Quito Delhi Porto Bergen Dublin Geneva Havana Kyoto Lyon Madrid "
    "Nairobi Naples Paris Prague Rome Seoul Sofia Tokyo Vienna Warsaw York Zurich Athens Berlin Denver Austin "
    "Bristol"
)
JOBS = listed("baker teacher nurse farmer pilot painter lawyer doctor cook writer singer driver sailor carpenter judge")
PETS = listed("cat dog horse parrot rabbit goat turtle hamster goose pony")
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = listed("January February March April May June July August September October November December")
NUMBER_WORDS = listed(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)

CATEGORIES: dict[str, list[str]] = {
    "animal": listed("cat dog horse cow sheep goat lion tiger bear wolf fox rabbit mouse frog snake owl eagle duck"),
    "food": listed("bread cheese soup rice honey butter cake pie salad egg ham bacon pasta stew toast biscuit"),
    "fruit": listed("apple pear plum grape lemon orange cherry peach melon fig banana berry apricot lime"),
    "colour": listed("red blue green yellow white black brown grey pink purple silver violet scarlet"),
    "tool": listed("hammer saw drill spade rake knife axe file wrench ladder needle shovel chisel"),
    "clothing": listed("shirt coat hat shoe glove scarf dress skirt sock boot belt jacket cap apron"),
    "furniture": listed("table chair bed desk shelf sofa stool bench cupboard wardrobe couch drawer"),
    "vehicle": listed("car bus train ship boat bicycle cart wagon lorry plane tram van carriage"),
    "weather": listed("rain snow wind storm fog frost hail thunder cloud sunshine mist breeze"),
    "body part": listed("hand foot arm leg head nose ear eye knee neck finger shoulder elbow"),
    "instrument": listed("piano violin flute drum guitar harp trumpet organ fiddle horn bell"),
    "building": listed("house church school castle barn tower palace cottage hotel library mill"),
}
OPPOSITES = pairs(
    "hot/cold big/small old/young fast/slow high/low long/short light/dark open/closed full/empty rich/poor "
    "happy/sad early/late near/far soft/hard wet/dry loud/quiet strong/weak clean/dirty good/bad up/down "
    "left/right in/out first/last day/night black/white love/hate win/lose buy/sell come/go give/take "
    "true/false thick/thin wide/narrow deep/shallow cheap/expensive heavy/light begin/end always/never "
    "above/below before/after"
)
PLURALS = pairs(
    "cat/cats dog/dogs house/houses tree/trees box/boxes church/churches city/cities lady/ladies man/men "
    "woman/women child/children foot/feet tooth/teeth mouse/mice goose/geese knife/knives wolf/wolves "
    "leaf/leaves sheep/sheep day/days boy/boys story/stories glass/glasses hero/heroes potato/potatoes "
    "wife/wives book/books window/windows watch/watches baby/babies shelf/shelves bus/buses brush/brushes "
    "garden/gardens"
)
PASTS = pairs(
    "walk/walked talk/talked look/looked go/went come/came see/saw take/took give/gave make/made know/knew "
    "think/thought find/found tell/told feel/felt leave/left keep/kept hold/held bring/brought begin/began "
    "write/wrote sit/sat stand/stood lose/lost run/ran eat/ate drink/drank sing/sang speak/spoke break/broke "
    "choose/chose grow/grew fall/fell drive/drove ride/rode wear/wore buy/bought catch/caught teach/taught "
    "carry/carried try/tried stop/stopped play/played open/opened call/called"
)

# Sentences of our own, each for one label; `<name>`, `<town>` and `<day>` are slots.
TONES: dict[str, list[str]] = {
    "happy": [
        "{What|This is} a {lovely|wonderful|glorious} {day|morning|garden}!",
        "I {laughed|smiled|sang} all the way home.",
        "{We won|They won} the {game|race|prize} and {danced|cheered} all night.",
        "<name> {is delighted|is so glad|is overjoyed} with the {gift|letter|news}.",
        "{My|Our} holiday in <town> was {perfect|a joy|a delight}.",
        "The {cake|dinner|concert} was {delicious|splendid|marvellous} and we {enjoyed|loved} every minute.",
    ],
    "sad": [
        "I {cried|wept} when <name> {left|went away|moved to <town>}.",
        "{My|Our} {cat|dog|friend} is {gone|lost} and the house is {empty|quiet}.",
        "<name> {sat alone|felt lonely|was all alone} on <day>.",
        "{It is|What} a {sad|gloomy|sorrowful} {day|letter|song}.",
        "{Nobody|No one} {came|wrote|called}, and I {miss|long for} {them|my friends|<name>}.",
        "{We|They} {lost|missed} the {game|last train} and {walked|went} home in {tears|silence}.",
    ],
    "angry": [
        "{How dare|Why do} you {open|read} my {letters|post}!",
        "<name> {slammed the door|shouted at us|banged the table}.",
        "I am {furious|so angry|sick and tired of this}!",
        "{This is|That is} {an outrage|a disgrace|simply not fair}!",
        "{Stop|Do not dare} {shouting|lying} to me{| again}!",
        "I {will not|shall never} {stand|bear} this {rudeness|nonsense} any longer!",
    ],
}
TOPICS: dict[str, list[str]] = {
    "weather": [
        "{It rained|It snowed|The wind blew} {all day|all night} in <town>.",
        "{Tomorrow|On <day>} will be {sunny|cloudy|foggy} and {warm|cold}.",
        "{Thick fog|Heavy rain|Hard frost} {is expected|is likely} by <day>.",
    ],
    "food": [
        "{Boil|Stir|Bake} the {soup|rice|pie} for {ten|twenty} minutes.",
        "<name> {ate|cooked|ordered} {fish|eggs|a stew} with {butter|onions|cheese}.",
        "{The bread|The cake|The cheese} {smells|tastes} {of honey|of lemon|very good}.",
    ],
    "travel": [
        "{The train|The ship|The coach} to <town> leaves {at noon|on <day>|in an hour}.",
        "<name> {packed a bag|bought a ticket|took the ferry} for <town>.",
        "{Our hotel|The station|The airport} in <town> was {crowded|closed|far away}.",
    ],
    "music": [
        "<name> {plays|practises|teaches} the {piano|violin|flute} on <day>.",
        "{The choir|The band|The orchestra} {sang|played} {three songs|an old tune|a march}.",
        "{The concert|The opera} in <town> {was sold out|begins at eight|ended late}.",
    ],
    "sport": [
        "{Our team|The team from <town>} {won|lost} the match on <day>.",
        "<name> {scored twice|won the race|broke a record} {in <town>|on <day>}.",
        "{The runners|The players|The swimmers} {trained|warmed up} {before|after} the game.",
    ],
    "school": [
        "{The teacher|The pupils|The class} {read|wrote} {an essay|two chapters} on <day>.",
        "<name> {passed|failed|sat} the {spelling|maths|history} test.",
        "{Lessons|The exams|Classes} {begin|end} on <day>{| in <town>}.",
    ],
}


@dataclass(frozen=True)
class Material:
    """What is drawn from: short plain sentences, paragraphs, and common lower-case words, most frequent first."""

    sentences: list[str]
    passages: list[str]
    words: list[str]


def plain_sentences(paragraph: str) -> list[str]:
    """The sentences of 4 to 16 words without quotations, numbers or abbreviations that can stand alone."""
    return [
        sentence
        for sentence in SENTENCE_END.split(paragraph.replace("\n", " "))
        if 4 <= len(sentence.split()) <= 16
        and PLAIN_SENTENCE.fullmatch(sentence)
        and not ABBREVIATION_END.search(sentence)
        and not LEFT_OUT.search(sentence)
    ]


def load_material(prose: Path, *, chooser: random.Random, num_sentences: int = 40_000) -> Material:
    """Draw the material from the training documents of the corpus that ask for no attribution.

    Every sentence, passage (200 to 900 characters) and word is drawn once. Raises FileNotFoundError where the
    corpus is not.
    """
    files = [path for path in training_files(prose) if not path.name.startswith(ATTRIBUTION_NEEDED)]
    documents = [document for path in files for document in read_documents(path) if not is_validation(document)]
    chooser.shuffle(documents)
    sentences: dict[str, None] = {}
    passages: list[str] = []
    counts: Counter[str] = Counter()
    for document in documents:
        for paragraph in document.split("\n\n"):
            if 200 <= len(paragraph) <= 900 and paragraph.isascii() and not LEFT_OUT.search(paragraph):
                passages.append(paragraph)
            for sentence in plain_sentences(paragraph):
                sentences[sentence] = None
                counts.update(re.findall(r"(?<![A-Za-z'-])[a-z]{3,9}(?![a-z'-])", sentence))
        if len(sentences) >= num_sentences:
            break
    words = [word for word, count in counts.most_common(3000) if count >= 2 or len(counts) < 3000]
    return Material(sentences=list(sentences), passages=passages, words=words)
