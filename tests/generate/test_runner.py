"""Generation against a loop that recomputes the whole sequence for every token, with transformers' own attention."""

import itertools
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend
from transformers import AutoConfig, AutoModelForCausalLM

from tunesmith.data.pack import build_pack
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.types import Sequence
from tunesmith.errors import ModelError, NumericalError
from tunesmith.generate.runner import Completion, Generator, KeyValues, TextPieces, _compacted
from tunesmith.generate.sampling import Sampling, choose
from tunesmith.generate.scheduler import plan_batches
from tunesmith.models import attention
from tunesmith.models.load import Model

REAL_MODEL = Path(__file__).resolve().parents[2] / ".." / "shared" / "models" / "stories260k"
END, BYTES = 0, 1  # ids of the end token and of byte 0
VOCABULARY = BYTES + 256
CONTEXT_TOKENS = 96
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": CONTEXT_TOKENS,
    "bos_token_id": None, "eos_token_id": END, "pad_token_id": None, "initializer_range": 0.3,
}  # fmt: skip
SMALL_GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT_TOKENS,
    "bos_token_id": None, "eos_token_id": END, "initializer_range": 0.3,
}  # fmt: skip
WINDOWED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "gpt2": SMALL_GPT2,
    "qwen3": SIZES,
    "mistral": SIZES | {"sliding_window": 8},
    "gemma2": SIZES | WINDOWED | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": SIZES | WINDOWED,
}
SYSTEM = [BYTES + byte for byte in b"One system prompt that every row begins with."]


def text_ids(text: str) -> list[int]:
    return [BYTES + byte for byte in text.encode()]


PROMPTS = {
    "shared prefix": [SYSTEM + text_ids(text) for text in ("a", "b?", "a longer one", "a", "and the longest of them")],
    "nothing shared": [text_ids(text) for text in ("x", "two", "0123456789 and more", "?")],
    "one prompt begins another": [SYSTEM, SYSTEM + text_ids("!"), SYSTEM + text_ids("!!")],
    "one prompt": [text_ids("alone")],
}


def byte_tokenizer() -> Tokenizer:
    """One token a byte, and the end token."""
    vocabulary = {"<end>": END} | {f"<0x{byte:02X}>": BYTES + byte for byte in range(256)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    return Tokenizer(backend, {"eos_token": "<end>"})


@cache
def toy_models(kind: str, *, dtype: torch.dtype = torch.float64) -> tuple[Model, Any]:
    """A random model with our attention, and the same weights with transformers' own."""
    torch.manual_seed(3)
    ours, theirs = (
        AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **CONFIGS[kind]), attn_implementation=implementation, dtype=dtype
        ).eval()
        for implementation in (attention.NAME, "eager")
    )
    theirs.load_state_dict(ours.state_dict())
    return Model(ours, byte_tokenizer(), kind, None, "", CONTEXT_TOKENS), theirs


@torch.no_grad()
def naive_logits(theirs: Any, ids: list[int]) -> torch.Tensor:
    return theirs(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]


def naive_greedy(
    theirs: Any, prompt: list[int], *, max_tokens: int, stop_ids: set[int]
) -> tuple[list[int], list[float]]:
    """One row, no cache, the whole sequence again for each token."""
    tokens: list[int] = []
    logprobs: list[float] = []
    while len(tokens) < max_tokens and not (tokens and tokens[-1] in stop_ids):
        logprobs_V = naive_logits(theirs, prompt + tokens).log_softmax(-1)
        tokens.append(int(logprobs_V.argmax()))
        logprobs.append(float(logprobs_V[tokens[-1]]))
    return tokens, logprobs


def generate(model: Model, prompts: list[list[int]], *, sampling: Sampling, **keywords: Any) -> list[Completion]:
    keywords.setdefault("stop_ids", [END])
    return Generator(model, **keywords).generate(prompts, sampling=sampling)


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_greedy_equals_the_naive_loop(kind: str, prompts: list[list[int]]) -> None:
    ours, theirs = toy_models(kind)
    completions = generate(ours, prompts, sampling=Sampling(max_tokens=14))
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens, logprobs = naive_greedy(theirs, prompt, max_tokens=14, stop_ids={END})
        assert completion.tokens == tokens
        assert completion.logprobs == pytest.approx(logprobs, abs=1e-5)


