"""How hard rows are for a model: how unlikely it finds an answer, and how little the question tells it of that.

    s(A | Q) = -1/T sum_t log p(a_t | Q, a_<t)        nats a token of the answer A behind its question Q; e^s: perplexity
    s(A)     = -1/T sum_t log p(a_t | a_<t)           the same without the question
    IFD      = s(A | Q) / s(A)                        instruction-following difficulty (Li et al. 2024, eq. 3)

The same tokens are predicted on both sides: those of the last answer, with its end. Where a tokenizer puts nothing before a
text, the first of them is left out on both.

Shapes: B rows, T tokens, M = 2 B.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from tunesmith.data.template import ChatTemplate
from tunesmith.data.types import Example, Sequence
from tunesmith.errors import ModelError
from tunesmith.evaluate.run import PACK_TOKENS, only_last
from tunesmith.models.load import Model


def scorer(model: Model, *, template: ChatTemplate) -> Callable[[list[Example]], np.ndarray]:
    """The function from rows to float64 [B, 2]: s(A | Q) and s(A). Of plain text the first is that of the text.

    It is NaN where there is nothing to predict, or where the row is longer than the context. Raises ModelError where the
    model does not predict text from left to right, or gives what is not finite.
    """
    if model.is_encoder or model.is_encoder_decoder:
        raise ModelError("the model does not read a text from left to right", hint="name a causal language model")

    def score(examples: list[Example]) -> np.ndarray:
        with model.evaluating():
            return _scores(examples, model=model, template=template)

    return score


def _scores(examples: list[Example], *, model: Model, template: ChatTemplate) -> np.ndarray:
    begin = list(template.tokenizer.begin_ids)
    sequences: list[Sequence] = []
    num_tokens_M = np.zeros(2 * len(examples))
    for number, whole in enumerate(_sequences(examples, template=template)):
        answer = whole.tokens_T[whole.weight_T > 0]
        num_tokens = len(answer) if begin else len(answer) - 1
        if num_tokens < 1 or len(whole.tokens_T) > model.context_tokens:
            continue
        sides = [whole.tokens_T]
        if examples[number].plain_text is None:
            sides.append(np.array([*begin, *answer], np.int32))
        for place, tokens_T in enumerate(sides, start=2 * number):
            sequences.append(replace(_predicting(tokens_T, num_tokens=num_tokens), row=place))
            num_tokens_M[place] = num_tokens
    logprob_M = model.row_logprobs(sequences, num_rows=len(num_tokens_M), max_tokens=PACK_TOKENS)
    if not np.isfinite(logprob_M).all():
        raise ModelError("the model gives probabilities that are not finite", hint="use another base")
    with np.errstate(invalid="ignore"):
        return (-logprob_M / num_tokens_M).reshape(-1, 2)


def _predicting(tokens_T: np.ndarray, *, num_tokens: int) -> Sequence:
    """The tokens, of which the last ones are predicted."""
    weight_T = np.zeros(len(tokens_T), np.float32)
    weight_T[len(tokens_T) - num_tokens :] = 1
    return Sequence(tokens_T, weight_T)


def _sequences(examples: list[Example], *, template: ChatTemplate) -> list[Sequence]:
    """Each row up to the end of its last answer, with the answer's tokens as targets; of plain text all tokens are."""
    asked = [only_last(row, list(row.asked[0])) for row in examples if row.plain_text is None]
    conversations = iter(template.sequences(asked))
    texts = iter(template.tokenizer.encode_text([text for row in examples if (text := row.plain_text) is not None]))
    begin = list(template.tokenizer.begin_ids)
    found = []
    for row in examples:
        if row.plain_text is None:
            found.append(next(conversations)[-1])
        else:
            ids = next(texts)
            weights = [0.0] * len(begin) + [1.0] * len(ids)
            found.append(Sequence(np.array([*begin, *ids], np.int32), np.array(weights, np.float32)))
    return found
