"""The sample data of `tunesmith quickstart`: support tickets and how the house sorts them. All of it is invented.

    python recipes/starter/make_sample.py [--out tunesmith/starter/sample]

A ticket says what is wrong, how much it hurts and what the customer asks for, in any order, with some small talk and
now and then a typo. The answer is compact JSON in words that only this house uses:

    desk    what it is about: ledger (charges), keyring (sign-in), parcel (delivery), pixel (the app's screens),
            relay (alerts and e-mails), vault (stored readings)
    level   red (work has stopped, or a date is at stake), amber (a nuisance that can wait some days), green (no hurry)
    step    what is asked for: refund, phone, mend, explain

Each of the 72 combinations of labels has six training and two test rows, so no answer is more likely than another.
Two phrasings (a way to state a problem, a hurt or a wish) that meet in a test ticket never meet in a training ticket: a
test answer cannot be looked up, only put together from what each phrasing means.
"""

import argparse
import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path

from wording import expand, listed, with_typo

SYSTEM = "Triage the ticket. Answer with JSON: desk, level, step."
TRAIN_ROWS_PER_COMBINATION = 6
TEST_ROWS_PER_COMBINATION = 2
TYPO_SHARE = 0.12
MOST_CHARACTERS = 200  # of a ticket
MOST_ALIKE = 0.7  # of the 5-character shingles of two tickets, the share they may have in common

DESKS = {
    "ledger": [
        "{I was|We were|My card was} {charged|billed} <amount> {twice|two times} {for|in} <month>",
        "{Invoice|Bill} <number> {says|lists|asks for} <amount>, but {our|my} plan costs {less|half of that}",
        "{You|They} took <amount> from my {card|account} after I {cancelled|had cancelled|ended} the plan",
        "The {discount|yearly discount|voucher} is missing from {invoice|bill} <number>",
        "The tax on the {invoice|bill} {for|of} <month> {looks wrong|is wrong|does not add up}",
        "{We pay|I am paying|I was billed} for <count> {sensors|gauges} and own only two",
        "My {payment|card payment} of <amount> {was refused|did not go through|bounced}, yet the bank {shows|lists} it",
        "{The price|My monthly price|The fee} went up to <amount> {in|since} <month> {without notice|without a word}",
    ],
    "keyring": [
        "{I|We} cannot {sign in|log in}{|: the page says wrong password| with the new password}",
        "My password is {rejected|refused|not accepted} {every time|since <weekday>|on both phones}",
        "The {code|login code|sign-in code} {on|for} my phone {never works|has expired each time|is not accepted}",
        "{I am|We are|My father is} locked out of {the|our|my} account {since <weekday>|after three tries|again}",
        "The {reset link|password link|sign-in link} {leads nowhere|is dead|has expired}{| when I click it| already}",
        "A {new colleague|helper|gardener} cannot {get into|open|join} our account{| with the invitation}",
        "I {changed|lost|replaced} my phone and {now|since then} the {login|sign-in} {fails|wants the old one}",
        "{It|The app} {logs me out|signs me out|throws me out} {every few minutes|all the time|after each click}",
    ],
    "parcel": [
        "The {sensor|gauge|starter set} I ordered {on <weekday>|in <month>} {has not arrived|never came|is not here}",
        "{My|Our} {parcel|package} <number> {has not moved|is stuck|lies at the depot} since <weekday>",
        "{The courier|The driver} left {my|our} {parcel|package|box} {in the rain|with a stranger|in the wrong street}",
        "{The box|The package|My delivery} {came|arrived} with {a broken|a cracked|the wrong} {sensor|gauge|probe}",
        "You {sent|shipped|delivered} <count> {sensors|gauges}, {but I|though we|and I} ordered only one",
        "{One probe|A cable|The wall mount} is missing from {the box|my order|order <number>}",
        "{The tracking page|Tracking} says {delivered|it was handed over}, but {nothing came|there is no box here}",
        "{My order|Order <number>} {went|was sent} to {my|our} {old|former|wrong} address in <town>",
    ],
    "pixel": [
        "The {moisture|heat|light} {chart|graph|curve} {is blank|stays empty} {on my phone|in the app|today}",
        "{The app|The home screen} {freezes|crashes|hangs} {when I open|as soon as I tap} the {map|chart|menu}",
        "{The buttons|The menus|Half the labels} {overlap|have vanished|are cut off} {on the tablet|since the update}",
        "{The map|The greenhouse map} {draws|shows|puts} my {beds|rows|sensors} in the wrong {place|order|corner}",
        "The {dark|new} theme {makes|leaves} the {numbers|figures} {unreadable|far too small|grey on grey}",
        "{The page|The dashboard} {loads|takes} {forever|a minute} and then {goes white|shows an empty window}",
        "{The app|The screen} shows degrees in the wrong {unit|scale}{| since the update| for every bed}",
        "{The colours|The icons} of the {chart|weekly view|bed list} {are mixed up|flicker|keep changing}",
    ],
    "relay": [
        "{I|We} {get no|no longer get} {frost|drought|heat} {alerts|warnings}{| on my phone| since <weekday>}",
        "The {frost|drought|battery} {alert|warning} {came|arrived|reached us} {hours|a day|two days} late",
        "{The weekly|Your weekly|The daily} {e-mail|mail} {lands in|ends up in|goes to} {spam|the junk folder}",
        "{I|We} {get|receive} the same {alert|warning|message} <count> times {a night|an hour|each morning}",
        "{Text messages|Messages|Alerts} {go to|still reach} {my old number|a former colleague|the wrong person}",
        "{I|We} {switched off|turned off|muted} the {alerts|messages}, {but they|and they} {keep coming|still come}",
        "{The alarm|The warning} {rings|goes off} at {night|three in the morning} {though|while} all is {well|fine}",
        "{Replies|My answers|Answers} to your {messages|alerts|texts} {bounce|come back|get lost}",
    ],
    "vault": [
        "{The readings|All readings|Our records} {of|from|for} <month> {are gone|have vanished|were deleted}",
        "{The export|My download|The file} {of|with} the {readings|records} {is empty|stops halfway|cannot be opened}",
        "{The backup|Last night's backup|Our backup} {failed|did not run|has stopped} {again|on <weekday>}",
        "{The history|Our history} {ends|stops|breaks off} {on <weekday>|in <month>|after thirty days}",
        "{I|We} {deleted|removed|erased} the {records|readings|data} of a {bed|sensor} by mistake",
        "{The archive|The storage|My storage} is {full|said to be full}, {so|and} {nothing|no reading} is {saved|kept}",
        "{Old readings|Past seasons|Last year's records} {cannot be restored|do not come back|fail to load}",
        "{The import|Importing} of {our|my} old {records|readings|notes} {stops|fails|ends} at {line|row} <count>",
    ],
}