def test_the_cases_above_share_a_prefix_where_they_should() -> None:
    def prefixes(name: str) -> list[int]:
        batches = plan_batches(PROMPTS[name], new_tokens=14, batch_tokens=10**5, batch_rows=100)
        return [batch.prefix_tokens for batch in batches]

    assert prefixes("shared prefix") == [len(SYSTEM)]
    assert prefixes("one prompt begins another") == [len(SYSTEM) - 1]
    assert prefixes("nothing shared") == prefixes("one prompt") == [0]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_float32_stays_within_its_rounding(kind: str) -> None:
    ours, theirs = toy_models(kind, dtype=torch.float32)
    prompts = PROMPTS["shared prefix"]
    for prompt, completion in zip(prompts, generate(ours, prompts, sampling=Sampling(max_tokens=8)), strict=True):
        tokens, logprobs = naive_greedy(theirs, prompt, max_tokens=8, stop_ids={END})
        assert completion.tokens == tokens
        assert completion.logprobs == pytest.approx(logprobs, abs=1e-4)


@given(
    st.lists(
        st.tuples(st.sampled_from([0, 3, 30]), st.lists(st.integers(1, 2), min_size=1, max_size=9)).map(
            lambda x: SYSTEM[: x[0]] + x[1]
        ),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 8),
    st.integers(10, 300),
)
@settings(max_examples=25, deadline=None)
def test_completions_do_not_depend_on_the_batch(prompts: list[list[int]], batch_rows: int, batch_tokens: int) -> None:
    ours, _ = toy_models("llama")
    sampling = Sampling(temperature=0.8, max_tokens=5, seed=7)
    together = generate(ours, prompts, sampling=sampling, batch_rows=batch_rows, batch_tokens=batch_tokens)
    first_of_its_kind = {tuple(prompt): row for row, prompt in reversed(list(enumerate(prompts)))}
    for prompt, row in first_of_its_kind.items():
        (alone,) = generate(ours, [list(prompt)], sampling=sampling)
        assert together[row].tokens == alone.tokens
        assert together[row].logprobs == pytest.approx(alone.logprobs, abs=1e-9)


def test_rows_that_end_at_different_times_are_compacted_away() -> None:
    """The commonest greedy tokens end rows, so that many rows end at many different steps."""
    ours, theirs = toy_models("qwen3")
    prompts = [SYSTEM + text_ids(chr(97 + i) * (1 + i % 5)) for i in range(24)]
    free = generate(ours, prompts, sampling=Sampling(max_tokens=12))
    counts = torch.tensor([token for completion in free for token in completion.tokens]).bincount()
    stop_ids = set(counts.argsort(descending=True)[:3].tolist())
    completions = generate(ours, prompts, sampling=Sampling(max_tokens=12), stop_ids=stop_ids)
    assert len({len(completion.tokens) for completion in completions}) >= 4
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens, logprobs = naive_greedy(theirs, prompt, max_tokens=12, stop_ids=stop_ids)
        assert completion.tokens == tokens
        assert completion.logprobs == pytest.approx(logprobs, abs=1e-5)
        assert completion.finish_reason == ("stop" if tokens[-1] in stop_ids else "length")


def test_slots_grow_by_doubling_up_to_what_is_needed() -> None:
    cache_ = KeyValues(prefix_tokens=10, lengths=[13, 11], max_length=30, device=torch.device("cpu"))
    cache_.store_prompts(0, torch.ones(1, 2, 14, 4), torch.ones(1, 2, 14, 4))
    slots = []
    for _ in range(17):
        step = cache_.step(torch.zeros(2, dtype=torch.int64))
        one = torch.full((1, 2, 2, 4), 5.0)
        row_B, slot_B = torch.arange(2), step.position_B - 10
        cache_.append(0, one, one, row_B=row_B, slot_B=slot_B, num_slots=step.num_keys - 10)
        slots.append(cache_.layers[0].own_key.shape[2])
    assert sorted(set(slots)) == [4, 8, 16, 20]
    own_BKCD = cache_.layers[0].own_key
    assert own_BKCD[0, 0, :, 0].tolist() == [1.0] * 3 + [5.0] * 17
    assert own_BKCD[1, 0, :, 0].tolist() == [1.0] * 1 + [5.0] * 17 + [0.0] * 2


def test_keeping_rows_copies_only_those_that_change_their_place() -> None:
    cache_ = KeyValues(prefix_tokens=0, lengths=[1, 2, 3, 4], max_length=9, device=torch.device("cpu"))
    key = torch.arange(10.0).reshape(1, 1, 10, 1)
    cache_.store_prompts(0, key, key)
    before = cache_.layers[0].own_key.clone()
    cache_.keep([0, 3])
    assert cache_.lengths == [1, 4]
    own = cache_.layers[0].own_key
    assert torch.equal(own[:2], before[[0, 3]])
    assert torch.equal(own[2:], before[2:])


