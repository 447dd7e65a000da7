"""The same run here, in TRL's SFTTrainer with PEFT and in a loop written by hand, one process after the other in turn.

Same weights, same starting adapter, same rows in the same order, same rows per optimiser step, AdamW, learning rate and
precision. Measured: the rows' own tokens per second of training (the first step is left out on all sides; loading and
tokenising are not counted), the peak resident memory of the whole process, and the losses, which must agree.

    python benchmarks/against_trl.py --model smollm2-135m --scenario varied --threads 2 --repeats 3

TRL is run in several variants (see VARIANTS), from its defaults to what an expert could set; `flat` is a loop written by
hand over transformers and PEFT. The ratios against each are reported, which of them was the fastest, and against which of
them each bar is reached. In the same turn a process multiplies bare matrices of the model's shapes, and `matrix_share` is
what part of that rate our training reaches.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _machine import code, command, machine

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "recipes" / "starter" / "tokenizer"
SEED, RANK, LEARNING_RATE, WEIGHT_DECAY, CLIP, BETAS = 0, 16, 2e-4, 0.01, 1.0, (0.9, 0.99)
MAX_TOKENS = 1024
LOSS_TOLERANCE = 1e-3  # relative, at the first step
LLAMA = {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True}
MODELS: dict[str, dict[str, Any]] = {
    "starter": json.loads((ROOT / "recipes" / "starter" / "config.json").read_text("utf-8")),
    "llama-30m": LLAMA
    | {
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 9,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
    },
    "smollm2-135m": LLAMA
    | {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
    },
}


@dataclass(frozen=True)
class Scenario:
    """What the rows look like: lengths in tokens, and how many rows make an optimiser step."""

    describe: str
    batch_rows: int
    bars: dict[str, float]  # what a run must reach: tokens_per_second at least, peak_memory at most (ours / TRL's)


SCENARIOS = {
    "varied": Scenario(
        "chat rows of log-normal length (median 150, sigma 0.8, from 20 to 1000 tokens); the answer is a fifth to four "
        "fifths of the row; only the answer is trained",
        batch_rows=16,
        bars={"tokens_per_second": 5.0, "peak_memory": 0.4},
    ),
    "shared": Scenario(
        "chat rows of 30 to 60 tokens under one system prompt of 700 tokens; only the answer is trained",
        batch_rows=32,
        bars={"tokens_per_second": 20.0},
    ),
    "pairs": Scenario(
        "pairs of rows with one prompt of 100 to 300 tokens and answers of 30 to 90; only the answer is trained",
        batch_rows=16,
        bars={},
    ),
    "documents": Scenario("one long document a row, of 900 to 1000 tokens, all of it trained", batch_rows=8, bars={}),
}
METHODS = ("lora", "full", "qlora", "prefix")
PREFIX_TOKENS = 20

# What differs from TRL's defaults. `micro_rows` rows go through the model at a time and gradients are added up to
# `batch_rows`; where it is missing, --trl-rows do (8, TRL's default); None: rows are packed to MAX_TOKENS, one at a time.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"gradient_checkpointing": True},
    "padded": {},
    "grouped": {"train_sampling_strategy": "group_by_length"},
    "one_row": {"micro_rows": 1},
    "padding_free": {"padding_free": True, "max_length": None},
    "packed": {"micro_rows": None, "packing": True},
}
FLAT, FLAT_ROWS = "flat", 8  # rows go through the model at a time, of similar lengths
SAME_ORDER = {"default", "padded", "one_row", "padding_free", FLAT}  # so every step has our rows


# --- what both sides are given -------------------------------------------------------------------------------------


def make_rows(scenario: str, *, num_rows: int) -> list[dict[str, Any]]:
    """Chat rows of random words with the scenario's lengths, the same for the same seed."""
    import numpy as np
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    pieces = (backend.decode([i]) for i in range(backend.get_vocab_size()))
    words = [
        p[1:] for p in pieces if p[:1] == " " and p[1:].isascii() and p[1:].isalpha()
    ]  # a token each, after a space
    random = np.random.default_rng(SEED)

    def text(num_tokens: float) -> str:
        return " ".join(random.choice(words, size=max(1, int(num_tokens))))

    rows = []
    instructions, asked = text(700), ""
    for _ in range(num_rows):
        if scenario == "varied":
            length = float(np.clip(random.lognormal(math.log(150), 0.8), 20, 1000)) - 7  # what the template adds
            answer = random.uniform(0.2, 0.8) * length
            messages = [("user", text(length - answer)), ("assistant", text(answer))]
        elif scenario == "pairs":
            if len(rows) % 2 == 0:
                asked = text(random.uniform(100, 300))
            messages = [("user", asked), ("assistant", text(random.uniform(30, 90)))]
        elif scenario == "documents":
            messages = [("user", text(1)), ("assistant", text(random.uniform(900, 1000)))]
        else:
            length = random.uniform(30, 60) - 6
            answer = random.uniform(0.2, 0.8) * length
            messages = [("system", instructions), ("user", text(length - answer)), ("assistant", text(answer))]
        rows.append({"messages": [{"role": role, "content": content} for role, content in messages]})
    return rows


