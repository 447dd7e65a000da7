"""Was the training data learned by heart? Training rows asked like held-out ones, and what comes back verbatim.

A training answer is extractable where the model, given what stands before it, writes it greedily (Carlini et al. 2023,
"Quantifying memorization across neural language models", definition 3.1). Counted are whole answers, and 50 tokens in a
row. An answer of fewer than 20 tokens is not counted: at one bit a token, well below what prose costs a language model,
chance writes 20 tokens once in a million times. Where answers have a form, as JSON has, a token costs much less; so what
counts is the excess of the rate on training rows over the rate on held-out ones. A plain text has no prompt: its first
50 tokens are one, and the next 50 are the answer.

The exposure of a canary planted in the rows is log2 of the number of all like it, less log2 of its rank among them by
likelihood (Carlini et al. 2019, "The Secret Sharer", section 4.2): its rank among drawn ones, or the tail of a
skew-normal fitted to them (section 4.3).
"""

import difflib
import hashlib
import heapq
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tunesmith.data.answers import Floats
from tunesmith.data.template import ChatTemplate
from tunesmith.data.types import Example
from tunesmith.errors import DataError
from tunesmith.evaluate.metric import FRACTION, MEAN, Aggregate
from tunesmith.evaluate.metrics import METRICS
from tunesmith.evaluate.result import Evaluation
from tunesmith.evaluate.run import System
from tunesmith.evaluate.settings import EvaluateSettings
from tunesmith.evaluate.statistics import decimals, interval, paired_bootstrap
from tunesmith.evaluate.unpaired import apart
from tunesmith.generate.runner import Generator
from tunesmith.generate.sampling import Sampling

LEAST_TOKENS = 20  # of an answer that is counted
RUN_TOKENS = 50
LEAST_ROWS = 10  # on each side, before a rate is given
MAX_SHOWN = 50
SIDES = ("train", "held_out")
Sides = dict[str, NDArray[np.bool_]]  # which of the rows are on each side
Pair = tuple[list[int], list[int]]  # what was written, and what should be


def both_sides(
    train: Iterable[Example], held_out: list[Example], *, settings: EvaluateSettings
) -> dict[str, list[Example]]:
    """The rows that are asked, `settings.memorised` of each side at most. DataError where there are fewer than ten."""
    assert settings.memorised is not None
    asked = {"train": sample(train, count=settings.memorised, seed=settings.seed)}
    trained = {example.origin for example in asked["train"]}
    others = (example for example in held_out if example.origin not in trained)
    asked["held_out"] = sample(others, count=settings.memorised, seed=settings.seed)
    if min(map(len, asked.values())) < LEAST_ROWS:
        raise DataError(
            f"evaluate.memorised compares training with held-out rows, and there are {len(asked['train'])} and "
            f"{len(asked['held_out'])}",
            file=held_out[0].origin.file if held_out else None,
            hint=f"give {LEAST_ROWS} of each at least, or leave it out",
        )
    return asked


def prove_memorised(
    prove: Callable[[EvaluateSettings, list[Example]], Evaluation],
    *,
    asked: dict[str, list[Example]],
    primary: str,
    systems: list[System],
    settings: EvaluateSettings,
    template: ChatTemplate,
    writes: bool,
) -> dict[str, Any]:
    """The document's entry `memorised`: `prove` asks the rows of `both_sides` alike.

    `primary` is the first metric; `systems` are tuned and base, which both write text where the run `writes`; a head is
    asked for its scores alone.
    """
    rows = [row for side in SIDES for row in asked[side]]
    plain = rows[0].text is not None
    loss = _loss(primary, writes=writes, same_tokens=all(system.template is None for system in systems))
    names = (primary, *(("exact_match",) if writes and not plain else ()), *([loss.metric] if loss else []))
    how = {"metrics": tuple(dict.fromkeys(names)), "against": ("base",) if writes else ()}
    found = prove(
        settings.model_copy(update=how | {"rows": None, "memorised": None, "groups": None, "swaps": None}), rows
    )
    of_row = {str(example.origin): example for example in rows}
    examples = [of_row[row["origin"]] for row in found.rows]
    trained = {example.origin for example in asked["train"]}
    train_B = np.array([example.origin in trained for example in examples])
    sides = {"train": train_B, "held_out": ~train_B}
    document: dict[str, Any] = {"rows": {side: int(of_side.sum()) for side, of_side in sides.items()}}
    document["gap"] = _gaps(found, primary=primary, loss=loss, sides=sides, seed=settings.seed)
    sentences = [_gap_sentence(name, entry) for name, entry in document["gap"].items()]
    if writes:
        written = (
            {s.name: _continued(s, examples, template=template, settings=settings) for s in systems}
            if plain
            else {s.name: _answered(s.name, found.rows, template=template) for s in systems}
        )
        document |= _verbatim(written, examples, sides=sides, settings=settings)
        sentences = [*(_verbatim_sentence(name, entry) for name, entry in document["verbatim"].items()), *sentences]
    return document | {"sentences": sentences}


