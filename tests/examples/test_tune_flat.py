"""The flat script and the loop compute the same thing: the script is the oracle, row by row, for packs and steps."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokens import TokenStore, TokenWriter
from tunesmith.data.types import Example, Message, Origin
from tunesmith.methods.lora import Lora
from tunesmith.models.load import Model, load_model
from tunesmith.objectives.instruction import Instruction
from tunesmith.train.loop import Fit
from tunesmith.train.settings import TrainSettings

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "tune_flat.py"
BATCH_ROWS, EPOCHS, RANK, RATE, SEED = 3, 2, 4, 2e-3, 3
SYSTEM = {"role": "system", "content": "Answer in one word."}


def chat(*turns: str, system: bool = False) -> dict[str, Any]:
    """A conversation of alternating user and assistant turns."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return {"messages": [SYSTEM, *messages] if system else messages}


ROWS = [
    chat("Where is Oslo?", "Norway", system=True),
    chat("Where is Lima?", "Peru", system=True),
    chat("2+2", "4", "and one more", "5"),
    chat("Say a word that is long.", "incomprehensibility"),
    chat("Where is Rome?", "Italy", "And Milan?", "Also Italy", system=True),
    chat("ü?", "ß"),
    chat("Hi", "Hi"),
]


@pytest.fixture
def base(build_model: Any, tmp_path: Path) -> Path:
    """A toy model's folder, which transformers and tunesmith both load."""
    folder = tmp_path / "base"
    folder.mkdir()
    build_model("llama", dtype=torch.float32).save(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), "utf-8")
    return path


class Records:
    """Keeps what the loop says after each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def start(self, *, num_steps: int, step: int) -> None:
        self.num_steps = num_steps

    def step(self, record: dict[str, Any]) -> None:
        self.steps.append(record)

    def validation(self, record: dict[str, Any]) -> None:
        raise AssertionError("there is no validation")

    def message(self, text: str) -> None:
        raise AssertionError(text)


def run_script(base: Path, data: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Run the flat script as a user would; its losses."""
    options = {"model": base, "data": data, "out": out, "epochs": EPOCHS, "batch-rows": BATCH_ROWS, "rank": RANK}
    options |= {"learning-rate": RATE, "seed": SEED}
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *(f"--{name}={value}" for name, value in options.items())])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return [json.loads(line) for line in (out / "losses.jsonl").read_text("utf-8").splitlines()]


def tokenised(model: Model, folder: Path) -> TokenStore:
    """ROWS as the objective trains them."""
    examples = [
        Example(Origin("chats.jsonl", line), "chat", tuple(Message(**message) for message in row["messages"]))
        for line, row in enumerate(ROWS, start=1)
    ]
    writer = TokenWriter(folder)
    sequences = Instruction().sequences(examples, template=ChatTemplate(model.tokenizer), max_tokens=1024)
    for example, unit in zip(examples, sequences, strict=True):
        writer.add(unit, origin=example.origin)
    writer.close()
    return TokenStore(folder)


@pytest.mark.parametrize("micro_batch_tokens", [4096, 70])  # one pack a step, and a few
def test_loop_equals_flat_script(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch_tokens: int
) -> None:
    expected = run_script(base, data, tmp_path / "flat", monkeypatch)

    model, method, records = load_model(str(base)), Lora(rank=RANK), Records()
    method.apply(model, seed=SEED)
    fit = Fit(
        model,
        method=method,
        objective=Instruction(),
        train=tokenised(model, tmp_path / "tokens"),
        validation=None,
        settings=TrainSettings(
            epochs=EPOCHS,
            batch_rows=BATCH_ROWS,
            learning_rate=RATE,
            seed=SEED,
            micro_batch_tokens=micro_batch_tokens,
            device="cpu",
        ),
        folder=tmp_path / "run",
        observer=records,
    )
    progress = fit.run().progress
    (tmp_path / "ours").mkdir()
    method.save(model, folder=tmp_path / "ours")

    assert records.num_steps == len(expected) == len(records.steps) == 6
    assert progress.computed_tokens < progress.tokens or micro_batch_tokens < 4096  # the shared system prompt, once
    for ours, flat in zip(records.steps, expected, strict=True):
        assert ours["loss"] == pytest.approx(flat["loss"], rel=1e-5), f"step {flat['step']}"
        assert ours["learning_rate"] == pytest.approx(flat["learning_rate"], rel=1e-12)
    assert expected[-1]["loss"] < expected[0]["loss"] - 0.01  # it did learn something
    adapter, flat_adapter = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "flat"))
    assert adapter.keys() == flat_adapter.keys()
    for name, tensor in adapter.items():
        if name.endswith("lora_B.weight"):  # starts at zero
            assert flat_adapter[name].abs().max() > 1e-3, f"{name} did not move"
        torch.testing.assert_close(
            tensor, flat_adapter[name], rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_flat_script_is_flat() -> None:
    """It stays what it is for: short, and free of the loop it is compared with."""
    text = SCRIPT.read_text("utf-8")
    assert len(text.splitlines()) <= 200
    assert "import tunesmith" not in text
    assert "from tunesmith" not in text