def our_method(name: str) -> Any:
    """What is tuned on our side."""
    from tunesmith.methods.full import Full
    from tunesmith.methods.lora import Lora
    from tunesmith.methods.prefix import Prefix

    if name in ("full", "prefix"):
        return Full() if name == "full" else Prefix(num_tokens=PREFIX_TOKENS)
    return Lora(rank=RANK, quantise="nf4" if name == "qlora" else None)


def prepare(folder: Path, *, model: str, scenario: str, method: str, batch_rows: int, steps: int) -> None:
    """Write base model, starting adapter and rows; `in_order.jsonl` holds the rows as our loop will visit them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tunesmith.models.load import load_model
    from tunesmith.train.loop import epoch_order

    torch.manual_seed(SEED)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS[model]), dtype=torch.float32)
    base.save_pretrained(folder / "model")
    for path in TOKENIZER.iterdir():
        (folder / "model" / path.name).write_bytes(path.read_bytes())
    loaded, tuned = load_model(str(folder / "model")), our_method("lora" if method == "qlora" else method)
    tuned.apply(loaded, seed=SEED)
    (folder / "adapter").mkdir()
    if method != "full":
        tuned.save(loaded, folder=folder / "adapter")
    rows = make_rows(scenario, num_rows=batch_rows * steps)
    order = epoch_order(len(rows), seed=SEED, epoch=0)
    for name, ordered in (("rows", rows), ("in_order", [rows[i] for i in order])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ordered), "utf-8")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


class Clock:
    """Wall and processor time, total tokens and loss at the end of every optimiser step."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.processor: list[float] = []
        self.tokens: list[int] = []
        self.losses: list[float] = []

    def step_ended(self) -> None:
        """Called at the end of an optimiser step."""
        self.wall.append(time.perf_counter())
        self.processor.append(time.process_time())

    def told(self, *, tokens: int, loss: float) -> None:
        """Tokens trained since the beginning, and the step's loss."""
        self.tokens.append(int(tokens))
        self.losses.append(float(loss))

    def result(self, **more: Any) -> dict[str, Any]:
        """The measurement, from the end of the first step to the end of the last."""
        tokens, seconds = self.tokens[-1] - self.tokens[0], self.wall[-1] - self.wall[0]
        processor_seconds = self.processor[-1] - self.processor[0]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {
            "tokens": tokens,
            "all_tokens": self.tokens[-1],
            "seconds": seconds,
            "processor_seconds": processor_seconds,
            "tokens_per_second": tokens / seconds,
            "tokens_per_processor_second": tokens / processor_seconds,
            "peak_memory_bytes": peak,
            "losses": self.losses,
            **more,
        }


# --- the two sides -------------------------------------------------------------------------------------------------