LEVELS = {
    "red": [
        "{Nobody here|None of us|No one} can work until {this|that} is {solved|settled|over}",
        "{The whole nursery|Our whole greenhouse|The entire team} {stands still|has stopped|is down}",
        "{This|It} {cannot wait {another hour|until tomorrow|a day longer}|must be settled {today|by tonight}}",
        "{We lose|I am losing} {plants|seedlings|customers} {by the hour|every hour|right now}",
        "{The inspector|Our auditor|A buyer} comes {tonight|this afternoon|in an hour}",
        "{This is|We have} an emergency{| here| and it is serious}",
        "{I|We} need {this|an answer} {at once|within the hour|before noon today}",
        "{Everything|All work} {hangs on this|is blocked|waits for this}",
    ],
    "amber": [
        "{I|We} can {manage|get by|cope} for {a few|two or three|some} days",
        "{It|This} slows us down, but {we get by|work goes on|there is a way around it}",
        "{Some time|An answer} this week {would do|would be good|is soon enough}",
        "{It is|This is} {annoying|a nuisance|tiresome}, though not {a disaster|the end of the world}",
        "{For now|So far} {we|I} {use|keep} {a paper list|a notebook|a workaround}",
        "{It costs|This costs} me {half an hour|some time|a walk} {each|every} day",
        "{Half of us|Two of us|Only some of us} {are affected|have the trouble}",
        "{Please do not|Do not} {leave it for|let it lie for} {weeks|too long}",
    ],
    "green": [
        "{There is no|No|There's no} {hurry|rush}{| at all| with this| whatsoever}",
        "{Whenever|When} you {find|have} {the time|a spare moment|a quiet day}",
        "{It is|This is|It's} {only|just} {a small thing|a detail|a trifle}",
        "{Next month|Some day|Any time} {is fine|is early enough|will do}",
        "{It does not|This does not} {bother|trouble|hinder} {us|me|anyone}{| much| really}",
        "{I am|We are} {merely|just|only} curious",
        "{I|We} can {easily|happily|gladly} live with it",
        "{Put|Please put} {it|this} at the {end|bottom} of your {list|pile}",
    ],
}

