"""Is the default of every threshold of the checks the right one? Other values on planted defects and on clean real rows.

    python benchmarks/thresholds.py --embedder ENCODER            # all checks; --data FOLDER holds the published sets
    python benchmarks/thresholds.py --only duplicates             # one, beside the results that are there
    python benchmarks/thresholds.py --table

Of each setting in turn the other settings keep their defaults. `precision` and `recall` are of all rows of the planted
corpora together, easy and hard, and by grade in the JSON; `clean` counts the rows of published sets that are told of. In
CLINC150 and TREC, where the check does not see the classes, `other_class` counts those told with a row of another class:
they do not say the same. For `labels` and `drift` a case is a file and not a row:

- labels: TREC with one class cut down. It is a defect where a classifier then misses that class more often than not.
- drift: draws of CLINC150 of 1,000 rows a side. It is a defect where a fifth or a half of production is of a domain that
  training lacks, and none where it is a twentieth or nothing.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from _machine import code, command, machine, versions
from planted import Planted, duplicates, overlap, quality
from planted.sentences import LANGUAGES
from planted.words import some_words

from tunesmith.data.curate import contamination, drift, label_errors, labels, language, protected, semantic
from tunesmith.data.curate import duplicates as near
from tunesmith.data.curate.base import Check
from tunesmith.data.curate.quality import BARS, Bars, Quality
from tunesmith.data.curate.repeated import Repeated
from tunesmith.data.curate.semantic import Embed
from tunesmith.data.formats import examine
from tunesmith.data.settings import DataSettings
from tunesmith.data.types import Example, Origin, Row
from tunesmith.models.embed import load_embedder

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "thresholds.json"
LABELS_DRAWS, DRIFT_DRAWS, DRIFT_ROWS = 2, 20, 1_000
RATIOS = (1, 5, 9, 12, 19, 30, 60, 99, 150)
SHARES = {0.0: "two draws of one source", 0.05: "a twentieth", 0.2: "a fifth", 0.5: "a half"}


@dataclass(frozen=True)
class Sweep:
    """A setting of a check and the values it is tried with; `grades`: how the planted corpora's grades begin."""

    check: str
    setting: str
    default: float
    others: tuple[float, ...]
    grades: str = ""


BARS_SWEPT = {  # of the check of answers: the planted defects that each bar is for, and its other values
    "max_unfinished_share": ("cut off", (0.02, 0.05, 0.2)),
    "max_markup_share": ("markup", (0.02, 0.05, 0.2)),
    "max_length_score": ("length", (4.0, 5.0, 8.0)),
    "min_deviation": ("length", (0.2, 0.3, 0.6)),
    "min_echo_characters": ("echo", (20, 80)),
    "min_echo_share": ("echo", (0.5, 0.6, 0.8)),
    "min_shared_words_share": ("echo", (0.7, 0.8, 0.95)),
    "min_repeated_share": ("repetition", (0.1, 0.2, 0.4)),
    "min_repeated_times": ("repetition", (2, 4)),
    "min_repeated_characters": ("repetition", (30, 120)),
    "min_repeated_grams_share": ("repetition", (0.3, 0.4, 0.6)),
    "min_loop_words": ("repetition", (3, 5, 10)),
}
SWEEPS = (
    Sweep("duplicates", "min_jaccard", near.MIN_JACCARD, (0.5, 0.6, 0.7, 0.9)),
    Sweep("duplicates", "gram", near.GRAM, (3, 7)),
    Sweep("semantic", "min_cosine", semantic.MIN_COSINE, (0.7, 0.75, 0.8, 0.85, 0.9)),
    Sweep("contamination", "gram_words", contamination.GRAM_WORDS, (5, 10, 13)),
    Sweep("contamination", "min_containment", contamination.MIN_CONTAINMENT, (0.2, 0.5, 0.7)),
    Sweep("contamination", "min_passage_words", contamination.MIN_PASSAGE_WORDS, (20, 30, 60)),
    Sweep("protected", "min_passage_words", protected.MIN_PASSAGE_WORDS, (15, 40), grades="1 2 3 4 5"),
    Sweep("language", "main_share", language.MAIN_SHARE, (0.01, 0.02, 0.1)),
    Sweep("language", "min_letters", language.MIN_LETTERS, (20, 40, 60)),
    Sweep("language", "min_probability", language.MIN_PROBABILITY, (0.5, 0.7, 0.9)),
    *(Sweep("quality", name, asdict(BARS)[name], values, grades) for name, (grades, values) in BARS_SWEPT.items()),
    Sweep("label_errors", "reached_share", label_errors.REACHED_SHARE, (0.4, 0.5, 0.8, 1.0)),
    Sweep("label_errors", "max_self_share", label_errors.MAX_SELF_SHARE, (0.01, 0.02, 0.08, 0.16)),
    Sweep("labels", "max_class_share", labels.MAX_CLASS_SHARE, (0.7, 0.8, 0.95, 0.98), grades="two classes"),
    Sweep("labels", "max_class_ratio", labels.MAX_CLASS_RATIO, (10, 20, 50, 100, 200), grades="five classes"),
    Sweep("drift", "concern_auc", drift.CONCERN_AUC, (0.52, 0.6, 0.65)),
)
CHECKS = tuple(dict.fromkeys(sweep.check for sweep in SWEEPS))


