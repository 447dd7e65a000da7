"""How often is the passage that answers a question among those that are looked up, by words and by meaning?

    python benchmarks/look_up.py --embedder FOLDER        # an encoder, for example all-MiniLM-L6-v2

Two sets of 200 passages with one question for each that was planted. `paraphrased`: answers written by hand among answers
of Alpaca, asked for in other words than those of the answer. `titles`: abstracts of PubMedQA, asked for by the question of
their title, which uses their words.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _machine import code, command, machine
from planted.paraphrases import PARAPHRASES

ROOT = Path(__file__).resolve().parent.parent
NUM_PASSAGES = 200
COUNTS = (1, 4)
PASSAGE_CHARACTERS = 800


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def sets_of(data: Path) -> dict[str, tuple[list[str], list[str]]]:
    """By name: questions, and passages of which the first ones answer them, in their order."""
    asked = [question for _, (question, _) in PARAPHRASES]
    answers = [answer for (_, answer), _ in PARAPHRASES]
    others = [row["output"] for row in read(data / "alpaca" / "train.jsonl") if len(row["output"]) > 40]
    titled = read(data / "pubmedqa" / "train.jsonl")[:NUM_PASSAGES]
    return {
        "paraphrased": (asked, [text[:PASSAGE_CHARACTERS] for text in [*answers, *others]][:NUM_PASSAGES]),
        "titles": (
            [row["question"] for row in titled],
            ["\n".join(row["contexts"])[:PASSAGE_CHARACTERS] for row in titled],
        ),
    }


def main() -> int:
    """Look up, write the report and print the table."""
    from tunesmith.data.retrieval import Bm25, Embedded
    from tunesmith.models.embed import load_embedder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embedder", required=True, help="a folder or a hub name")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "look_up.json")
    arguments = parser.parse_args()
    report: dict[str, Any] = {"command": command(), "date": time.strftime("%Y-%m-%d"), "code": code()}
    report |= {"machine": machine(), "passages": NUM_PASSAGES, "recall": {}}
    embed = load_embedder(arguments.embedder)
    print("| questions | looked up by | " + " | ".join(f"among the first {count}" for count in COUNTS) + " |")
    print("|---|---|" + "---:|" * len(COUNTS))
    for name, (questions, passages) in sets_of(arguments.data).items():
        for by, index in (("bm25", Bm25(passages)), ("embeddings", Embedded(passages, embed=embed))):
            found = [index.nearest(question, count=max(COUNTS)) for question in questions]
            recall = {
                str(count): sum(place in first[:count] for place, first in enumerate(found)) / len(questions)
                for count in COUNTS
            }
            report["recall"].setdefault(name, {"questions": len(questions)})[by] = recall
            print(f"| {name} ({len(questions)}) | {by} | " + " | ".join(f"{x:.1%}" for x in recall.values()) + " |")
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