def test_drawn_tokens_report_the_probability_they_were_drawn_with() -> None:
    """trl#4159: the sampler's log-probabilities are those of the distribution after temperature and top-p."""
    ours, theirs = toy_models("llama")
    sampling = Sampling(temperature=0.7, top_p=0.9, top_k=20, max_tokens=10, seed=5)
    prompts = PROMPTS["shared prefix"]
    for prompt, completion in zip(prompts, generate(ours, prompts, sampling=sampling), strict=True):
        for n, (token, logprob) in enumerate(zip(completion.tokens, completion.logprobs, strict=True)):
            logits_V = naive_logits(theirs, prompt + completion.tokens[:n])
            sweep_B = torch.arange(0, 1, 1 / 512, dtype=torch.float64)
            tokens_B, logprobs_B = choose(logits_V.expand(512, -1), sampling=sampling, uniform_B=sweep_B)
            assert logprob == pytest.approx(float(logprobs_B[tokens_B == token][0]), abs=1e-5)


def test_draws_of_one_prompt_follow_the_models_distribution() -> None:
    ours, theirs = toy_models("llama")
    prompt, draws = text_ids("again"), 3000
    completions = generate(ours, [prompt] * draws, sampling=Sampling(temperature=0.6, max_tokens=1))
    shares_V = (naive_logits(theirs, prompt) / 0.6).softmax(-1)
    counts_V = torch.tensor([completion.tokens[0] for completion in completions]).bincount(minlength=VOCABULARY)
    often_V = shares_V * draws >= 5
    counts = [*counts_V[often_V].tolist(), int(counts_V[~often_V].sum())]
    expected = [*(shares_V[often_V] * draws).tolist(), float(shares_V[~often_V].sum() * draws)]
    assert len(counts) > 10
    assert chisquare(counts, expected).pvalue > 0.01


def test_the_seed_decides_and_equal_prompts_are_drawn_apart() -> None:
    ours, _ = toy_models("llama")
    prompts = [text_ids("one"), text_ids("two"), text_ids("one")]

    def tokens(prompts: list[list[int]], *, seed: int) -> list[list[int]]:
        sampling = Sampling(temperature=1.0, max_tokens=8, seed=seed)
        return [completion.tokens for completion in generate(ours, prompts, sampling=sampling)]

    first = tokens(prompts, seed=1)
    assert tokens(prompts, seed=1) == first
    assert tokens([prompts[1], prompts[0], prompts[2]], seed=1) == [first[1], first[0], first[2]]
    assert first[0] != first[2]
    assert all(a != b for a, b in zip(first, tokens(prompts, seed=2), strict=True))


def test_a_stop_id_ends_the_tokens_and_is_not_in_the_text() -> None:
    ours, _ = toy_models("llama")
    (free,) = generate(ours, PROMPTS["one prompt"], sampling=Sampling(max_tokens=6))
    (completion,) = generate(ours, PROMPTS["one prompt"], sampling=Sampling(max_tokens=6), stop_ids=[free.tokens[3]])
    end = free.tokens.index(free.tokens[3]) + 1
    assert completion.tokens == free.tokens[:end]
    assert len(completion.logprobs) == end
    assert completion.finish_reason == "stop"
    assert completion.text == ours.tokenizer.decode(free.tokens[: end - 1])


def ascii_model() -> Model:
    """A toy model that can only write printable ASCII (its head is bent towards it)."""
    config = AutoConfig.for_model("llama", **CONFIGS["llama"])
    torch.manual_seed(5)
    causal = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME, dtype=torch.float64).eval()
    head = torch.nn.Linear(32, VOCABULARY, dtype=torch.float64)
    head.weight.data.copy_(causal.lm_head.weight)
    head.bias.data.fill_(-1000.0)
    head.bias.data[[BYTES + byte for byte in range(32, 127)]] = 0.0
    causal.lm_head = head
    return Model(causal, byte_tokenizer(), "ascii", None, "", CONTEXT_TOKENS)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_stop_text_ends_the_completion_and_is_cut(length: int) -> None:
    model, prompt = ascii_model(), text_ids("write")
    (free,) = generate(model, [prompt], sampling=Sampling(temperature=1.0, max_tokens=40))
    assert len(free.text) == 40
    stop = free.text[17 : 17 + length]
    sampling = Sampling(temperature=1.0, max_tokens=40, stop=("never written", stop))
    (completion,) = generate(model, [prompt], sampling=sampling)
    at = free.text.index(stop)
    assert completion.text == free.text[:at]
    assert completion.tokens == free.tokens[: at + length]
    assert completion.finish_reason == "stop"
    assert "".join(Generator(model, stop_ids=[END]).stream(prompt, sampling=sampling)) == completion.text