@dataclass
class Tally:
    """What was told of one planted grade or published set: rows, or whole files."""

    rows: int = 0
    planted: int = 0
    found: int = 0
    right: int = 0
    other_class: int | None = None


@dataclass(frozen=True)
class Corpus:
    """Rows as a check is given them, those that are to be found, and the classes that the check does not see."""

    name: str
    examples: list[Example]
    expected: set[int]
    files: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    classes: list[str] | None = None


def corpus_of(source: Planted, *, classes: list[str] | None = None) -> Corpus:
    """Its rows read; what cannot be trained on is left out."""
    mapping = {"text": "text", "label": "label"} if "label" in source.rows[0] else {}
    settings = DataSettings(train="rows", mapping=mapping)
    rows = (Row(Origin("rows", line), value) for line, value in enumerate(source.rows, start=1))
    examples = [found for row in rows if isinstance(found := examine(row, settings=settings), Example)]
    return Corpus(source.grade, examples, source.expected, source.files, classes)


# --------------------------------------------------------------------------------------------------- the rows


def planted_for(check: str, *, folder: Path) -> Iterator[Corpus]:
    """The planted corpora of a check, at every grade; wrong labels in TREC too."""
    for module in (duplicates, overlap, quality):
        yield from (corpus_of(found) for found in module.planted(np.random.default_rng(0)) if found.check == check)
    if check == "language":
        yield corpus_of(short_texts(np.random.default_rng(0)))
    if check == "contamination":
        yield from (corpus_of(found) for found in long_items(np.random.default_rng(0)))
    if check == "label_errors":
        in_sets = quality.real(np.random.default_rng(0), folder=folder)
        yield from (corpus_of(found) for found in in_sets if "trec (coarse)" in found.grade)


def short_texts(random: np.random.Generator) -> Planted:
    """English pieces of 20 to 40 letters, of which every tenth is in another language."""
    rows, expected, foreign = [], set(), [code for code in LANGUAGES if code != "en"]
    for line in range(1, 601):
        code = "en" if line % 10 else str(random.choice(foreign))
        words = str(random.choice(LANGUAGES[code])).split()
        rows.append({"text": _piece(words[int(random.integers(4)) :], num_letters=int(random.integers(20, 41)))})
        expected |= set() if line % 10 else {line}
    return Planted("language", "20 to 40 letters", rows, expected)


def _piece(words: list[str], *, num_letters: int) -> str:
    """The first words that have so many letters."""
    letters = np.cumsum([sum(map(str.isalpha, word)) for word in words])
    return " ".join(words[: int(np.searchsorted(letters, num_letters)) + 1])


def long_items(random: np.random.Generator) -> Iterator[Planted]:
    """Rows of 150 words, every second with some words in a row of an item of 400, which are far from a third of it."""
    for num_words, is_enough in ((60, True), (45, True), (25, False)):
        items = [some_words(random, 400) for _ in range(100)]
        texts = [some_words(random, 150) for _ in range(200)]
        for number, item in enumerate(items):
            start = int(random.integers(400 - num_words))
            texts[2 * number] = [*texts[2 * number][:75], *item[start : start + num_words], *texts[2 * number][75:]]
        rows = [{"text": " ".join(text)} for text in texts]
        grade = f"{num_words} words of a long item" + ("" if is_enough else " (nothing to find)")
        files = {"benchmark.jsonl": [{"text": " ".join(item)} for item in items]}
        yield Planted("contamination", grade, rows, set(range(1, 201, 2)) if is_enough else set(), files)


