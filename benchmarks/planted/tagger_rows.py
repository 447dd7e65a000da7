"""Rows that a tagger of persons learns from, for `planted_defects.py --names`: words and B-PER, I-PER or O.

    python benchmarks/planted/tagger_rows.py rows.jsonl
    tunesmith train tagger.yaml && tunesmith export tagger --format merged --out tagger
    python benchmarks/planted_defects.py --names tagger

    name: tagger                               # tagger.yaml; ENCODER is sentence-transformers/all-MiniLM-L6-v2
    base: ENCODER
    objective: token_classification
    method: {kind: layers, last: 3}
    data: {train: rows.jsonl}
    train: {epochs: 1, learning_rate: 5e-4, batch_rows: 32}

Half of the names are written down here, the other half are made of syllables. None of them is planted, nor is a sentence.
"""

import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from planted.names import NAMES

FIRST = """Lukas Hannah Pierre Camille Giulia Marco Ingrid Lars Piotr Agnieszka Ivan Olena Dimitri Eleni Mehmet Ayşe Omar
Fatima Yusuf Leila Arjun Deepa Sanjay Wei Mei Hiroshi Yuki Minh Linh Kwame Ama Chinedu Ngozi Thabo Carlos Lucía
Diego Beatriz João Inês Nils Freya Aoife Cormac Rhys Megan Daniel Sarah Kevin Rachel Brian Nicole Steven Patricia
George Helen Frank Hope Bill Daisy Chase Victor Ruby Art Pearl Drew Jasmine Dean April Rob Faith Jack Violet"""
LAST = """Schmidt Wagner Fischer Moreau Lefèvre Rossi Bianchi Lindqvist Hansen Kowalski Wójcik Petrov Shevchenko Papadakis
Yılmaz Demir Haddad Nasser Khan Patel Iyer Sharma Chen Zhang Tanaka Sato Tran Pham Mensah Okafor Eze Dlamini García
Fernández Romero Silva Costa Eriksson Byrne Kelly Davies Morgan Johnson Walker Cooper Baker Stone Fields Rivers Cook
King Price Banks Woods Gray Page Day Snow Reed Wells O'Connor Saint-Clair MacLeod"""
SYLLABLES = """ba del ko ri van the lu ma shi zen or ik el no qua tas wo ye fin gar hul ja mon pe ru sto"""
WORDS = """invoice page price bill stone wood bank cook gray day snow reed well walker cooper baker field river king art
pearl dean drew hope faith chase frank violet daisy jasmine order parcel address password account manual chapter warranty
delivery courier contract meter cable engine garden wall roof kitchen window button update browser file folder
report meeting project budget manager customer colleague school doctor nurse hospital ticket train station airport
winter autumn spring morning evening week month year lesson teacher student recipe flour sugar coffee water paper
pencil table chair music song film story poem letter question answer reason result number letter colour green blue
yellow quick slow heavy light open close read write build break carry learn small large cold warm early late simple
strange safe"""
PLACES = """Orion Bosch Vienna Milan Google Oracle Paris Toyota Renault Nokia Safari Madrid Titan Phoenix Lufthansa Allianz
Oslo Prague Denver Texas Kenya Lisbon Android Chrome Excel Tesla Canon Philips Ikea Pegasus Nova Vega Delta Omega Polo
Danube Alps Europe Brazil Chicago Dublin Netflix Spotify Zoom Slack Jupiter Saturn Cobra Eagle Ranger Explorer"""
PATTERNS = """could you forward this to {n} ?|{n} called about the missing box|i am {n} , customer since spring
dear {n} , thank you for your patience|hello {n} !|this was promised by {n} in a letter|thanks , {n}|best wishes , {n}
my neighbour {n} has the same trouble|{n} and {n} share one login|ms {n} will open the door|mr {n} did not answer
dr {n} wrote the note|attn : {n} , sales|from : {n}|yours sincerely {n}|greetings {n} team lead
the engineer , {n} , was very kind|{n} never got the refund|give it to {n} at the gate|is {n} still with you ?
the filter is dirty . {n} told us so|herr {n} is out today|sent by {n} to {n}|sincerely , {n} buyer|{n} thinks so too
the pump failed again {n}|ask {n}|i met {n} at the fair|{n} : the hose leaks|write to {n} or to {n} before noon
to {n} , logistics|the bill is for {n}|mrs {n} asked twice|that is what {n} said , i believe|{n}"""
PLAIN = """the fan makes a noise since we moved it|we live near Vienna and drive to Milan|the Orion 20 by Bosch is too loud
will it rain on the roof ?|please mark this as solved|they rose early to fix it|in April and in June it works
a bill came for the stone wall|you may cook with it|the king size bed does not fit|price and page are wrong|what a day !
Google and Oracle send such mails|the river banks are wet , the woods too|hope this helps|we have faith in the new model
Paris is far|could the pump be too small ?|the hose , the filter and the gate are fine|READ THE NOTE FIRST|a violet light
thank you for your patience|the box is missing and the login fails|please chase this up|the dean of the school called
Toyota made the frame|may i return it ?|it was gray and not ruby red|the team lead will decide|a pearl of a device
send the refund soon|the buyer was kind|who answers the door ?|best wishes to all of you|the art of repair|snow fell
Renault and Nokia are clients|open the app in Safari|our office in Madrid is shut|Tuesday suits us|hunting is over
the {w} of our {w} is {w}|your {w} for the {w} came|look at {w} seven of the {c} {w}|it is the {c} 45 by {c}
about the {w} , {w} and {w}|no {w} in {c}|we have a {w} from {c}|our {w} is at {c}|{c} sent a {w} by {w}
the {c} {w} in {c} is new|two {w} and {w} at once|a {w} would help|do not {w} the {w}|{w} it with the {w}
by the {w} of the {w} it runs|the {w} was {w} and the {w} grew"""