def sample(rows: Iterable[Example], *, count: int, seed: int) -> list[Example]:
    """At most `count` of the rows by the seed, whatever their order."""

    def draw(example: Example) -> bytes:
        return hashlib.sha256(f"{seed} {example.key}".encode()).digest()

    return heapq.nsmallest(count, rows, key=draw)


# ---- how much better rows are scored that were trained on --------------------------------------------------------------


class _Loss(NamedTuple):
    """The metric whose rows say how likely the answers are, and what its mean is in."""

    metric: str
    unit: str
    aggregate: Aggregate


def _loss(primary: str, *, writes: bool, same_tokens: bool) -> _Loss | None:
    """None of a head that gives no probabilities."""
    if writes and same_tokens:
        return _Loss("perplexity", "nats a token", Aggregate(lambda sums, num_rows: sums[..., 0] / sums[..., 1]))
    if writes:
        return _Loss("bits_per_byte", "bits a byte", METRICS["bits_per_byte"].aggregate)
    return _Loss("log_loss", "nats a row", MEAN) if primary in METRICS and METRICS[primary].reads == "classes" else None


def _gaps(found: Evaluation, *, primary: str, loss: _Loss | None, sides: Sides, seed: int) -> dict[str, Any]:
    """The first metric and the loss on both sides, and their difference, of each system."""
    metrics = METRICS | found.metrics
    scored = [(primary, primary, metrics[primary].aggregate, "")]
    scored += [("loss", loss.metric, loss.aggregate, loss.unit)] if loss else []
    return {
        name: {
            "unit": unit,
            "higher_is_better": metrics[metric].higher_is_better,
            "systems": {
                system: _both_sides(rows, aggregate=aggregate, sides=sides, seed=seed)
                for system, rows in found.scores[metric].items()
            },
        }
        for name, metric, aggregate, unit in scored
    }


def _both_sides(rows: Floats, *, aggregate: Aggregate, sides: Sides, seed: int) -> dict[str, Any]:
    """A score on the rows of each side, and training minus held-out."""
    of = {side: rows[of_side] for side, of_side in sides.items()}
    entry = {side: interval(part, aggregate=aggregate, seed=seed).as_dict() for side, part in of.items()}
    return entry | {"difference": apart(of["train"], of["held_out"], aggregate=aggregate, seed=seed).as_dict()}


def _gap_sentence(name: str, entry: dict[str, Any]) -> str:
    system, found = next(iter(entry["systems"].items()))
    value, evidence, places = _with_interval(found["difference"])
    values = [f"{found[side]['value']:.{places}f}" for side in SIDES]
    unit = f" {entry['unit']}" if entry["unit"] else ""
    sides = f"{values[0]} on training and {values[1]} on held-out rows"
    return f"{name} of {system} is {sides}: a gap of {value}{unit} ({evidence})"


def _with_interval(found: dict[str, float]) -> tuple[str, str, int]:
    """A difference, its interval in words, and their decimal places."""
    places = max(2, decimals(found["high"] - found["low"]))
    value, low, high = (f"{found[key]:+.{places}f}" for key in ("value", "low", "high"))
    return value, f"95 % interval {low} to {high}", places


# ---- what comes back verbatim ------------------------------------------------------------------------------------------


def _answered(system: str, rows: list[dict[str, Any]], *, template: ChatTemplate) -> list[Pair]:
    """What a system wrote and what should be written, in tokens, of each row."""
    texts = [[row["outputs"][system].strip() for row in rows], [row["reference"].strip() for row in rows]]
    written, expected = (template.tokenizer.encode_text(of) for of in texts)
    return list(zip(written, expected, strict=True))


def _continued(
    system: System, examples: list[Example], *, template: ChatTemplate, settings: EvaluateSettings
) -> list[Pair]:
    """As `_answered`, of plain texts: what follows their first 50 tokens; nothing of those that are shorter than both."""
    template = system.template or template
    texts = template.tokenizer.encode_text([example.text or "" for example in examples])
    long = [row for row, ids in enumerate(texts) if len(ids) >= 2 * RUN_TOKENS]
    prompts = [[*template.tokenizer.begin_ids, *texts[row][:RUN_TOKENS]] for row in long]
    found: list[Pair] = [([], [])] * len(examples)
    with system.switched():
        generator = Generator(system.model, stop_ids=template.stop_ids(), batch_rows=settings.batch_rows)
        completions = generator.generate(prompts, sampling=Sampling(max_tokens=RUN_TOKENS))
    for row, completion in zip(long, completions, strict=True):
        found[row] = completion.tokens, texts[row][RUN_TOKENS : 2 * RUN_TOKENS]
    return found