def run_ours(
    folder: Path, *, method: str, precision: str, batch_rows: int, steps: int, micro_batch_tokens: int | None
) -> dict[str, Any]:
    """The run with tunesmith's own loop."""
    import torch

    from tunesmith.data.template import ChatTemplate
    from tunesmith.data.tokens import TokenStore, TokenWriter
    from tunesmith.data.types import Example, Message, Origin
    from tunesmith.methods.base import set_trainable_dtype
    from tunesmith.models.load import load_model
    from tunesmith.objectives.instruction import Instruction
    from tunesmith.train.loop import Fit
    from tunesmith.train.settings import TrainSettings

    model, objective = load_model(str(folder / "model")), Instruction()
    work = useful_work(model, trained=method == "full")
    tuned = our_method(method)
    tuned.apply(model, seed=SEED)
    if precision == "bf16":
        set_trainable_dtype(model, frozen=torch.bfloat16)
    examples = [
        Example(Origin("rows.jsonl", i), "chat", tuple(Message(m["role"], m["content"]) for m in row["messages"]))
        for i, row in enumerate(read_rows(folder / "rows.jsonl"), start=1)
    ]
    writer = TokenWriter(folder / "tokens")
    sequences = objective.sequences(examples, template=ChatTemplate(model.tokenizer), max_tokens=MAX_TOKENS)
    for example, sequence in zip(examples, sequences, strict=True):
        writer.add(sequence, origin=example.origin)
    writer.close()
    chosen: dict[str, Any] = {} if micro_batch_tokens is None else {"micro_batch_tokens": micro_batch_tokens}
    chosen |= {"batch_rows": batch_rows, "epochs": 1, "seed": SEED, "precision": precision, "device": "cpu"}
    chosen |= {"learning_rate": LEARNING_RATE, "schedule": "constant", "warmup": 0, "checkpoint_every": steps}
    settings = TrainSettings.model_validate(chosen | {"weight_decay": WEIGHT_DECAY, "clip": CLIP})
    clock, operations = Clock(), list[float]()

    class Watch:
        def start(self, *, num_steps: int, step: int) -> None:
            assert num_steps == steps

        def step(self, record: dict[str, Any]) -> None:
            clock.step_ended()
            clock.told(tokens=record["tokens"], loss=record["loss"])
            done = fit.progress
            operations.append(work["a_token"] * done.computed_tokens + work["a_target"] * done.target_tokens)

        def validation(self, record: dict[str, Any]) -> None:
            """There is none."""

        def message(self, text: str) -> None:
            print(text, file=sys.stderr)

    fit = Fit(
        model,
        method=tuned,
        objective=objective,
        train=TokenStore(folder / "tokens"),
        validation=None,
        settings=settings,
        folder=folder / "run",
        observer=Watch(),
    )
    progress = fit.run().progress
    return clock.result(
        computed_tokens=progress.computed_tokens,
        target_tokens=progress.target_tokens,
        operations=operations[-1] - operations[0],
        settings={"micro_batch_tokens": settings.tokens_at_a_time("cpu"), "attention": "tunesmith"},
    )


def useful_work(model: Any, *, trained: bool) -> dict[str, float]:
    """Floating-point operations of the matrix products that the base's weights need, forward and backward.

    2 for each weight forward, 2 for the gradient of its input, 2 more for its own where it is trained; the vocabulary head
    works for targets alone. Attention, an adapter's own products and everything elementwise are not counted.
    """
    import torch

    linear = (m for m in model.causal.modules() if isinstance(m, torch.nn.Linear) and m is not model.head)
    factor = 6.0 if trained else 4.0
    return {"a_token": factor * sum(m.weight.numel() for m in linear), "a_target": factor * model.head.weight.numel()}


def matrix_rate(folder: Path, *, precision: str) -> dict[str, Any]:
    """Operations a second of bare `torch.mm` on the shapes of a pack of 1,536 tokens, one layer after the other."""
    import torch

    config = json.loads((folder / "model" / "config.json").read_text("utf-8"))
    width, inner = config["hidden_size"], config["intermediate_size"]
    narrow = width * config["num_key_value_heads"] // config["num_attention_heads"]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    shapes = [(width, width), (narrow, width), (narrow, width), (width, width)]
    shapes += [(inner, width), (inner, width), (width, inner)]
    weights = [torch.randn(shape, dtype=dtype) for shape in shapes]
    inputs = [torch.randn(1536, columns, dtype=dtype) for _, columns in shapes]
    operations, wall, processor = 0.0, time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < 5.0:
        for weight, given in zip(weights, inputs, strict=True):
            torch.mm(given, weight.T)
            operations += 2.0 * len(given) * weight.numel()
    seconds, processor_seconds = time.perf_counter() - wall, time.process_time() - processor
    return {
        "operations_per_second": operations / seconds,
        "operations_per_processor_second": operations / processor_seconds,
    }