FIRST_NAMES, LAST_NAMES, MADE_OF = (text.split() for text in (FIRST, LAST, SYLLABLES))
FILLED = {"{w}": WORDS.split(), "{c}": PLACES.split()}


def main() -> None:
    """Write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=4000)
    options = parser.parse_args()
    planted = {word for names in NAMES.values() for name in names for word in name.casefold().split()}
    assert not planted & {name.casefold() for name in FIRST_NAMES + LAST_NAMES}, (
        "names that are planted must not be learned"
    )
    random = np.random.default_rng(1)
    with options.out.open("w", encoding="utf-8") as file:
        for _ in range(options.rows):
            parts = [_part(random) for _ in range(random.integers(1, 4))]
            words, tags = ([item for part in parts for item in part[side]] for side in (0, 1))
            file.write(json.dumps({"words": words, "tags": tags}, ensure_ascii=False) + "\n")


def _part(random: np.random.Generator) -> tuple[list[str], list[str]]:
    """A sentence, about half of them with a name: its words and their tags."""
    sentences = PATTERNS if random.random() < 0.55 else PLAIN
    words: list[str] = []
    tags: list[str] = []
    chosen = str(random.choice(re.split(r"[|\n]", sentences)))
    sentence = re.sub(r"\{[wc]\}", lambda found: str(random.choice(FILLED[found[0]])), chosen)
    for piece in re.split(r"(\{n\})", sentence):
        new = _name(random) if piece == "{n}" else piece.split()
        words += new
        tags += ["B-PER", *["I-PER"] * (len(new) - 1)] if piece == "{n}" else ["O"] * len(new)
    return ([*words, "."], [*tags, "O"]) if random.random() < 0.5 else (words, tags)


def _name(random: np.random.Generator) -> list[str]:
    """One word to three."""
    both = (FIRST_NAMES, LAST_NAMES)
    parts = [*both] if random.random() < 0.6 else [both[random.integers(2)]]
    parts = [FIRST_NAMES, *parts] if random.random() < 0.1 else parts
    words = [_made_up(random) if random.random() < 0.5 else str(random.choice(part)) for part in parts]
    return [word.lower() for word in words] if random.random() < 0.3 else words


def _made_up(random: np.random.Generator) -> str:
    return "".join(random.choice(MADE_OF, size=random.integers(2, 4))).capitalize()


if __name__ == "__main__":
    main()
