"""What the checks of rows find of defects that were planted: precision and recall by check and grade.

    python benchmarks/planted_defects.py
    python benchmarks/planted_defects.py --data FOLDER     # and in published sets: FOLDER/alpaca/train.jsonl, ...
    python benchmarks/planted_defects.py --embedder ENCODER
    python benchmarks/planted_defects.py --names TAGGER    # one is made by planted/tagger_rows.py
    python benchmarks/planted_defects.py --base starter
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
import tempfile
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
from planted import Planted, duplicates, marks, names, overlap, personal, quality

from tunesmith.data.curate.checks import Models, choose
from tunesmith.data.curate.difficulty import Scorer
from tunesmith.data.formats import examine
from tunesmith.data.settings import DataSettings
from tunesmith.data.types import Example, Origin, Row
from tunesmith.evaluate.difficulty import scorer
from tunesmith.models.base import template_for
from tunesmith.models.embed import load_embedder
from tunesmith.models.load import load_model
from tunesmith.models.names import load_names

RESULT = Path(__file__).resolve().parent / "results" / "planted_defects.json"


@dataclass(frozen=True)
class Suite:
    """A module's corpora, generated and from published sets."""

    planted: Callable[[np.random.Generator], Iterator[Planted]]
    real: Callable[..., Iterator[Planted]] | None = None  # (random, *, folder)


SUITES = (
    Suite(duplicates.planted),
    Suite(overlap.planted),
    Suite(personal.planted),
    Suite(names.planted),
    Suite(marks.planted),
    Suite(quality.planted, real=quality.real),
)


def model_for(corpus: Planted) -> str | None:
    """The option that names the model that the check needs for this corpus; None where it needs none."""
    return (
        "names"
        if corpus.grade.startswith("names")
        else {"semantic": "embedder", "difficulty": "base"}.get(corpus.check)
    )


def load(option: str | None, name: str) -> Models:
    """What the check needs of the model of an option."""
    if option == "embedder":
        return Models(embed=load_embedder(name))
    if option == "names":
        return Models(names=load_names(name))
    if option == "base":
        model = load_model(name)
        template = template_for(model.tokenizer, config=model.causal.config.to_dict())
        return Models(scorer=Scorer(scorer(model, template=template)))
    return Models()


def measure(corpus: Planted, *, model: str) -> dict[str, Any]:
    """Check a corpus: what is found of what was planted. model: the one that the check needs, if it does."""
    mapping = {"text": "text", "label": "label"} if "label" in corpus.rows[0] else {}
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in corpus.files.items():
            (Path(folder) / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        files = [str(Path(folder) / name) for name in corpus.files]
        given: dict[str, Any] = {"benchmarks": files} if corpus.check == "contamination" else {}
        given |= {"protected": folder} if corpus.check == "protected" and files else {}
        settings = DataSettings(train="planted", mapping=mapping, **given)
        models = load(model_for(corpus), model)
        started = time.process_time()
        lines = _found(corpus, settings=settings, models=models)
    seconds = time.process_time() - started
    right = len(lines & corpus.expected)
    return {
        "check": corpus.check,
        "grade": corpus.grade,
        "rows": len(corpus.rows),
        "planted": len(corpus.expected),
        "found": len(lines),
        "precision": round(right / len(lines), 4) if lines else None,
        "recall": round(right / len(corpus.expected), 4) if corpus.expected else None,
        "seconds": round(seconds, 3),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
    }


def _found(corpus: Planted, *, settings: DataSettings, models: Models) -> set[int]:
    """The lines that the check tells of."""
    examples = []
    for line, value in enumerate(corpus.rows, start=1):
        example = examine(Row(Origin("planted", line), value), settings=settings)
        assert isinstance(example, Example), example
        examples.append(example)
    chosen = choose(settings, again=lambda: examples, only=(corpus.check,), models=models)
    check, lines = chosen.checks[corpus.check], set()
    for example in examples:
        lines |= {problem.line for problem in check.look(example)}
    return lines | {problem.line for problem in check.finish() if problem.file == "planted"}


def corpora(folder: Path | None, *, seed: int) -> Iterator[Planted]:
    """Every corpus, of published sets where there is a folder of them."""
    for suite in SUITES:
        yield from suite.planted(np.random.default_rng(seed))
        if folder is not None and suite.real is not None:
            yield from suite.real(np.random.default_rng(seed), folder=folder)


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = ["| check | grade | rows | planted | found | precision | recall |", "|---|---|---:|---:|---:|---:|---:|"]
    for result in results:
        precision, recall = ("" if result[k] is None else f"{result[k]:.2f}" for k in ("precision", "recall"))
        lines.append(
            "| {check} | {grade} | {rows:,} | {planted} | {found} | {0} | {1} |".format(
                precision, recall, **{key: result[key] for key in ("check", "grade", "rows", "planted", "found")}
            )
        )
    return "\n".join(lines)


def main() -> None:
    """Run all corpora, or print what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with the published sets")
    parser.add_argument("--embedder", help="an encoder, for rows that say the same in other words")
    parser.add_argument("--names", help="a model that tags persons, for names among the personal data")
    parser.add_argument("--base", help="a language model, for answers that stand behind another's question")
    parser.add_argument("--only", help="one check; the results of the others stay as they are")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="print the results that are there")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(RESULT.read_text("utf-8"))["results"]))
        return
    context = multiprocessing.get_context("spawn")
    before = json.loads(RESULT.read_text("utf-8"))["results"] if options.only else []
    results = [result for result in before if result["check"] != options.only]
    with ProcessPoolExecutor(max_workers=1, mp_context=context, max_tasks_per_child=1) as pool:
        for corpus in corpora(options.data, seed=options.seed):
            option = model_for(corpus)
            model = "" if option is None else getattr(options, option)
            if model is None or options.only not in (None, corpus.check):
                continue
            results.append(pool.submit(measure, corpus, model=model).result())
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    document: dict[str, Any] = {"command": command(), "seed": options.seed, "code": code(), "machine": machine()}
    document["machine"]["versions"] |= versions(("scikit-learn", "py3langid"))
    document["results"] = results
    RESULT.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