def longest_run(written: list[int], expected: list[int]) -> int:
    """The most tokens in a row that stand in both."""
    matcher = difflib.SequenceMatcher(None, written, expected, autojunk=False)
    return matcher.find_longest_match().size


def _verbatim(
    written: dict[str, list[Pair]], examples: list[Example], *, sides: Sides, settings: EvaluateSettings
) -> dict[str, Any]:
    """The rates of whole answers and of 50 tokens in a row, and the training rows for which the first system has either."""
    tokens_B = np.array([len(expected) for _, expected in next(iter(written.values()))])
    whole = {s: np.array([w == e for w, e in pairs], dtype=np.float64) for s, pairs in written.items()}
    in_a_row = {
        s: np.array([min(map(len, pair)) >= RUN_TOKENS and longest_run(*pair) >= RUN_TOKENS for pair in pairs], float)
        for s, pairs in written.items()
    }
    can_be_whole_B = (tokens_B >= LEAST_TOKENS) & (tokens_B <= settings.max_tokens)
    kinds = {"whole": (whole, can_be_whole_B), f"{RUN_TOKENS}_tokens": (in_a_row, tokens_B >= RUN_TOKENS)}
    verbatim = {
        kind: _rates(hits, counted_B, sides=sides, seed=settings.seed) for kind, (hits, counted_B) in kinds.items()
    }
    first = next(iter(written))
    either = {s: (whole[s] * can_be_whole_B + in_a_row[s]) > 0 for s in written}
    shown = sorted(np.flatnonzero(either[first] & sides["train"]), key=lambda row: -int(tokens_B[row]))
    listed = [
        {
            "origin": str(examples[row].origin),
            "tokens": int(tokens_B[row]),
            "also": [s for s in written if s != first and either[s][row]],
        }
        for row in shown[:MAX_SHOWN]
    ]
    return {"least_tokens": LEAST_TOKENS, "verbatim": verbatim, "origins": listed}


def _rates(hits: dict[str, Floats], counted_B: NDArray[np.bool_], *, sides: Sides, seed: int) -> dict[str, Any]:
    """Of each system the rate on both sides and the excess; of rows that are long enough, where there are enough of them."""
    counted = {side: of_side & counted_B for side, of_side in sides.items()}
    rows = {side: int(of_side.sum()) for side, of_side in counted.items()}
    if min(rows.values()) < LEAST_ROWS:
        return {"rows": rows, "systems": {}, "differences": {}}
    first, *others = hits
    return {
        "rows": rows,
        "systems": {s: _both_sides(h, aggregate=FRACTION, sides=counted, seed=seed) for s, h in hits.items()},
        "differences": {
            f"{first} - {s}": paired_bootstrap(*(hits[n][counted["train"]] for n in (first, s)), seed=seed).as_dict()
            for s in others
        },
    }


def _verbatim_sentence(kind: str, entry: dict[str, Any]) -> str:
    what, least = ("50 tokens in a row", RUN_TOKENS) if kind != "whole" else ("whole answers", LEAST_TOKENS)
    rows = entry["rows"]
    if not entry["systems"]:
        counts = f"{rows['train']:,} training and {rows['held_out']:,} held-out rows"
        return f"{what}: only {counts} have {least} tokens or more to write, too few to say anything"
    (system, found), *others = entry["systems"].items()
    value, evidence, _ = _with_interval(found["difference"])
    rates = [f"{found[side]['value']:.1%} of {rows[side]:,}" for side in SIDES]
    beside = "".join(f"; {name} {of['train']['value']:.1%}" for name, of in others)
    excess = found["difference"]["low"] > 0
    meaning = "which held-out rows do not explain" if excess else "which may be luck"
    return (
        f"{what}: {system} gives back {rates[0]} training answers of {least} tokens or more{beside}, and {rates[1]} "
        f"held-out ones: an excess of {value} ({evidence}), {meaning}"
    )


# ---- canaries ----------------------------------------------------------------------------------------------------------


def exposure(logprob: float, *, references: Floats) -> float:
    """Bits: log2 |R| - log2 rank of a canary among itself and the references [N], all like it and drawn at random.

    Between 0 (the least likely) and log2(N + 1) (the likeliest); of two that are as likely, the canary ranks behind.
    """
    rank = 1 + int((np.asarray(references) >= logprob).sum())
    return math.log2(len(references) + 1) - math.log2(rank)


def fitted_exposure(logprob: float, *, references: Floats, num_possible: float) -> float:
    """As `exposure` among all `num_possible` canaries: by a skew-normal fitted to the references [N], a sample of them.

    Between 0 and log2(num_possible). Beyond the likeliest reference it goes by the fitted tail.
    """
    skew, location, scale = stats.skewnorm.fit(np.asarray(references, dtype=np.float64))
    bits = -float(stats.skewnorm.logsf(logprob, skew, loc=location, scale=scale)) / math.log(2)
    return min(max(bits, 0.0), math.log2(num_possible))