def test_what_does_not_fit_the_context_is_clipped_or_refused() -> None:
    ours, _ = toy_models("gpt2")
    prompts = [[5] * (CONTEXT_TOKENS - 3), [5]]
    clipped, whole = generate(ours, prompts, sampling=Sampling(max_tokens=10), stop_ids=[])
    assert (len(clipped.tokens), clipped.finish_reason) == (3, "length")
    assert (len(whole.tokens), whole.finish_reason) == (10, "length")
    with pytest.raises(ModelError, match=rf"prompt 1 has {CONTEXT_TOKENS} tokens.*at most {CONTEXT_TOKENS - 1}"):
        generate(ours, [[5], [5] * CONTEXT_TOKENS], sampling=Sampling())
    with pytest.raises(ModelError, match="prompt 0 has no tokens"):
        generate(ours, [[]], sampling=Sampling())
    assert generate(ours, [], sampling=Sampling()) == []


def test_a_broken_model_is_reported() -> None:
    model = ascii_model()
    model.causal.lm_head.bias.data[7] = math.nan
    with pytest.raises(NumericalError):
        generate(model, [[1]], sampling=Sampling())


def test_every_token_is_told_as_it_is_drawn() -> None:
    ours, _ = toy_models("llama")
    told: list[Any] = []
    generator = Generator(ours, stop_ids=[END], batch_rows=2)
    completions = generator.generate(PROMPTS["shared prefix"], sampling=Sampling(max_tokens=5), on_token=told.append)
    for row, completion in enumerate(completions):
        mine = [drawn for drawn in told if drawn.row == row]
        assert [drawn.token for drawn in mine] == completion.tokens
        assert [drawn.finish_reason for drawn in mine] == [None] * (len(mine) - 1) + [completion.finish_reason]


def test_a_model_in_training_draws_without_dropout_and_goes_on_training() -> None:
    config = AutoConfig.for_model("gpt2", **CONFIGS["gpt2"], resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.0)
    causal = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    model = Model(causal, byte_tokenizer(), "gpt2", None, "", CONTEXT_TOKENS)
    expected = generate(model, [[1, 2]], sampling=Sampling(max_tokens=4))
    causal.train()
    assert generate(model, [[1, 2]], sampling=Sampling(max_tokens=4)) == expected
    assert causal.training
    row = Sequence(np.array([1, 2, 3], dtype=np.int32), np.array([0, 1, 1], dtype=np.float32))
    assert model.hidden(model.attention(build_pack([row]))).requires_grad


def test_streamed_pieces_join_to_the_text() -> None:
    model = ascii_model()
    sampling = Sampling(temperature=1.0, max_tokens=20, seed=2)
    generator = Generator(model, stop_ids=[END])
    pieces = list(generator.stream(text_ids("go"), sampling=sampling))
    assert len(pieces) == 20
    assert "".join(pieces) == generator.generate([text_ids("go")], sampling=sampling)[0].text


def pushed(tokenizer: Tokenizer, ids: list[int], *, stop: tuple[str, ...] = ()) -> list[str]:
    pieces = TextPieces(tokenizer, stop=stop)
    return [piece for piece in [*map(pieces.push, ids), pieces.close()] if piece]


@given(st.text(max_size=30))
def test_no_piece_ends_within_a_character(text: str) -> None:
    pieces = pushed(byte_tokenizer(), text_ids(text))
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@given(st.text("ab€", max_size=20), st.lists(st.text("ab€", min_size=1, max_size=4), min_size=1, max_size=3))
@settings(max_examples=200)
def test_nothing_of_a_stop_text_is_given_out(text: str, stop: list[str]) -> None:
    pieces = pushed(byte_tokenizer(), text_ids(text), stop=tuple(stop))
    prefixes = [text[:n] for n in range(len(text) + 1)]
    complete = next((prefix for prefix in prefixes if any(prefix.endswith(word) for word in stop)), None)
    expected = text if complete is None else text[: min(text.find(w) for w in stop if w in complete)]
    assert "".join(pieces) == expected


def test_bytes_that_are_no_text_are_given_out_in_the_end() -> None:
    assert pushed(byte_tokenizer(), [BYTES + 0xFF, BYTES + 0xE2]) == ["\ufffd\ufffd"]


@pytest.mark.skipif(not REAL_MODEL.is_dir(), reason="the small real models are not in ../shared")
@given(st.text("ab .,\n€é🎈", max_size=25))
@settings(max_examples=50, deadline=None)
def test_pieces_of_a_trained_tokenizer_join_to_its_text(text: str) -> None:
    tokenizer = _from_folder(REAL_MODEL)
    (ids,) = tokenizer.encode_text([text])
    assert "".join(pushed(tokenizer, ids)) == tokenizer.decode(ids)


@cache
def _from_folder(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


def test_compaction_fills_the_holes_from_the_end() -> None:
    for alive in itertools.product([False, True], repeat=6):
        order = _compacted(list(alive))
        assert sorted(order) == [row for row in range(6) if alive[row]]
        assert sum(new != old for new, old in enumerate(order)) <= alive.count(False)
