"""Real tasks that several measurements share: recipes without their base, and the files they need below one folder."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TASKS: dict[str, dict[str, Any]] = {
    "rnnlg_laptop": {
        "data": {
            "train": "rnnlg_laptop/train.jsonl",
            "validation": 0.03,
            "test": "rnnlg_laptop/test.jsonl",
            "mapping": {"prompt": "mr", "completion": "text"},
            "duplicates": "drop",
        },
        "evaluate": {"metrics": ["chrf", "bleu", "perplexity"], "max_tokens": 64},
    },
    "geoquery": {
        "data": {
            "train": "text2sql/geoquery/train.jsonl",
            "validation": "text2sql/geoquery/validation.jsonl",
            "test": "text2sql/geoquery/test.jsonl",
            "mapping": {"prompt": "question", "completion": "sql"},
        },
        "evaluate": {"metrics": ["token_f1", "exact_match", "perplexity"], "max_tokens": 96},
    },
    "trec": {
        "data": {
            "train": "trec/train.jsonl",
            "validation": 0.05,
            "test": "trec/test.jsonl",
            "mapping": {"prompt": "text", "completion": "coarse"},
            "duplicates": "drop",
        },
        "evaluate": {"metrics": ["exact_match", "perplexity"], "max_tokens": 8},
    },
}
FILES = ("train", "validation", "test")


def task(name: str, *, folder: Path) -> dict[str, Any]:
    """A recipe's `data` and `evaluate` sections, with the files below `folder`."""
    found = TASKS[name]
    data = {k: str(folder / v) if k in FILES and isinstance(v, str) else v for k, v in found["data"].items()}
    return {"data": data, "evaluate": dict(found["evaluate"])}


def in_its_own_process(script: str, *options: str, role: Any) -> dict[str, Any]:
    """What a measurement prints as its last line when it is called for one `role`, with one thread."""
    line = [sys.executable, script, *options, "--role", json.dumps(role)]
    done = subprocess.run(
        line, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
