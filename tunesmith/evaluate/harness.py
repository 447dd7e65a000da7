"""Tasks of lm-evaluation-harness (Gao et al. 2024), asked through its Python interface and answered by our engine.

The harness brings the tasks, the prompts and the metrics; here a model answers what it asks. Requests of a task come
together, so what their contexts have in common is computed once. Needs the extra `bench`.
"""

import os
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.data.types import Sequence
from tunesmith.errors import DataError, ModelError, NotFoundError
from tunesmith.generate.runner import Generator
from tunesmith.generate.sampling import Sampling
from tunesmith.models.load import Model
from tunesmith.tasks.likelihood import PACK_TOKENS, continuation_logprobs, encoded_pair

LONGEST_ANSWER = 256  # tokens, where a task does not say


def harness_model(model: Model, *, batch_rows: int = 64) -> Any:
    """The model as the harness wants one: an `lm_eval.api.model.LM`. ModelError where the harness is not installed."""
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise ModelError(
            f"lm-evaluation-harness cannot be used: {error}", hint="pip install 'tunesmith[bench]'"
        ) from None

    class HarnessModel(LM):
        """Answers requests; `args` of each is what its method says."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            logprob_B, greedy_B, _ = continuation_logprobs(model, [request.args for request in requests])
            return [(float(logprob), bool(best)) for logprob, best in zip(logprob_B, greedy_B, strict=True)]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return text_logprobs(model, [request.args[0] for request in requests]).tolist()

        def generate_until(self, requests: list[Any]) -> list[str]:
            return [_generated(model, *request.args, batch_rows=batch_rows) for request in requests]

    return HarnessModel()


def text_logprobs(model: Model, texts: SequenceOf[str]) -> np.ndarray:
    """log p [B] of whole texts in nats. A longer text is read in the harness's own windows, each token predicted once."""
    from lm_eval.utils import get_rolling_token_windows

    sequences = []
    for row, text in enumerate(texts):
        begin, tokens = encoded_pair(model.tokenizer, context="", continuation=text)
        windows = get_rolling_token_windows(tokens, begin[-1], max_seq_len=model.room_tokens - 1, context_len=1)
        for read, predicted in windows:
            tokens_T = np.array([*read, predicted[-1]], dtype=np.int32)
            weight_T = np.zeros(len(tokens_T), dtype=np.float32)
            weight_T[-len(predicted) :] = 1
            sequences.append(Sequence(tokens_T, weight_T, row))
    return model.row_logprobs(sequences, num_rows=len(texts), max_tokens=PACK_TOKENS)


def _generated(model: Model, context: str, options: dict[str, Any], *, batch_rows: int) -> str:
    """What a model goes on with; `options` are the harness's: until, max_gen_toks, do_sample, temperature, top_p."""
    until = options.get("until") or []
    stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    sampling: dict[str, Any] = {}
    if options.get("do_sample") and options.get("temperature"):
        sampling = {"temperature": options["temperature"], "top_p": options.get("top_p", 1.0)}
    longest = int(options.get("max_gen_toks") or options.get("max_tokens") or LONGEST_ANSWER)
    longest = min(longest, model.room_tokens // 2)
    ids = [*model.tokenizer.begin_ids, *model.tokenizer.encode_text([context])[0]][-(model.room_tokens - longest) :]
    generator = Generator(model, stop_ids=[model.tokenizer.eos_id], batch_rows=batch_rows)
    (completion,) = generator.generate([ids], sampling=Sampling(max_tokens=longest, stop=stop, **sampling))
    return completion.text


def run_harness(
    model: Model, *, tasks: list[str], include: Path | None = None, rows: int | None = None
) -> dict[str, dict[str, Any]]:
    """For each task its metrics, as the harness computes them, and what they are of each row.

    `tasks` are names that the harness knows, or those of the task files in the folder `include`. Raises NotFoundError for
    an unknown task, DataError where its rows cannot be had.
    """
    lm = harness_model(model)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    manager = TaskManager(include_path=None if include is None else str(include))
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise NotFoundError(
            f"lm-evaluation-harness knows no task '{unknown[0]}'",
            hint="name another, or the folder of its file with --include",
        )
    try:
        found = simple_evaluate(
            model=lm, tasks=list(tasks), task_manager=manager, limit=rows, log_samples=True, bootstrap_iters=0
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"the rows of {', '.join(tasks)} cannot be had: {error}",
            hint="tasks of the hub need a network, or a local copy named in a task file of your own",
        ) from error
    assert found is not None, "another rank has the result"
    return {name: _scores(found, name) for name in found["samples"]}


def _scores(found: dict[str, Any], name: str) -> dict[str, Any]:
    """A task's metrics and their values of each row, in the order of the documents."""
    metrics = {
        key.removesuffix(",none"): float(value)
        for key, value in found["results"][name].items()
        if isinstance(value, int | float) and "_stderr" not in key and "," in key
    }
    samples = sorted(found["samples"][name], key=lambda sample: int(sample["doc_id"]))
    rows = {metric: [sample.get(metric) for sample in samples] for metric in metrics}
    numeric = {
        metric: [float(value) for value in values]
        for metric, values in rows.items()
        if all(isinstance(value, int | float) for value in values)
    }
    better = found.get("higher_is_better", {}).get(name, {})
    return {
        "rows": len(samples),
        "metrics": metrics,
        "by_row": numeric,
        "higher_is_better": {metric: better.get(metric) is not False for metric in metrics},
        "version": found.get("versions", {}).get(name),
    }