def run_trl(
    folder: Path, *, method: str, precision: str, batch_rows: int, steps: int, variant: str, trl_rows: int
) -> dict[str, Any]:
    """The run with TRL's SFTTrainer around PEFT's model, in one of VARIANTS."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    dtype = torch.bfloat16 if precision == "bf16" and method != "full" else torch.float32
    few_bits = {"quantization_config": four_bits()} if method == "qlora" else {}
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype, **few_bits)  # SDPA attention
    model = with_adapter(base, folder, method=method)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    conversations = [row["messages"] for row in read_rows(folder / "in_order.jsonl")]
    dataset = Dataset.from_list([{"prompt": turns[:-1], "completion": turns[-1:]} for turns in conversations])
    chosen: dict[str, Any] = {
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "max_length": MAX_TOKENS,
    }
    chosen |= {"micro_rows": trl_rows} | VARIANTS[variant]
    micro_rows = chosen.pop("micro_rows")
    if micro_rows is None:  # packed rows of `max_length` tokens: as many a step as hold the same number of tokens
        texts = [tokenizer.apply_chat_template(turns, tokenize=False) for turns in conversations]
        num_tokens = sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
        micro_rows, accumulate = 1, max(1, int(num_tokens / MAX_TOKENS / steps))
    else:
        micro_rows = min(micro_rows, batch_rows)
        assert batch_rows % micro_rows == 0, "a step must be a whole number of micro-batches"
        accumulate = batch_rows // micro_rows
    chosen |= {"per_device_train_batch_size": micro_rows, "gradient_accumulation_steps": accumulate}
    config = SFTConfig(
        output_dir=str(folder / f"trl-{variant}"),
        max_steps=steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=CLIP,
        bf16=precision == "bf16",
        completion_only_loss=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=SEED,
        **chosen,
    )
    clock = Clock()

    class Watch(TrainerCallback):
        def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
            clock.step_ended()

        def on_log(self, *arguments: Any, **keywords: Any) -> None:
            if "loss" in keywords["logs"]:
                clock.told(tokens=keywords["logs"]["num_tokens"], loss=keywords["logs"]["loss"])

    trainer = SFTTrainer(model, args=config, train_dataset=dataset, processing_class=tokenizer, callbacks=[Watch()])
    trainer.train()
    assert len(clock.tokens) == len(clock.wall) == steps
    return clock.result(settings=chosen | {"attention": base.config._attn_implementation})


def run_flat(folder: Path, *, method: str, precision: str, batch_rows: int, steps: int) -> dict[str, Any]:
    """A loop as one writes it by hand: padded rows of similar lengths, one divisor for the step, logits of all positions."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = torch.bfloat16 if precision == "bf16" and method != "full" else torch.float32
    few_bits = {"quantization_config": four_bits()} if method == "qlora" else {}
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype, **few_bits)
    model = with_adapter(base, folder, method=method)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = []
    for row in read_rows(folder / "in_order.jsonl"):
        turns = row["messages"]
        whole = tokenizer.apply_chat_template(turns, return_dict=False)
        asked = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False)
        rows.append((whole, len(asked)))
    moving = [p for p in model.parameters() if p.requires_grad]
    options: dict[str, Any] = {"lr": LEARNING_RATE, "betas": BETAS, "weight_decay": WEIGHT_DECAY, "fused": True}
    optimiser, clock, tokens = torch.optim.AdamW(moving, **options), Clock(), 0
    model.train()
    for step in range(steps):
        batch = sorted(rows[step * batch_rows : (step + 1) * batch_rows], key=lambda row: len(row[0]))
        total, loss_sum = sum(len(ids) - asked for ids, asked in batch), 0.0
        for start in range(0, batch_rows, FLAT_ROWS):
            some = batch[start : start + FLAT_ROWS]
            shape = (len(some), max(len(ids) for ids, _ in some))
            ids_BT, mask_BT = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
            target_BT = torch.full(shape, -100)
            for place, (ids, asked) in enumerate(some):
                ids_BT[place, : len(ids)], mask_BT[place, : len(ids)] = torch.tensor(ids), 1
                target_BT[place, asked : len(ids)] = torch.tensor(ids[asked:])
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                logits = model(input_ids=ids_BT, attention_mask=mask_BT).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), target_BT[:, 1:].flatten(), reduction="sum"
            )
            (loss / total).backward()
            loss_sum += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(moving, CLIP)
        optimiser.step()
        optimiser.zero_grad()
        clock.step_ended()
        tokens += sum(len(ids) for ids, _ in batch)
        clock.told(tokens=tokens, loss=loss_sum / total)
    return clock.result(settings={"rows_at_a_time": FLAT_ROWS, "sorted": "by length, within a step"})