def clean_for(check: str, *, folder: Path) -> Iterator[Corpus]:
    """Published sets, in which what is told of is nearly always a false alarm: see the module."""
    random = np.random.default_rng(0)

    def some(name: str, *, most: int, file: str = "train.jsonl") -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (folder / name / file).read_text("utf-8").split("\n") if line]
        return [rows[place] for place in np.sort(random.permutation(len(rows))[:most]).tolist()]

    def texts(name: str, *, label: str, most: int) -> Corpus:
        rows = some(name, most=most)
        source = Planted(check, name, [{"text": row["text"]} for row in rows], set())
        return corpus_of(source, classes=[row[label] for row in rows])

    def labelled(name: str, *, text: str, label: str, file: str = "train.jsonl") -> Corpus:
        rows = [{"text": row[text], "label": row[label]} for row in some(name, most=20_000, file=file)]
        return corpus_of(Planted(check, f"{name} ({label})", rows, set()))

    def answers(name: str, *, most: int, files: dict[str, list[dict[str, Any]]] | None = None) -> Corpus:
        return corpus_of(Planted(check, name, some(name, most=most), set(), files or {}))

    if check in ("duplicates", "semantic"):
        most = 20_000 if check == "duplicates" else 2_000
        yield texts("clinc150", label="label", most=most)
        yield texts("trec", label="fine", most=most)
        for name in ("bitext_support", "alpaca", "gsm8k"):
            yield answers(name, most=most if check == "duplicates" else 300)
    elif check == "contamination":
        for name in ("gsm8k", "clinc150", "trec"):
            files = {"test.jsonl": some(name, most=20_000, file="test.jsonl")}
            if name == "gsm8k":
                yield answers(name, most=20_000, files=files)
            else:
                rows = [{"text": row["text"]} for row in some(name, most=20_000)]
                given = {"test.jsonl": [{"text": row["text"]} for row in files["test.jsonl"]]}
                yield corpus_of(Planted(check, name, rows, set(), given))
    elif check == "protected":
        documents = {f"{path.parent.name}-{path.name}.jsonl": _texts(path) for path in _books(folder / "lm_text")}
        for name in ("alpaca", "lima", "gsm8k"):
            yield answers(name, most=20_000, files=documents)
    elif check in ("quality", "language"):
        for name in ("alpaca", "lima", "gsm8k", "bitext_support"):
            yield answers(name, most=1_500 if check == "language" else 600)
        if check == "language":
            for path in (
                folder / "lm_text" / "wikitext2.validation.txt",
                folder / "lm_text" / "tinystories_sample.txt",
            ):
                words = path.read_text("utf-8").split()
                starts = random.integers(len(words) - 20, size=8_000).tolist()
                pieces = [_piece(words[start : start + 20], num_letters=30) for start in starts]
                source = Planted(check, f"pieces of {path.stem}", [{"text": piece} for piece in pieces], set())
                yield corpus_of(source)
            yield texts("clinc150", label="label", most=3_000)
            yield texts("trec", label="fine", most=3_000)
    else:
        yield labelled("trec", text="text", label="coarse")
        yield labelled("bitext_support", text="instruction", label="intent")
        if check == "labels":
            yield labelled("bitext_support", text="instruction", label="category")
            yield labelled("trec", text="text", label="fine")
            yield labelled("pubmedqa", text="question", label="final_decision")
            yield labelled("clinc150", text="text", label="label")


