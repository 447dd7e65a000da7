"""Base and tuned on the same held-out rows: the same prompts, the same ids, the same metrics.

Three systems answer every row: the tuned model, its base, and the base with a few training examples in the prompt, which
costs no training at all. Likelihoods are read from packs, answers are generated greedily; either way what rows share is
computed once.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunesmith.data.pack import build_packs
from tunesmith.data.template import ChatTemplate
from tunesmith.data.types import Example, Message, Sequence
from tunesmith.errors import DataError, ModelError
from tunesmith.evaluate.metrics import METRICS
from tunesmith.evaluate.settings import EvaluateSettings
from tunesmith.evaluate.statistics import compare, interval, verdict
from tunesmith.generate.runner import Generator
from tunesmith.generate.sampling import Sampling
from tunesmith.models.load import Model
from tunesmith.objectives.base import Objective
from tunesmith.storage import write_json, write_text

SHORT_ANSWER_CHARACTERS = 40
PACK_TOKENS = 4096


@dataclass(frozen=True)
class System:
    """Something that answers: a model (entered through `switched` first) and examples put into the prompt."""

    name: str
    model: Model
    switched: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    shots: tuple[Example, ...] = ()


@dataclass
class Answers:
    """What a system made of the rows: likelihood of the reference, and its own answer where one was generated."""

    nll_B: np.ndarray
    tokens_B: np.ndarray
    texts: list[str] | None
    answer_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`. `document` is what `--json` prints and `evaluation.json` holds."""

    document: dict[str, Any]
    rows: list[dict[str, Any]] = field(repr=False, default_factory=list)

    @property
    def verdict(self) -> str:
        """`better`, `worse` or `undecided`."""
        return str(self.document["verdict"])

    @property
    def sentence(self) -> str:
        """The verdict in words, with its evidence."""
        return str(self.document["sentence"])

    def value(self, metric: str, *, system: str = "tuned") -> float:
        """One score."""
        return float(self.document["metrics"][metric]["systems"][system]["value"])

    def as_dict(self) -> dict[str, Any]:
        """The document."""
        return self.document

    def write(self, folder: Path) -> None:
        """evaluation.json and examples.jsonl."""
        write_text(folder / "examples.jsonl", text="".join(json.dumps(r, ensure_ascii=False) + "\n" for r in self.rows))
        write_json(folder / "evaluation.json", value=self.document)


def asked(example: Example) -> tuple[list[Message], Message]:
    """The messages before the last assistant turn, and that turn."""
    last = max(i for i, m in enumerate(example.messages) if m.role == "assistant")
    return list(example.messages[:last]), example.messages[last]


def reference_of(example: Example, *, template: ChatTemplate) -> str:
    """What should be answered, as text: a turn's content, a tool call as the template writes it, or the plain text."""
    if example.text is not None:
        return example.text
    messages, answer = asked(example)
    if not answer.extra:
        return answer.content
    sequence = template.sequences([_only_last(example, messages)])[0][-1]
    return template.tokenizer.decode(sequence.tokens_T[sequence.weight_T > 0].tolist())


def _only_last(example: Example, prompt: list[Message]) -> Example:
    """The row with this prompt, in which the last assistant turn alone is trained."""
    read = tuple(Message(m.role, m.content, 0.0, m.extra) for m in prompt)
    answer = asked(example)[1]
    trained = Message(answer.role, answer.content, 1.0, answer.extra)
    return Example(example.origin, "chat", (*read, trained), tools=example.tools)


def prompt_messages(example: Example, *, shots: tuple[Example, ...], plain: bool) -> list[Message]:
    """The prompt of a row with `shots` before it: as earlier turns, or as text where the base has no chat template."""
    messages, _ = asked(example)
    if not shots:
        return messages
    if plain:
        shown = "\n\n".join(f"{asked(s)[0][-1].content}\n{asked(s)[1].content}" for s in shots)
        return [*messages[:-1], Message("user", f"{shown}\n\n{messages[-1].content}")]
    lead = [m for m in messages[:1] if m.role == "system"]
    turns: list[Message] = []
    for shot in shots:
        before, answer = asked(shot)
        turns += [m for m in before if m.role != "system"] + [answer]
    return lead + turns + messages[len(lead) :]


def default_metrics(examples: list[Example]) -> tuple[str, ...]:
    """What fits the answers: JSON, short labels, or prose. The first one decides the verdict."""
    if examples[0].text is not None:
        return ("bits_per_byte", "perplexity")
    answers = [asked(e)[1].content.strip() for e in examples]
    if all(a.startswith(("{", "[")) for a in answers):
        return ("exact_match", "json_fields", "json_valid", "perplexity")
    if np.mean([len(a) for a in answers]) <= SHORT_ANSWER_CHARACTERS:
        return ("exact_match", "token_f1", "perplexity")
    return ("chrf", "bleu", "rouge_l", "token_f1", "exact_match", "perplexity")


