"""What is killed: four kinds of run on a tiny base, and what must be left when each has been gone on with to its end."""

import hashlib
import json
import shutil
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from faults.server import Ended, Server
from tunesmith.train import checkpoint

CASES: dict[str, dict[str, Any]] = {
    "instruction-lora": {"objective": "instruction", "method": {"kind": "lora", "rank": 2, "dropout": 0.1}},
    "instruction-full": {"objective": "instruction", "method": "full"},
    "instruction-qlora": {"objective": "instruction", "method": {"kind": "qlora", "rank": 2, "dropout": 0.1}},
    "classification-lora": {"objective": "classification", "method": {"kind": "lora", "rank": 2, "dropout": 0.1}},
}
TRAIN = {
    "max_steps": 3, "batch_rows": 4, "micro_batch_tokens": 60, "learning_rate": 2e-2, "checkpoint_every": 1,
    "validate_every": 1, "device": "cpu",
}  # fmt: skip
NUM_ROWS = 12
WORKSPACE = "workspace"
MOMENTS = ("time", "created", "seconds", "tokens_per_second", "peak_memory_bytes", "run", "path", "command")


def make_project(folder: Path) -> None:
    """A base of two small blocks with a byte tokenizer, rows, and a recipe a case."""
    from conftest import CHAT_TEMPLATE, COMMON, SPECIAL, byte_backend

    from tunesmith.models.load import NewBase, load_model

    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True)
    byte_backend(SPECIAL).save(str(tokenizer / "tokenizer.json"))
    names = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | names
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    (tokenizer / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | COMMON), "utf-8")
    base = load_model(NewBase(config=str(folder / "config.json"), tokenizer=str(tokenizer), seed=5))
    base.save(folder / "base")
    colours = ("red", "green")
    chats = [{"prompt": f"colour of {i}?", "completion": colours[i % 2]} for i in range(NUM_ROWS)]
    classes = [{"text": f"colour of {i}?", "label": colours[i % 2]} for i in range(NUM_ROWS)]
    for name, rows in {"instruction": chats, "classification": classes}.items():
        for side, some in (("train", rows[:-4]), ("validation", rows[-4:])):
            (folder / f"{name}-{side}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some), "utf-8")
    for name, case in CASES.items():
        files = {side: f"{case['objective']}-{side}.jsonl" for side in ("train", "validation")}
        recipe = {"name": name, "base": "base", "data": files, "train": TRAIN} | case
        (folder / f"{name}.yaml").write_text(json.dumps(recipe), "utf-8")  # JSON is YAML
    assert torch.get_num_threads() == 1


@dataclass(frozen=True)
class Left:
    """What a finished run leaves: all that a clock does not decide."""

    model: dict[str, str]  # file -> SHA-256
    checkpoints: dict[str, str]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]


def train(server: Server, name: str, *, folder: Path, resume: bool = False, **given: Any) -> Ended:
    """`tunesmith train`."""
    arguments = ["train", f"{name}.yaml", "--workspace", WORKSPACE, "--json", *(["--resume"] if resume else [])]
    return server.run(arguments, folder=folder, **given)


def go_on(server: Server, name: str, *, folder: Path, tries: int = 3) -> Ended:
    """Resume until the run is finished; begin where a kill came before there was a run to resume, or after its end."""
    for _ in range(tries):
        ended = train(server, name, folder=folder, resume=True)
        if ended.status == 2 and "there is no unfinished run" in ended.err:
            if runs(folder):
                return ended  # it was finished
            ended = train(server, name, folder=folder)
        if ended.status == 0:
            return ended
    raise AssertionError(f"the run cannot be gone on with: status {ended.status}\n{ended.err}")


def runs(folder: Path) -> list[Path]:
    """Folders of runs, whole or not."""
    return sorted((folder / WORKSPACE / "runs").glob("[!.]*"))


def left(folder: Path) -> Left:
    """What the one run of a folder left. AssertionError where there is another, a temporary file, or no entry of its end."""
    (run,) = runs(folder)
    odd = [p for p in (folder / WORKSPACE).rglob(".*") if p.name != ".gitignore"]
    assert not odd, f"stays behind: {odd}"
    assert not list((run / "checkpoints").glob("*/.*"))
    with sqlite3.connect(folder / WORKSPACE / "index.sqlite") as connection:
        (entry,) = connection.execute("SELECT name, state, model_digest IS NOT NULL FROM runs").fetchall()
    connection.close()
    assert entry == (run.name, "finished", 1), entry
    summary = json.loads((run / "run.json").read_text("utf-8"))
    assert summary["state"] == "finished", summary
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return Left(
        _hashes(run / "model"),
        {name: digest for name, digest in _hashes(run / "checkpoints").items() if name.endswith(".safetensors")},
        [{k: v for k, v in line.items() if k not in MOMENTS} for line in lines],
        {k: v for k, v in summary.items() if k not in MOMENTS},
    )


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def counted(server: Server, name: str, *, folder: Path) -> tuple[Left, list[str]]:
    """What an uninterrupted run leaves, and the names of the boundaries that it passed, in order."""
    log = folder / "boundaries"
    log.unlink(missing_ok=True)
    clear(folder)
    ended = train(server, name, folder=folder, fault=fault_at(None, folder=folder, log=str(log)))
    assert ended.status == 0, ended.err
    return left(folder), log.read_text("utf-8").split()


def fault_at(boundary: int | None, *, folder: Path, kind: str | None = None, **more: Any) -> dict[str, Any]:
    """A fault at a boundary in the workspace, counted from 1."""
    return {"folder": str(folder / WORKSPACE), "at": boundary, "kind": kind} | more


def survived(
    server: Server,
    name: str,
    *,
    folder: Path,
    expected: Left,
    statuses: tuple[int, ...],
    fault: dict[str, Any] | None = None,
    kill_after: float | None = None,
    largest_file_bytes: int | None = None,
) -> Ended:
    """A run that something befalls ends with one of `statuses`, and comes to the same end when it is gone on with."""
    clear(folder)
    ended = train(
        server, name, folder=folder, fault=fault, kill_after=kill_after, largest_file_bytes=largest_file_bytes
    )
    assert ended.status in statuses, f"status {ended.status}\n{ended.err}"
    lines = ended.err.splitlines()
    if ended.status == 2:
        assert [line.partition(": ")[0] for line in lines[-2:]] == ["error", "hint"], ended.err
    if ended.status > 128:
        assert lines[-1].startswith("hint: "), ended.err
    if ended.status != 0:
        check_checkpoints(folder)
        go_on(server, name, folder=folder)
    found = left(folder)
    for part in ("model", "checkpoints", "metrics", "summary"):
        assert getattr(found, part) == getattr(expected, part), f"other {part} than without interruption"
    return ended


def check_checkpoints(folder: Path) -> None:
    """Of what looks like a checkpoint, all verify but one that is being removed."""
    for run in runs(folder):
        found = checkpoint.steps(run / "checkpoints")
        for path in found[: checkpoint.KEEP]:
            checkpoint.verify(path)


def clear(folder: Path) -> None:
    """No run yet."""
    shutil.rmtree(folder / WORKSPACE, ignore_errors=True)