def _books(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.txt") if "LICENSE" not in path.name)


def _texts(path: Path) -> list[dict[str, Any]]:
    return [{"text": path.read_text("utf-8")}]


# --------------------------------------------------------------------------------------------------- the checks


class Remembered:
    """An encoder that reads a text once however often it is asked."""

    def __init__(self, embed: Embed):
        self._embed, self._known = embed, dict[str, np.ndarray]()

    def __call__(self, texts: list[str]) -> np.ndarray:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known.update(zip(new, self._embed(new), strict=True))
        return np.stack([self._known[text] for text in texts])


def made(check: str, given: dict[str, Any], *, corpus: Corpus, folder: Path, embed: Embed | None) -> Check:
    """The check with some settings; `folder` holds the corpus's files."""
    if check == "duplicates":
        return Repeated(lambda: corpus.examples, **given)
    if check == "semantic":
        assert embed is not None
        return semantic.SemanticRepeats(embed, **given)
    if check == "contamination":
        files = [str(folder / name) for name in corpus.files]
        return contamination.Contamination(files, DataSettings(train="rows"), **given)
    if check == "protected":
        return protected.Protected(str(folder), **given)
    if check == "quality":
        return Quality(Bars(**given))
    return {"language": language.Language, "label_errors": label_errors.LabelErrors, "labels": labels.Labels}[check](
        **given
    )


def tally(check: str, given: dict[str, Any], *, corpus: Corpus, embed: Embed | None) -> Tally:
    """What the check tells of in a corpus."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, rows in corpus.files.items():
            (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        looking = made(check, given, corpus=corpus, folder=folder, embed=embed)
        problems = [problem for example in corpus.examples for problem in looking.look(example)]
        problems += looking.finish()
    told = {problem.line: problem.other for problem in problems if problem.file == "rows"}
    counted = Tally(len(corpus.examples), len(corpus.expected), len(told), len(told.keys() & corpus.expected))
    if corpus.classes is not None:
        pairs = [(line, other.line) for line, other in told.items() if other is not None]
        counted.other_class = sum(corpus.classes[one - 1] != corpus.classes[other - 1] for one, other in pairs)
    return counted


# ----------------------------------------------------------------------------------------------- labels and drift


@dataclass(frozen=True)
class Case:
    """A file's labels (rows by class), or how far two sets are told apart; and whether it is a defect."""

    grade: str
    defect: bool
    given: Any


def label_cases(folder: Path) -> Iterator[Case]:
    """TREC's classes cut to 600 rows, and one of them to fewer: is it missed by a classifier that learned from these?"""
    rows = [json.loads(line) for line in (folder / "trec" / "train.jsonl").read_text("utf-8").split("\n") if line]
    by_class: dict[str, list[str]] = {}
    for row in rows:
        by_class.setdefault(row["coarse"], []).append(row["text"])
    large = sorted(name for name, texts in by_class.items() if len(texts) >= 800)
    random = np.random.default_rng(0)
    for ratio, small, draw in itertools.product(RATIOS, large, range(LABELS_DRAWS)):
        other = large[(large.index(small) + 1 + draw) % len(large)]
        for grade, names in (("two classes", [small, other]), ("five classes", large)):
            counts = {name: 600 if name != small else round(600 / ratio) for name in names}
            yield Case(grade, _recall(by_class, counts, small=small, random=random) < 0.5, counts)


def _recall(
    by_class: dict[str, list[str]], counts: dict[str, int], *, small: str, random: np.random.Generator
) -> float:
    """The share of 150 unseen rows of the class that a classifier finds."""
    from sklearn.linear_model import LogisticRegression

    from tunesmith.data.curate.two_samples import vectors_of

    drawn = {name: random.permutation(by_class[name]).tolist() for name in counts}
    texts = [text for name, count in counts.items() for text in drawn[name][:count]]
    label_N = [name for name, count in counts.items() for _ in range(count)]
    vectors_NF = vectors_of([*texts, *drawn[small][600:750]])
    model = LogisticRegression(C=label_errors.PENALTY).fit(vectors_NF[: len(texts)], label_N)
    return float((model.predict(vectors_NF[len(texts) :]) == small).mean())


def told_of_labels(given: dict[str, Any], counts: dict[str, int]) -> bool:
    """Whether the classes are called uneven."""
    looking = labels.Labels(**given)
    for name, count in counts.items():
        for line in range(count):
            looking.add(name, origin=Origin("rows", line + 1))
    return any(problem.kind == "imbalance" for problem in looking.finish())


def drift_cases(folder: Path) -> Iterator[Case]:
    """Draws without and with rows of the domain `travel`, and what the classifier says of them."""
    from tunesmith.data.curate.two_samples import tell_apart, vectors_of

    domain = set(json.loads((folder / "clinc150" / "domains.json").read_text("utf-8"))["travel"])
    rows = [json.loads(line) for line in (folder / "clinc150" / "train.jsonl").read_text("utf-8").split("\n") if line]
    others, foreign = ([row["text"] for row in rows if (row["label"] in domain) is side] for side in (False, True))
    random, is_second_N = np.random.default_rng(0), np.arange(2 * DRIFT_ROWS) >= DRIFT_ROWS
    for (share, grade), _ in itertools.product(SHARES.items(), range(DRIFT_DRAWS)):
        texts = random.choice(others, 2 * DRIFT_ROWS, replace=False).tolist()
        number = round(share * DRIFT_ROWS)
        texts[len(texts) - number :] = random.choice(foreign, number).tolist()
        apart, _ = tell_apart(texts, vectors_of(texts), is_second_N=is_second_N)
        yield Case(grade, share > 0.05, apart)


def tally_cases(sweep: Sweep, value: float, cases: list[Case]) -> dict[str, Tally]:
    """By grade, the cases that are told of."""
    tallies: dict[str, Tally] = {}
    for case in cases:
        if sweep.check == "drift":
            told = case.given.found and case.given.auc >= value
        else:
            told = told_of_labels({sweep.setting: value}, case.given)
        counted = tallies.setdefault(case.grade, Tally())
        counted.rows += 1
        counted.planted += case.defect
        counted.found += told
        counted.right += told and case.defect
    return tallies


# --------------------------------------------------------------------------------------------------- the report


def measure(check: str, *, folder: Path, embed: Embed | None) -> Iterator[dict[str, Any]]:
    """Every value of every setting of a check."""
    cases: list[Case] = []
    if check in ("labels", "drift"):
        cases = list(label_cases(folder) if check == "labels" else drift_cases(folder))
    planted = [] if cases else list(planted_for(check, folder=folder))
    clean = [] if check == "drift" else list(clean_for(check, folder=folder))
    for sweep in (sweep for sweep in SWEEPS if sweep.check == check):
        for value in sorted({sweep.default, *sweep.others}):
            started, given = time.process_time(), {sweep.setting: value}
            chosen = [corpus for corpus in planted if corpus.name.startswith(tuple(sweep.grades.split(" ")))]
            grades = {c.name: tally(check, given, corpus=c, embed=embed) for c in chosen}
            if cases:
                grades = tally_cases(sweep, value, [case for case in cases if case.grade.startswith(sweep.grades)])
            sets = {c.name: tally(check, given, corpus=c, embed=embed) for c in clean}
            found, right, all_planted = (
                sum(asdict(counted)[name] for counted in grades.values()) for name in ("found", "right", "planted")
            )
            yield {
                "check": check,
                "setting": sweep.setting,
                "value": value,
                "default": value == sweep.default,
                "precision": round(right / found, 4) if found else None,
                "recall": round(right / all_planted, 4) if all_planted else None,
                "grades": {name: _shown(counted) for name, counted in grades.items()},
                "clean": {name: _shown(counted) for name, counted in sets.items()},
                "seconds": round(time.process_time() - started, 2),
            }


def _shown(counted: Tally) -> dict[str, int]:
    return {name: number for name, number in asdict(counted).items() if number is not None}


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table; defaults in bold."""
    lines = ["| check | setting | value | precision | recall | told of in clean rows |", "|---|---|---:|---:|---:|---|"]
    for result in results:
        precision, recall = ("-" if result[k] is None else f"{result[k]:.2f}" for k in ("precision", "recall"))
        value = f"**{result['value']:g}**" if result["default"] else f"{result['value']:g}"
        clean = []
        for name, counted in result["clean"].items():
            other = f" ({counted['other_class']} of another class)" if "other_class" in counted else ""
            clean.append(f"{name} {counted['found']:,} of {counted['rows']:,}{other}")
        lines.append(
            f"| `{result['check']}` | `{result['setting']}` | {value} | {precision} | {recall} | {'; '.join(clean)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, or print what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="the published sets")
    parser.add_argument("--embedder", help="an encoder, for rows that say the same in other words")
    parser.add_argument("--only", choices=CHECKS, help="one check; the others' results stay")
    parser.add_argument("--table", action="store_true", help="print the results that are there")
    options = parser.parse_args()
    there = json.loads(RESULT.read_text("utf-8"))["results"] if RESULT.is_file() else []
    if options.table:
        print(table(there))
        return
    chosen = [options.only] if options.only else [name for name in CHECKS if name != "semantic" or options.embedder]
    embed = Remembered(load_embedder(options.embedder)) if options.embedder and "semantic" in chosen else None
    results = {name: [result for result in there if result["check"] == name] for name in CHECKS}
    for check in chosen:
        results[check] = []
        for result in measure(check, folder=options.data, embed=embed):
            results[check].append(result)
            print(json.dumps(result), file=sys.stderr, flush=True)
    typed = command().replace(options.embedder, "ENCODER") if options.embedder else command()
    document: dict[str, Any] = {"command": typed, "date": time.strftime("%Y-%m-%d"), "code": code()}
    document["machine"] = machine()
    document["machine"]["versions"] |= versions(("scikit-learn", "py3langid"))
    document["results"] = [result for name in CHECKS for result in results[name]]
    RESULT.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    print(table(document["results"]))


if __name__ == "__main__":
    main()