def choose_shots(
    train: Iterator[Example], *, count: int, seed: int, template: ChatTemplate, examples: list[Example], room: int
) -> tuple[Example, ...]:
    """At most `count` training examples, drawn by `seed`, such that every row still fits into `room` tokens."""
    if examples[0].text is not None:
        return ()
    random = np.random.default_rng(seed)
    drawn: list[Example] = []
    for number, example in enumerate(train):  # reservoir sampling: memory does not grow with the rows
        if len(drawn) < count:
            drawn.append(example)
        elif (place := int(random.integers(0, number + 1))) < count:
            drawn[place] = example
    shots = tuple(drawn)
    while shots:
        longest = max(
            len(template.prompt(prompt_messages(e, shots=shots, plain=template.plain), tools=e.tools).ids)
            for e in sorted(examples, key=_characters)[-8:]
        )
        if longest <= room:
            break
        shots = shots[:-1]
    return shots


def _characters(example: Example) -> int:
    return sum(len(m.content) for m in example.messages)


def evaluate_systems(
    systems: list[System],
    *,
    examples: list[Example],
    template: ChatTemplate,
    objective: Objective,
    settings: EvaluateSettings,
    run: str,
    data: str,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Let every system answer every row, and compare the first system with the others.

    `examples` are held-out rows of one kind (conversations or plain texts). Raises DataError where none is left.
    """
    fitting = _fitting(examples, systems=systems, template=template)
    kept = _drawn(fitting, settings=settings)
    if len(kept) < 2:
        found = "no held-out row" if not kept else "one held-out row alone"
        raise DataError(
            f"{found} fits into the model's context, and one row says nothing about luck",
            hint="give more or shorter rows: --data FILE",
        )
    names = settings.metrics or default_metrics(kept)
    _check_metrics(names, kept)
    generated = any(METRICS[name].reads == "text" for name in names)
    answers: dict[str, Answers] = {}
    for system in systems:
        on_progress(f"{system.name}: {len(kept):,} rows")
        with system.switched():
            answers[system.name] = _answer(
                system, kept, template=template, objective=objective, settings=settings, generated=generated
            )
    references = [reference_of(e, template=template) for e in kept]
    scores = {name: {s: _score(name, a, references=references) for s, a in answers.items()} for name in names}
    metrics = {name: _compared(name, rows, seed=settings.seed) for name, rows in scores.items()}
    document = _document(
        metrics, answers, systems=systems, run=run, data=data, primary=names[0], rows=len(kept), seed=settings.seed
    )
    keys = "".join(example.key for example in kept)
    document["rows_sha256"] = hashlib.sha256(keys.encode()).hexdigest()  # what two runs must share to be compared
    document["left_out_rows"] = len(examples) - len(fitting)
    return Evaluation(document, _row_table(kept, references, answers, scores, plain=template.plain))


def _fitting(examples: list[Example], *, systems: list[System], template: ChatTemplate) -> list[Example]:
    """The rows that fit into the context with every system's prompt."""
    limit = systems[0].model.room_tokens
    shots = max((s.shots for s in systems), key=len)
    kept = []
    for example in examples:
        if example.text is None:
            messages = prompt_messages(example, shots=shots, plain=template.plain)
            whole = _only_last(example, messages)
            if max(len(s.tokens_T) for s in template.sequences([whole])[0]) > limit:
                continue
        kept.append(example)
    return kept


def _drawn(examples: list[Example], *, settings: EvaluateSettings) -> list[Example]:
    """`settings.rows` of them by the seed, in order; all by default."""
    if settings.rows is None or len(examples) <= settings.rows:
        return examples
    chosen = np.random.default_rng(settings.seed).permutation(len(examples))[: settings.rows]
    return [examples[i] for i in sorted(chosen)]


def _check_metrics(names: tuple[str, ...], examples: list[Example]) -> None:
    if examples[0].text is not None:
        bad = [n for n in names if METRICS[n].reads == "text"]
        if bad:
            raise DataError(
                f"metric '{bad[0]}' needs answers, and these rows are plain text",
                file=examples[0].origin.file,
                hint="use perplexity or bits_per_byte",
            )


def _answer(
    system: System,
    examples: list[Example],
    *,
    template: ChatTemplate,
    objective: Objective,
    settings: EvaluateSettings,
    generated: bool,
) -> Answers:
    started = time.perf_counter()
    prompts = [
        [] if e.text is not None else prompt_messages(e, shots=system.shots, plain=template.plain) for e in examples
    ]
    nll_B, tokens_B = _likelihood(system.model, examples, prompts, template=template, objective=objective)
    answers = Answers(nll_B, tokens_B, None)
    if generated:
        ids = [template.prompt(p, tools=e.tools).ids for p, e in zip(prompts, examples, strict=True)]
        generator = Generator(system.model, stop_ids=template.stop_ids(), batch_rows=settings.batch_rows)
        completions = generator.generate(ids, sampling=Sampling(max_tokens=settings.max_tokens))
        answers.texts = [c.text for c in completions]
        answers.answer_tokens = sum(len(c.tokens) for c in completions)
    answers.seconds = time.perf_counter() - started
    return answers


def _likelihood(
    model: Model,
    examples: list[Example],
    prompts: list[list[Message]],
    *,
    template: ChatTemplate,
    objective: Objective,
) -> tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihood (nats) and number of target tokens of each row's reference."""
    sequences: list[Sequence] = []
    for row, (example, prompt) in enumerate(zip(examples, prompts, strict=True)):
        if example.text is not None:
            found = objective.sequences([example], template=template, max_tokens=model.room_tokens)[0]
        else:
            found = template.sequences([_only_last(example, prompt)])[0]
        sequences += [Sequence(s.tokens_T, s.weight_T, row) for s in found]
    nll_B, tokens_B = np.zeros(len(examples)), np.zeros(len(examples))
    was_training = model.causal.training
    model.causal.eval()
    with torch.no_grad():
        for pack in build_packs(sequences, max_tokens=PACK_TOKENS):
            logprob_N = model.target_logprobs(pack)
            rows_N = pack.rows_S[pack.sequence_N]
            np.add.at(nll_B, rows_N, -logprob_N.double().cpu().numpy())
            np.add.at(tokens_B, rows_N, 1)
    model.causal.train(was_training)
    if not np.isfinite(nll_B).all():
        raise ModelError("the model gives probabilities that are not finite", hint="evaluate another checkpoint")
    return nll_B, tokens_B


def _score(name: str, answers: Answers, *, references: list[str]) -> np.ndarray:
    metric = METRICS[name]
    if metric.reads == "text":
        assert answers.texts is not None
        return metric.score_rows(answers.texts, references)
    if name == "perplexity":
        return metric.score_rows(negative_log_likelihood=answers.nll_B, tokens=answers.tokens_B)
    bytes_B = np.array([max(1, len(r.encode())) for r in references], dtype=np.float64)
    return metric.score_rows(negative_log_likelihood=answers.nll_B, bytes=bytes_B)


def _compared(name: str, rows: dict[str, np.ndarray], *, seed: int) -> dict[str, Any]:
    metric = METRICS[name]
    first, *others = rows
    return {
        "higher_is_better": metric.higher_is_better,
        "systems": {s: interval(r, aggregate=metric.aggregate, seed=seed).as_dict() for s, r in rows.items()},
        "differences": {
            f"{first} - {other}": compare(rows[first], rows[other], metric=metric, seed=seed) for other in others
        },
    }


def _document(
    metrics: dict[str, Any],
    answers: dict[str, Answers],
    *,
    systems: list[System],
    run: str,
    data: str,
    primary: str,
    rows: int,
    seed: int,
) -> dict[str, Any]:
    names = [s.name for s in systems]
    decided = ("undecided", "there is nothing to compare with")
    if len(names) > 1:
        decided = verdict(metrics, primary=primary, rows=rows, systems=(names[0], names[1]))
    order = [n for n in ("base", "few_shot") if n in names] + [n for n in names if n not in ("base", "few_shot")]
    return {
        "run": run,
        "data": data,
        "rows": rows,
        "systems": order,
        "primary": primary,
        "metrics": metrics,
        "verdict": decided[0],
        "sentence": decided[1],
        "few_shot_examples": max(len(s.shots) for s in systems),
        "seed": seed,
        "costs": {
            name: {"seconds": round(a.seconds, 3), "tokens_per_answer": round(a.answer_tokens / rows, 2)}
            for name, a in answers.items()
        },
    }


def _row_table(
    examples: list[Example],
    references: list[str],
    answers: dict[str, Answers],
    scores: dict[str, dict[str, np.ndarray]],
    *,
    plain: bool,
) -> list[dict[str, Any]]:
    values = {
        system: {name: METRICS[name].row_values(rows[system]) for name, rows in scores.items()} for system in answers
    }
    table = []
    for i, example in enumerate(examples):
        prompt = [] if example.text is not None else [{"role": m.role, "content": m.content} for m in asked(example)[0]]
        table.append(
            {
                "row": i,
                "origin": str(example.origin),
                "prompt": prompt,
                "reference": references[i],
                "outputs": {s: a.texts[i] for s, a in answers.items() if a.texts is not None},
                "scores": {s: {name: float(v[i]) for name, v in by.items()} for s, by in values.items()},
            }
        )
    return table