STEPS = {
    "refund": [
        "{Please|Kindly} {send|give|pay} {the|my|our} money back",
        "{I|We} {want|would like|ask for} a refund",
        "{Please refund|Kindly refund} {me|us|the sum}{| in full}",
        "{I|We} {expect|want|would like} {my|our} money back",
        "{Can|Could|Will} you {refund the amount|pay {me|us} back|refund what we paid}",
        "{A refund|Our money back} {would be fair|is what I ask for|is the least}",
        "{Please pay|Pay} the {sum|amount} back to {my card|our bank|my account}",
        "{When|How soon} {will|do} I get {my money back|a refund}",
    ],
    "phone": [
        "{Please|Kindly} {ring|call|phone} {me|us} {on|at} <phone>",
        "{Can|Could} {somebody|someone|one of you} {call|ring|phone} {me|us}",
        "{I|We} {would rather|prefer to|want to} {talk|speak} to {someone|you} {by phone|on the phone}",
        "{Please call|Call|Ring} {my|our} number: <phone>",
        "{Give|Please give} {me|us} a {call|ring}{| after lunch| on <weekday>}",
        "{When|At what time} can {I|we} {call|ring|phone} {you|one of you}",
        "{I am waiting|We wait|I hope} for {your call|a call}{| on <phone>}",
        "{Let us|Let's} {discuss|settle} {it|this} {by phone|on the phone|in a call}",
    ],
    "mend": [
        "{Please|Kindly} {fix|repair|mend} {it|this|that}",
        "{Can|Could|Will} you {fix|repair|mend} {it|this|that}",
        "{Please|Do} make it work{| again| as before}",
        "{I|We} {want|would like|need} {it|this} {repaired|fixed|working again}",
        "{Please|Kindly} {have|get} {it|this} {fixed|repaired|mended}",
        "{Just|Simply} {fix|repair|mend} {it|this}{|, please| for us}",
        "{When|How soon} will {it|this|that} {work again|be fixed|be repaired}",
        "{All we|All I} {want|ask} is that it works{| again}",
    ],
    "explain": [
        "{Can|Could|Will} you {tell|explain to} me why",
        "{What did {I|we} do wrong|Where did {I|we} go wrong}",
        "{How|Why} {can|could|does} {that|this|such a thing} happen",
        "{Please|Kindly} explain {it|this|that}{| to me| to us}",
        "{Please tell|Tell} {me|us} {why|how} {this|that} {happens|happened}",
        "{I|We} {would like|want} to {understand|know} {why|the reason|the cause}",
        "{What|Which} {setting|rule} {causes|explains} {it|this|that}",
        "{What is|Do you know} the {reason|cause|explanation}{| for this}",
    ],
}
FIELDS = {"desk": DESKS, "level": LEVELS, "step": STEPS}
Labels = tuple[str, ...]  # one of each field
Phrasings = tuple[str, ...]  # a pattern for each label

QUESTION_STARTS = (*listed("Can Could Will When At What Where How Why Which"), "Do you")

GREETINGS = ["", "", "", "Hi,", "Hello,", "Good morning,", "Dear team,", "Hi there,", "Good evening,", "Hey,"]
SMALL_TALK = [
    *[""] * 12,
    "{I|We} have been with you since <year>.",
    "{The plants|The tomatoes|The roses} {look well|do fine} {otherwise|all the same}.",
    "{Greetings|I write} from <town>.",
    "{I run|We run} a {small|family} nursery {in|near} <town>.",
]
SIGN_OFFS = [
    "",
    "",
    "",
    "Thanks, <name>",
    "<name>",
    "<name>, <town>",
    "Thank you, <name>",
    "Regards, <name>",
    "Thanks!",
]

NAMES = listed(
    "Ada Ben Clara Dev Elif Femi Greta Hugo Ines Jonas Kofi Lena Mara Nils Oona Pavel Rosa Sven Tara Uma Viktor "
    "Wren Yara Zoe"
)
TOWNS = listed("Larkhill Oakmere Brindle Westfold Hazelby Stonebridge Marrow Fenwick Ashcombe Thornley")
MONTHS = listed("January February March April May June July August September October November December")
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]

