"""Base and tuned on the same held-out rows: the same prompts, the same ids, the same metrics.

The systems that answer every row are the tuned model, its base, and the base with a few training examples in the prompt,
or with what was looked up for each row: neither costs any training. Likelihoods are read from packs, answers are generated
greedily; either way what rows share is computed once.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tunesmith.data.retrieval import Lookup, Passage, prompt_messages
from tunesmith.data.template import ChatTemplate
from tunesmith.data.types import Example, Message, Sequence
from tunesmith.errors import DataError, ModelError, RecipeError
from tunesmith.evaluate.answered import Answered
from tunesmith.evaluate.chosen import chosen, with_examples
from tunesmith.evaluate.code import CODE_METRICS, tests_of
from tunesmith.evaluate.metric import Metric
from tunesmith.evaluate.metrics import METRICS
from tunesmith.evaluate.own import settled
from tunesmith.evaluate.result import Answers, Evaluation, concluded, drawn
from tunesmith.evaluate.settings import EvaluateSettings
from tunesmith.generate.runner import Generator
from tunesmith.generate.sampling import Sampling
from tunesmith.models.load import Model
from tunesmith.objectives.base import Objective

SHORT_ANSWER_CHARACTERS = 40
PACK_TOKENS = 4096
GENERATED = ("text", "samples")  # what metrics read that is generated


@dataclass(frozen=True)
class System:
    """Something that answers: a model (entered through `switched` first) and examples put into the prompt.

    `lookup` finds others for each question instead. `template` is given where its tokens are not those of the first
    system, `answered` where what it says is kept.
    """

    name: str
    model: Model
    switched: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    shots: tuple[Example, ...] = ()
    template: ChatTemplate | None = None
    answered: Answered | None = None
    lookup: Lookup[Example] | Lookup[Passage] | None = None

    def prompt(self, example: Example, *, plain: bool) -> list[Message]:
        """What is asked of a row; `plain`: the base has no chat template."""
        if self.lookup is not None:
            return self.lookup.prompt(example)
        return prompt_messages(example, shots=self.shots, plain=plain)


def reference_of(example: Example, *, template: ChatTemplate) -> str:
    """What should be answered, as text: a turn's content, a tool call as the template writes it, or the plain text."""
    if example.text is not None:
        return example.text
    messages, answer = example.asked
    if not answer.extra:
        return answer.content
    sequence = template.sequences([only_last(example, list(messages))])[0][-1]
    return template.tokenizer.decode(sequence.tokens_T[sequence.weight_T > 0].tolist())


def only_last(example: Example, prompt: list[Message]) -> Example:
    """The row with this prompt, in which the last assistant turn alone is trained."""
    read = tuple(Message(m.role, m.content, 0.0, m.extra) for m in prompt)
    answer = example.asked[1]
    trained = Message(answer.role, answer.content, 1.0, answer.extra)
    return Example(example.origin, "chat", (*read, trained), tools=example.tools)


def default_metrics(examples: list[Example]) -> tuple[str, ...]:
    """What fits the answers: code with tests, JSON, short labels, or prose. The first one decides the verdict."""
    if examples[0].text is not None:
        return ("bits_per_byte", "perplexity")
    if examples[0].tests is not None:
        return ("code_passes", "chrf", "perplexity")
    answers = [e.asked[1].content.strip() for e in examples]
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
    shots = tuple(sampled(train, count=count, random=np.random.default_rng(seed)))
    while shots and not shots_fit(shots, template=template, examples=examples, room=room):
        shots = shots[:-1]
    return shots


def sampled(rows: Iterator[Example], *, count: int, random: np.random.Generator) -> list[Example]:
    """At most `count` of the rows, drawn at random in one pass: memory does not grow with the rows."""
    drawn: list[Example] = []
    for number, example in enumerate(rows):
        if len(drawn) < count:
            drawn.append(example)
        elif (place := int(random.integers(0, number + 1))) < count:
            drawn[place] = example
    return drawn


def shots_fit(shots: tuple[Example, ...], *, template: ChatTemplate, examples: list[Example], room: int) -> bool:
    """Whether the longest rows, with `shots` before them, stay within `room` tokens."""
    prompts = ((prompt_messages(e, shots=shots, plain=template.plain), e.tools) for e in _longest(examples))
    return all(len(template.prompt(messages, tools=tools).ids) <= room for messages, tools in prompts)


def _longest(examples: list[Example]) -> list[Example]:
    return sorted(examples, key=_characters)[-8:]


def _characters(example: Example) -> int:
    return sum(len(m.content) for m in example.messages)


