"""LoRA tuning of a chat model in one flat file: plain torch and transformers, one row at a time, nothing clever.

    python examples/tune_flat.py --model FOLDER --data chats.jsonl --out adapter --epochs 3

Each line of the data is {"messages": [{"role": ..., "content": ...}, ...]}. Trained are the assistant's turns, each
with the token that ends it. This computes what `tunesmith train` computes with its default objective and method, in the
most direct way, and a test compares the two number by number. Read it to see what fine-tuning is; for real runs use
tunesmith: this file packs nothing, resumes nothing, checks little, and is several times slower.

Shapes: T tokens of a row, V vocabulary, R rank of the update, I inputs and O outputs of a layer.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


class Lora(nn.Module):
    """A frozen linear layer W with a trained low-rank update beside it: W x + (alpha / rank) B A x."""

    def __init__(self, linear: nn.Linear, *, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.linear, self.scaling = linear, alpha / rank
        bound = 1 / math.sqrt(linear.in_features)
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))  # zero: the first step sees the base model

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return self.linear(x) + self.scaling * (x @ self.lora_A.T @ self.lora_B.T)


def insert_lora(model: PreTrainedModel, *, rank: int, seed: int) -> dict[str, Lora]:
    """Freeze the model and put an update beside every linear layer but the vocabulary head; updates by layer name."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings()
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    layers = {}
    for name in sorted(linear):
        layers[name] = Lora(linear[name], rank=rank, alpha=2 * rank, generator=generator)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layers[name])
    return layers


def encode(messages: list[dict[str, str]], *, tokenizer) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and for each whether it is trained.

    What is trained of an assistant's turn is what its rendering adds to the prompt that would be given to the model in
    its place, up to and with the last special token: the one the model must write to stop.
    """
    ids: list[int] = []
    trained: list[bool] = []
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(messages[:k], add_generation_prompt=True, return_dict=False)
        full = tokenizer.apply_chat_template(messages[: k + 1], return_dict=False)
        if full[: len(prompt)] != prompt or prompt[: len(ids)] != ids:
            raise SystemExit("error: the chat template rewrites earlier turns, which this script does not support")
        stop = max(i for i in range(len(prompt), len(full)) if full[i] in tokenizer.all_special_ids)
        trained += [False] * (len(prompt) - len(ids)) + [True] * (stop + 1 - len(prompt))
        ids = full[: stop + 1]
    return ids, trained


def loss_sum(model: PreTrainedModel, ids: list[int], trained: list[bool]) -> Tensor:
    """Sum of -log p(token | tokens before it) over the trained tokens of one row."""
    tokens_T, trained_T = torch.tensor(ids), torch.tensor(trained)
    logits_TV = model(input_ids=tokens_T[None]).logits[0]
    logprob_TV = logits_TV[:-1].float().log_softmax(-1)
    logprob_T = logprob_TV.gather(1, tokens_T[1:, None])[:, 0]
    return -logprob_T[trained_T[1:]].sum()


def learning_rate(step: int, *, peak: float, num_steps: int, warmup: float) -> float:
    """Linear warm-up over a share of all steps, then half a cosine down to zero. `step` counts from 0."""
    num_warmup = min(math.ceil(warmup * num_steps), num_steps - 1)
    if step < num_warmup:
        return peak * (step + 1) / (num_warmup + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / (num_steps - num_warmup)))


def tune(options: argparse.Namespace) -> None:
    """Read, train, and write the adapter in PEFT's format and the losses."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    layers = insert_lora(model, rank=options.rank, seed=options.seed)
    lines = Path(options.data).read_text("utf-8").split("\n")
    rows = [encode(json.loads(line)["messages"], tokenizer=tokenizer) for line in lines if line.strip()]
    steps_per_epoch = math.ceil(len(rows) / options.batch_rows)
    num_steps = options.epochs * steps_per_epoch
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.99), weight_decay=0.01)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    model.train()
    with (folder / "losses.jsonl").open("w", encoding="utf-8") as log:
        for step in range(num_steps):
            epoch, place = divmod(step, steps_per_epoch)
            order = np.random.default_rng([options.seed, epoch]).permutation(len(rows))
            batch = [rows[i] for i in order[place * options.batch_rows : (place + 1) * options.batch_rows]]
            num_trained = sum(sum(trained) for _, trained in batch)  # one divisor for the whole step
            loss = 0.0
            for ids, trained in batch:
                row_loss = loss_sum(model, ids, trained) / num_trained
                row_loss.backward()
                loss += row_loss.item()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            rate = learning_rate(step, peak=options.learning_rate, num_steps=num_steps, warmup=0.05)
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
            optimiser.zero_grad()
            log.write(json.dumps({"step": step + 1, "loss": loss, "learning_rate": rate}) + "\n")
            print(f"step {step + 1}/{num_steps}: loss {loss:.4f}")
    save(layers, folder=folder, base=options.model, rank=options.rank)


def save(layers: dict[str, Lora], *, folder: Path, base: str, rank: int) -> None:
    """PEFT's two files, which other programs load."""
    tensors = {}
    for name, layer in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A.detach()
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B.detach()
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(layers),
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a chat model: config, weights, tokenizer, template")
    parser.add_argument("--data", required=True, help="JSONL file of conversations")
    parser.add_argument("--out", required=True, help="folder for the adapter and losses.jsonl")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-rows", type=int, default=16, help="rows an optimiser step")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    tune(parser.parse_args())


if __name__ == "__main__":
    main()