SLOTS = {
    "amount": lambda chooser: f"${chooser.randint(4, 240)}{chooser.choice(['', '', '.50', '.90'])}",
    "number": lambda chooser: f"{chooser.choice(['', '#', 'no. '])}{chooser.randint(100, 9999)}",
    "count": lambda chooser: str(chooser.randint(3, 40)),
    "phone": lambda chooser: f"555 {chooser.randint(100, 999)}",
    "year": lambda chooser: str(chooser.randint(2014, 2024)),
    "month": lambda chooser: chooser.choice(MONTHS),
    "weekday": lambda chooser: chooser.choice(WEEKDAYS),
    "name": lambda chooser: chooser.choice(NAMES),
    "town": lambda chooser: chooser.choice(TOWNS),
}


@dataclass(frozen=True)
class Ticket:
    """A ticket with its labels, and the phrasings that say them."""

    labels: Labels
    phrasings: Phrasings
    text: str

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The phrasings that meet in this ticket."""
        return list(itertools.combinations(self.phrasings, 2))


def write_ticket(phrasings: Phrasings, *, chooser: random.Random) -> str:
    """One ticket that says these three things and nothing against them."""

    def say(pattern: str) -> str:
        return expand(pattern, chooser=chooser, slots=SLOTS)

    problem, hurt, wish = (say(pattern) for pattern in phrasings)
    parts = [
        problem + ".",
        hurt + chooser.choice([".", ".", ".", "!"]),
        wish + ("?" if wish.startswith(QUESTION_STARTS) else "."),
    ]
    if chooser.random() < 0.5:
        chooser.shuffle(parts)
    greeting, small_talk, sign_off = (say(chooser.choice(ways)) for ways in (GREETINGS, SMALL_TALK, SIGN_OFFS))
    body = " ".join(filter(None, [small_talk, *parts]))
    ticket = "\n".join(filter(None, [greeting, body, sign_off]))
    return with_typo(ticket, chooser=chooser) if chooser.random() < TYPO_SHARE else ticket


def shingles(text: str) -> set[str]:
    """The 5-character pieces of a text."""
    return {text[at : at + 5] for at in range(len(text) - 4)}


def similarity(one: set[str], other: set[str]) -> float:
    """Jaccard similarity of two sets of shingles."""
    return len(one & other) / len(one | other)


def draw_tickets(*, seed: int) -> tuple[list[Ticket], list[Ticket]]:
    """Training and test tickets: no two are nearly alike, and no phrasings that meet in the test meet in training."""
    chooser = random.Random(seed)
    written: list[set[str]] = []

    def draw(labels: Labels, *, avoid: set[tuple[str, str]]) -> Ticket:
        while True:
            phrasings = tuple(chooser.choice(ways[label]) for ways, label in zip(FIELDS.values(), labels, strict=True))
            ticket = Ticket(labels, phrasings, write_ticket(phrasings, chooser=chooser))
            if len(ticket.text) > MOST_CHARACTERS or not avoid.isdisjoint(ticket.pairs):
                continue
            pieces = shingles(ticket.text.lower())
            if all(similarity(pieces, other) <= MOST_ALIKE for other in written):
                written.append(pieces)
                return ticket

    combinations = list(itertools.product(*FIELDS.values()))
    test = [draw(labels, avoid=set()) for labels in combinations * TEST_ROWS_PER_COMBINATION]
    met = {pair for ticket in test for pair in ticket.pairs}
    train = [draw(labels, avoid=met) for labels in combinations * TRAIN_ROWS_PER_COMBINATION]
    chooser.shuffle(train)
    chooser.shuffle(test)
    return train, test


def chat_row(ticket: Ticket) -> dict:
    """One row in the OpenAI chat format."""
    answer = json.dumps(dict(zip(FIELDS, ticket.labels, strict=True)), separators=(",", ":"))
    contents = {"system": SYSTEM, "user": ticket.text, "assistant": answer}
    return {"messages": [{"role": role, "content": content} for role, content in contents.items()]}


def make_rows(*, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """Training and test rows."""
    train, test = draw_tickets(seed=seed)
    return [chat_row(ticket) for ticket in train], [chat_row(ticket) for ticket in test]


def main() -> None:
    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=root / "tunesmith" / "starter" / "sample")
    arguments = parser.parse_args()

    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "test"), make_rows(), strict=True):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (arguments.out / f"{name}.jsonl").write_text(lines, encoding="utf-8", newline="\n")
        print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