class _Rendered:
    """What is read and trained of rows: rendered once for all systems that show them alike."""

    def __init__(self, template: ChatTemplate, objective: Objective):
        self.template, self.objective = template, objective
        self._found: dict[tuple[int, ...], list[Sequence]] = {}  # by identities: rows and shots live as long as this

    def of(self, example: Example, *, system: System) -> list[Sequence]:
        """The row's sequences, its reference alone trained, in the context of a system's model."""
        template = system.template or self.template
        room = system.model.room_tokens if example.text is not None else 0
        key = (id(example), id(template), room, id(system.lookup), *map(id, system.shots))
        if key not in self._found:
            self._found[key] = self._render(example, system=system, template=template, room=room)
        return self._found[key]

    def _render(self, example: Example, *, system: System, template: ChatTemplate, room: int) -> list[Sequence]:
        if example.text is not None:
            return self.objective.sequences([example], template=template, max_tokens=room)[0]
        return template.sequences([only_last(example, system.prompt(example, plain=template.plain))])[0]


def evaluate_systems(
    systems: list[System],
    *,
    examples: list[Example],
    template: ChatTemplate,
    objective: Objective,
    settings: EvaluateSettings,
    run: str,
    data: str,
    cluster_of: Callable[[Example], str] | None = None,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Let every system answer every row, and compare the first system with the others.

    `examples` are held-out rows of one kind (conversations or plain texts); those for which `cluster_of` gives the same are
    drawn together. Raises DataError where none is left.
    """
    rendered = _Rendered(template, objective)
    fitting = _fitting(examples, systems=systems, rendered=rendered)
    kept = drawn(fitting, settings=settings)
    names = settings.metrics or (*default_metrics(kept), *settings.added)
    if any(system.template is not None for system in systems):
        names = _of_text(names, chosen=bool(settings.metrics))
    metrics = chosen(names, settings=settings)
    _check_metrics(metrics, kept, judged=settings.judge is not None)
    generated = any(metric.reads in GENERATED for metric in metrics.values()) or settings.judge is not None
    answers: dict[str, Answers] = {}
    for system in systems:
        on_progress(f"{system.name}: {len(kept):,} rows")
        with system.switched():
            answers[system.name] = _answer(
                system,
                kept,
                template=system.template or template,
                rendered=rendered,
                settings=settings,
                generated=generated,
            )
    references = [reference_of(e, template=template) for e in kept]
    scores = {
        name: {s: _score(metric, a, references=references, examples=kept) for s, a in answers.items()}
        for name, metric in metrics.items()
    }
    metrics = {name: settled(metric, scores[name]) for name, metric in metrics.items()}
    prompts = [[] if e.text is not None else list(e.asked[0]) for e in kept]
    return concluded(
        answers,
        scores,
        metrics=metrics,
        examples=kept,
        prompts=prompts,
        references=references,
        settings=settings,
        run=run,
        data=data,
        num_shots=max(len(s.shots) for s in systems),
        num_left_out=len(examples) - len(fitting),
        clusters=None if cluster_of is None else [cluster_of(example) for example in kept],
        looked_up={s.name: [s.lookup.origins(e) for e in kept] for s in systems if s.lookup is not None},
    )


def _fitting(examples: list[Example], *, systems: list[System], rendered: _Rendered) -> list[Example]:
    """The rows that fit into the context with every system's prompt."""
    limit = systems[0].model.room_tokens
    longest = max(systems, key=lambda system: len(system.shots))
    return [
        example
        for example in examples
        if example.text is not None or max(s.num_context_tokens for s in rendered.of(example, system=longest)) <= limit
    ]


def _check_metrics(metrics: dict[str, Metric], examples: list[Example], *, judged: bool) -> None:
    if odd := [n for n, metric in metrics.items() if metric.reads in ("classes", "numbers")]:
        fitting = ", ".join(n for n, m in METRICS.items() if m.reads in ("text", "likelihood"))
        raise RecipeError(
            f"evaluate.metrics: '{odd[0]}' reads a head, and this run writes text", hint=f"there are {fitting}"
        )
    if examples[0].text is not None:
        bad = [n for n, metric in metrics.items() if metric.reads in GENERATED]
        if bad or judged:
            what = f"metric '{bad[0]}'" if bad else "evaluate.judge"
            raise DataError(
                f"{what} needs answers, and these rows are plain text",
                file=examples[0].origin.file,
                hint="use perplexity or bits_per_byte",
            )
    if set(metrics) & set(CODE_METRICS):
        for example in examples:
            tests_of(example)


def _of_text(names: tuple[str, ...], *, chosen: bool) -> tuple[str, ...]:
    """The metrics that systems with different tokens have in common; RecipeError where another was chosen."""
    if chosen and "perplexity" in names:
        raise RecipeError(
            "metric 'perplexity' is a token's, and the systems have different tokens",
            hint="use evaluate.metrics: [bits_per_byte]",
        )
    return tuple(name for name in names if name != "perplexity")


def _answer(
    system: System,
    examples: list[Example],
    *,
    template: ChatTemplate,
    rendered: _Rendered,
    settings: EvaluateSettings,
    generated: bool,
) -> Answers:
    rows = [rendered.of(example, system=system) for example in examples]
    ids: list[list[int]] = []
    if generated:
        prompts = [system.prompt(e, plain=template.plain) for e in examples]
        ids = [template.prompt(p, tools=e.tools).ids for p, e in zip(prompts, examples, strict=True)]

    def ask() -> dict[str, Any]:
        started = time.perf_counter()
        nll_B, tokens_B = _likelihood(system.model, rows)
        found: dict[str, Any] = {"nll": nll_B.tolist(), "tokens": tokens_B.tolist(), "texts": None, "answer_tokens": 0}
        found |= {"samples": None, "prompt_tokens": sum(map(len, ids))}
        if generated:
            generator = Generator(system.model, stop_ids=template.stop_ids(), batch_rows=settings.batch_rows)
            found |= _generated(generator, ids, settings=settings)
        return found | {"seconds": time.perf_counter() - started}

    def asked() -> Iterator[bytes]:
        yield json.dumps([generated, settings.max_tokens, sorted(template.stop_ids()), ids]).encode()
        if settings.samples is not None:
            yield json.dumps([settings.samples, settings.temperature, settings.seed]).encode()
        for sequence in (sequence for sequences in rows for sequence in sequences):
            yield sequence.tokens_T.tobytes()
            yield sequence.weight_T.tobytes()
            yield b"" if sequence.encoder_T is None else sequence.encoder_T.tobytes()

    found = ask() if system.answered is None else system.answered.get(asked(), ask=ask)
    return Answers(
        found["texts"],
        found["samples"],
        nll_B=np.array(found["nll"]),
        tokens_B=np.array(found["tokens"]),
        prompt_tokens=found["prompt_tokens"],
        answer_tokens=found["answer_tokens"],
        seconds=found["seconds"],
    )


def _generated(generator: Generator, ids: list[list[int]], *, settings: EvaluateSettings) -> dict[str, Any]:
    """The greedy answer to each prompt, and those that are drawn."""
    completions = generator.generate(ids, sampling=Sampling(max_tokens=settings.max_tokens))
    samples: list[list[str]] | None = None
    if settings.samples is not None:
        sampling = Sampling(max_tokens=settings.max_tokens, temperature=settings.temperature, seed=settings.seed)
        drawn = generator.generate([prompt for prompt in ids for _ in range(settings.samples)], sampling=sampling)
        starts = range(0, len(drawn), settings.samples)
        samples = [[c.text for c in drawn[start : start + settings.samples]] for start in starts]
    num_tokens = sum(len(c.tokens) for c in completions)
    return {"texts": [c.text for c in completions], "samples": samples, "answer_tokens": num_tokens}


def _likelihood(model: Model, rows: list[list[Sequence]]) -> tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihood (nats) and number of target tokens of each row's reference."""
    sequences = [replace(sequence, row=row) for row, found in enumerate(rows) for sequence in found]
    tokens_B = np.zeros(len(rows))
    np.add.at(tokens_B, [s.row for s in sequences], [s.num_targets for s in sequences])
    with model.evaluating():
        nll_B = -model.row_logprobs(sequences, num_rows=len(rows), max_tokens=PACK_TOKENS)
    if not np.isfinite(nll_B).all():
        raise ModelError("the model gives probabilities that are not finite", hint="evaluate another checkpoint")
    return nll_B, tokens_B


def _score(metric: Metric, answers: Answers, *, references: list[str], examples: list[Example]) -> np.ndarray:
    if metric.reads == "samples":
        return metric.score_rows(samples=answers.samples, examples=examples)
    if metric.reads == "text":
        assert answers.texts is not None
        return metric.score_rows(answers.texts, references, **with_examples(metric, examples))
    if metric.name == "perplexity":
        return metric.score_rows(negative_log_likelihood=answers.nll_B, tokens=answers.tokens_B)
    bytes_B = np.array([max(1, len(r.encode())) for r in references], dtype=np.float64)
    return metric.score_rows(negative_log_likelihood=answers.nll_B, bytes=bytes_B)