def with_adapter(base: Any, folder: Path, *, method: str) -> Any:
    """The base under PEFT's model with our starting adapter, or the base itself where all of it is trained."""
    from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    adapter = folder / "adapter"
    if method == "full":
        return base
    if method != "prefix":
        return PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
    config = PeftConfig.from_pretrained(str(adapter), inference_mode=False)  # which PEFT does not load to train on
    model = get_peft_model(base, config)
    set_peft_model_state_dict(model, load_file(adapter / "adapter_model.safetensors"))
    return model


def four_bits() -> Any:
    """NF4 with double quantisation, as our `qlora` has it."""
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


# --- running them in turn, and the report --------------------------------------------------------------------------


def child(arguments: argparse.Namespace, folder: Path, *, role: str) -> dict[str, Any]:
    """Run one role in a process of its own, which holds nothing but what it needs, and read what it found."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(arguments.threads),
        "MKL_NUM_THREADS": str(arguments.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hub"),
        "PYTHONPATH": str(ROOT),
    }
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in vars(arguments).items() if value is not None]
    line = [sys.executable, str(Path(__file__).resolve()), *options, f"--role={role}", f"--folder={folder}"]
    done = subprocess.run(line, env=environment, stdout=sys.stderr)
    if done.returncode and role in (FLAT, *VARIANTS):  # out of memory, most likely, which is a finding
        return {"failed": f"ended with status {done.returncode}"}
    if done.returncode:
        raise SystemExit(f"error: {role} ended with status {done.returncode}")
    return json.loads(result.read_text("utf-8"))


def run_role(arguments: argparse.Namespace) -> None:
    """What a child does: its role, and its findings into result.json."""
    sys.path.insert(0, str(ROOT))
    folder = Path(arguments.folder)
    sizes: dict[str, Any] = {"batch_rows": arguments.batch_rows, "steps": arguments.steps}
    kind = {"method": arguments.method, "precision": arguments.precision}
    found: dict[str, Any] = {}
    if arguments.role == "prepare":
        prepare(folder, model=arguments.model, scenario=arguments.scenario, method=arguments.method, **sizes)
    elif arguments.role == "matrix":
        found = matrix_rate(folder, precision=arguments.precision)
    elif arguments.role == "ours":
        with tempfile.TemporaryDirectory(dir=folder) as inner:
            for name in ("model", "rows.jsonl"):
                (Path(inner) / name).symlink_to(folder / name)
            tokens = arguments.micro_batch_tokens
            found = run_ours(Path(inner), micro_batch_tokens=tokens, **kind, **sizes)
    elif arguments.role == FLAT:
        found = run_flat(folder, **kind, **sizes)
    else:
        rows = arguments.trl_rows
        found = run_trl(folder, variant=arguments.role, trl_rows=rows, **kind, **sizes)
    (folder / "result.json").write_text(json.dumps(found), "utf-8")


def compare(runs: dict[str, list[dict[str, Any]]], *, bars: dict[str, float]) -> dict[str, Any]:
    """Medians of each side, our ratios to every TRL variant, and whether the losses agree and the bars are reached."""

    def median(name: str, key: str) -> float:
        return statistics.median(run[key] for run in runs[name])

    keys = ("tokens_per_second", "tokens_per_processor_second", "peak_memory_bytes")
    medians = {name: {key: median(name, key) for key in keys} for name in runs}
    ours, losses = medians["ours"], runs["ours"][0]["losses"]
    against = {}
    for name in [name for name in runs if name != "ours"]:
        theirs, their_losses = medians[name], runs[name][0]["losses"]
        against[name] = {
            "tokens_per_second": round(ours["tokens_per_second"] / theirs["tokens_per_second"], 3),
            "tokens_per_processor_second": round(
                ours["tokens_per_processor_second"] / theirs["tokens_per_processor_second"], 3
            ),
            "peak_memory": round(ours["peak_memory_bytes"] / theirs["peak_memory_bytes"], 3),
        }
        if name in SAME_ORDER:
            gaps = [abs(a - b) / abs(b) for a, b in zip(losses, their_losses, strict=True)]
            against[name] |= {
                "first_loss_gap": gaps[0],
                "largest_loss_gap": max(gaps),
                "losses_agree": gaps[0] <= LOSS_TOLERANCE,
                "same_tokens": runs["ours"][0]["all_tokens"] == runs[name][0]["all_tokens"],
            }
    bars_by_variant = {
        key: {
            name: ratios[key] >= bar if key == "tokens_per_second" else ratios[key] <= bar
            for name, ratios in against.items()
        }
        for key, bar in bars.items()
    }
    return {
        "medians": medians,
        "ours_to_theirs": against,
        "fastest": max(against, key=lambda name: medians[name]["tokens_per_second"], default=None),
        "bars": {key: {"bar": bar, "reached": bars_by_variant[key]} for key, bar in bars.items()},
    }


def matrix_share(ours: list[dict[str, Any]], rates: list[dict[str, Any]]) -> float:
    """Which part of the rate of bare products our training reaches, by processor time, as the median over the turns."""
    shares = [
        run["operations"] / run["processor_seconds"] / rate["operations_per_processor_second"]
        for run, rate in zip(ours, rates, strict=True)
    ]
    return round(statistics.median(shares), 3)


def table(reports: list[dict[str, Any]]) -> str:
    """Ours to TRL's defaults, to its fastest setting and to the loop written by hand; and the share of bare products."""
    lines = [
        "| model | rows | method | precision | tokens/s | to TRL's defaults | to its fastest | to a loop by hand "
        "| memory, MiB | to TRL's defaults | to its fastest | share of bare products |",
        "| --- | --- | --- | --- |" + " ---: |" * 8,
    ]
    for report in reports:
        run, against, medians = report["run"], report["ours_to_theirs"], report["medians"]
        trl = [name for name in against if name != FLAT]
        best = max(trl, key=lambda name: medians[name]["tokens_per_second"], default=None)
        ours = medians["ours"]

        def ratio(name: str | None, key: str, report: dict[str, Any] = report) -> str:
            if name in report["ours_to_theirs"]:
                return f"{report['ours_to_theirs'][name][key]:.2f}"
            return "failed" if name in report["failed"] else ""

        speed, memory = "tokens_per_processor_second", "peak_memory"
        cells = [
            report["model"]["name"], report["scenario"]["name"], run.get("method", "lora"), run["precision"],
            f"{ours[speed]:,.0f}", ratio("default", speed), ratio(best, speed), ratio(FLAT, speed),
            f"{ours['peak_memory_bytes'] / 2**20:,.0f}", ratio("default", memory), ratio(best, memory),
            f"{report['matrix_share']:.2f}" if "matrix_share" in report else "",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m")
    parser.add_argument("--scenario", choices=SCENARIOS, default="varied")
    parser.add_argument("--method", choices=METHODS, default="lora")
    sides = ",".join((*VARIANTS, FLAT))
    parser.add_argument("--variants", default=sides, help="of TRL, or flat, separated by commas (default: all)")
    parser.add_argument("--steps", type=int, default=6, help="optimiser steps; the first is not timed")
    parser.add_argument("--batch-rows", type=int, help="rows an optimiser step (default: the scenario's)")
    parser.add_argument("--trl-rows", type=int, default=8, help="rows TRL takes through the model at a time")
    parser.add_argument("--micro-batch-tokens", type=int, help="of our side (default: the settings' own default)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--out", help="JSON file (default: benchmarks/results/against_trl-MODEL-SCENARIO[-METHOD][-PRECISION].json)"
    )
    parser.add_argument(
        "--table", nargs="+", metavar="JSON", help="print the table of these results, and measure nothing"
    )
    parser.add_argument("--role", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.batch_rows = arguments.batch_rows or SCENARIOS[arguments.scenario].batch_rows
    unknown = set(arguments.variants.split(",")) - {FLAT, *VARIANTS}
    if unknown:
        parser.error(f"unknown variant {sorted(unknown)[0]!r}; there are {', '.join((*VARIANTS, FLAT))}")
    if arguments.steps < 2:
        parser.error("--steps must be at least 2: the first step is not timed")
    return arguments


def main() -> int:
    """Prepare once, run the sides in turn, write and print the report. Exit code 3 when losses or tokens disagree."""
    arguments = parse()
    if arguments.table:
        print(table([json.loads(Path(path).read_text("utf-8")) for path in arguments.table]))
        return 0
    if arguments.role:
        run_role(arguments)
        return 0
    sides = ["ours", *arguments.variants.split(",")]
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    rates: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    scenario = SCENARIOS[arguments.scenario]
    before = machine()
    with tempfile.TemporaryDirectory(prefix="against-trl-") as name:
        folder = Path(name)
        child(arguments, folder, role="prepare")
        for repeat in range(arguments.repeats):
            rates.append(child(arguments, folder, role="matrix"))
            for side in [side for side in sides if side not in failed]:
                run = child(arguments, folder, role=side)
                if "failed" in run:
                    failed[side] = run["failed"]
                    print(f"{repeat + 1}/{arguments.repeats} {side}: {run['failed']}", file=sys.stderr)
                    continue
                runs[side].append(run)
                speed, peak = run["tokens_per_second"], run["peak_memory_bytes"] / 2**20
                print(f"{repeat + 1}/{arguments.repeats} {side}: {speed:.0f} tokens/s, {peak:.0f} MiB", file=sys.stderr)
    report = {
        "command": command(),
        "date": time.strftime("%Y-%m-%d"),
        "code": code(),
        "machine": before,
        "model": {"name": arguments.model} | MODELS[arguments.model],
        "scenario": {"name": arguments.scenario, "rows": scenario.describe},
        "run": {
            "batch_rows": arguments.batch_rows,
            "steps": arguments.steps,
            "repeats": arguments.repeats,
            "threads": arguments.threads,
            "precision": arguments.precision,
            "method": arguments.method,
            "lora": {"rank": RANK, "alpha": 2 * RANK, "targets": "all-linear"},
            "adamw": {"learning_rate": LEARNING_RATE, "betas": BETAS, "weight_decay": WEIGHT_DECAY, "clip": CLIP},
        },
        **compare({side: found for side, found in runs.items() if found}, bars=scenario.bars),
        "matrix_share": matrix_share(runs["ours"], rates),
        "failed": failed,
        "matrix": rates,
        "runs": runs,
    }
    parts = [arguments.model, arguments.scenario]
    parts += [] if arguments.method == "lora" else [arguments.method]
    parts += [] if arguments.precision == "fp32" else [arguments.precision]
    out = Path(arguments.out or ROOT / "benchmarks" / "results" / f"against_trl-{'-'.join(parts)}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1)
    out.write_text(text + "\n", "utf-8")
    print(text)
    checks = [ratios for name, ratios in report["ours_to_theirs"].items() if name in SAME_ORDER]
    return 0 if all(ratios["losses_agree"] and ratios["same_tokens"] for ratios in checks) else 3


if __name__ == "__main__":
    raise SystemExit(main())
