"""What the checks of rows find of defects that were planted: precision and recall by check and grade.

    python benchmarks/planted_defects.py
    python benchmarks/planted_defects.py --data FOLDER     # and in published sets: FOLDER/alpaca/train.jsonl, ...
    python benchmarks/planted_defects.py --table

A corpus is checked in a process of its own. `found` counts the rows that the check tells of, whatever it says of them;
`seconds` are of the processor, the loading of libraries among them, and `peak_memory_bytes` is of the whole process.
The result goes to results/planted_defects.json.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from _machine import code, command, machine, versions
from planted import Planted, quality

from tunesmith.data.curate.base import Check
from tunesmith.data.curate.label_errors import LabelErrors
from tunesmith.data.curate.language import Language
from tunesmith.data.curate.quality import Quality
from tunesmith.data.formats import examine
from tunesmith.data.settings import DataSettings
from tunesmith.data.types import Example, Origin, Row

RESULT = Path(__file__).resolve().parent / "results" / "planted_defects.json"


@dataclass(frozen=True)
class Suite:
    """A module's corpora, generated and from published sets, and how its checks are made, by name."""

    planted: Callable[[np.random.Generator], Iterator[Planted]]
    checks: dict[str, Callable[[], Check]]
    real: Callable[..., Iterator[Planted]] | None = None  # (random, *, folder)


SUITES = (
    Suite(quality.planted, {"quality": Quality, "language": Language, "label_errors": LabelErrors}, real=quality.real),
)


def measure(corpus: Planted, *, make_check: Callable[[], Check]) -> dict[str, Any]:
    """Check a corpus: what is found of what was planted."""
    mapping = {"text": "text", "label": "label"} if "label" in corpus.rows[0] else {}
    settings = DataSettings(train="planted", mapping=mapping)
    started, check, lines = time.process_time(), make_check(), set()
    for line, value in enumerate(corpus.rows, start=1):
        example = examine(Row(Origin("planted", line), value), settings=settings)
        assert isinstance(example, Example), example
        lines |= {problem.line for problem in check.look(example)}
    lines |= {problem.line for problem in check.finish()}
    seconds = time.process_time() - started
    right = len(lines & corpus.expected)
    return {
        "check": corpus.check,
        "grade": corpus.grade,
        "rows": len(corpus.rows),
        "planted": len(corpus.expected),
        "found": len(lines),
        "precision": round(right / len(lines), 4) if lines else None,
        "recall": round(right / len(corpus.expected), 4),
        "seconds": round(seconds, 3),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
    }


def corpora(folder: Path | None, *, seed: int) -> Iterator[tuple[Planted, Callable[[], Check]]]:
    """Every corpus with how its check is made."""
    for suite in SUITES:
        sources = [suite.planted(np.random.default_rng(seed))]
        if folder is not None and suite.real is not None:
            sources.append(suite.real(np.random.default_rng(seed), folder=folder))
        for source in sources:
            for corpus in source:
                yield corpus, suite.checks[corpus.check]


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = ["| check | grade | rows | planted | found | precision | recall |", "|---|---|---:|---:|---:|---:|---:|"]
    for result in results:
        precision = "" if result["precision"] is None else f"{result['precision']:.2f}"
        lines.append(
            "| {check} | {grade} | {rows:,} | {planted} | {found} | {0} | {recall:.2f} |".format(precision, **result)
        )
    return "\n".join(lines)


def main() -> None:
    """Run all corpora, or print what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with the published sets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="print the results that are there")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(RESULT.read_text("utf-8"))["results"]))
        return
    context = multiprocessing.get_context("spawn")
    results = []
    with ProcessPoolExecutor(max_workers=1, mp_context=context, max_tasks_per_child=1) as pool:
        for corpus, make_check in corpora(options.data, seed=options.seed):
            results.append(pool.submit(measure, corpus, make_check=make_check).result())
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    document: dict[str, Any] = {"command": command(), "seed": options.seed, "code": code(), "machine": machine()}
    document["machine"]["versions"] |= versions(("scikit-learn", "py3langid"))
    document["results"] = results
    RESULT.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
