"""Objectives that read words, pairs of texts or a teacher, against references written down naively."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tunesmith.data.answers import Tags, entities
from tunesmith.data.pack import Pack, build_pack, build_packs, build_unit_packs
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokenizer import Tokenizer
from tunesmith.data.tokens import TokenStore, TokenWriter, write_groups
from tunesmith.data.types import Example, Origin, Sequence
from tunesmith.errors import DataError
from tunesmith.models.load import Model
from tunesmith.models.readout import target_divergences
from tunesmith.objectives.base import Readout
from tunesmith.objectives.contrastive import Contrastive
from tunesmith.objectives.distillation import Distillation
from tunesmith.objectives.token_classification import TokenClassification
from tunesmith.train.passes import forward

BuildModel = Callable[..., Model]
TAGS = ("B-X", "I-X", "O")
TAGGER = TokenClassification(labels=TAGS, pooling="last")
PAIRS = Contrastive(labels=("a", "b"), several=False, pooling="mean")


def readout_of(pack: Pack, value: Tensor, divergence_N: Tensor | None = None) -> Readout:
    weight_N = torch.from_numpy(pack.weight_N).to(value.dtype)
    return Readout(value, weight_N, torch.from_numpy(pack.sequence_N), len(pack.rows_S), divergence_N)


# ------------------------------------------------------------------------------------------------------------ words


def tagged(words: tuple[str, ...], tags: tuple[str, ...]) -> Example:
    return Example(Origin("rows.jsonl", 3), "tagged", words=words, label=tags)


@pytest.fixture(scope="module")
def template(toy_tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(toy_tokenizer)


def sentences(tags_of: list[tuple[int, ...]]) -> list[Sequence]:
    """Rows of three tokens a word, each word read at its third."""
    rows = []
    for row, tags in enumerate(tags_of):
        weight_T = np.tile(np.array([0, 0, 1], np.float32), len(tags))
        tokens_T = np.arange(3 * len(tags), dtype=np.int32) + row % 2
        rows.append(Sequence(tokens_T, weight_T, row, np.array(tags, np.float32)))
    return rows


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple), min_size=1, max_size=5),
    st.sampled_from([1, 1 << 30]),
    st.integers(1, 20),
)
def test_tags_cost_their_cross_entropy_however_rows_are_laid_out(
    tags_of: list[tuple[int, ...]], min_shared: int, max_tokens: int
) -> None:
    rows = sentences(tags_of)
    table = torch.randn(5, 12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = sum(-float(table[i, w].log_softmax(-1)[t]) for i, tags in enumerate(tags_of) for w, t in enumerate(tags))
    words = sum(map(len, tags_of))
    for layout in ([build_pack(rows, min_shared=min_shared)], list(build_packs(rows[::-1], max_tokens=max_tokens))):
        total = count = 0.0
        for pack in layout:
            value = torch.cat([table[row, : len(tags_of[row])] for row in pack.rows_S.tolist()])
            loss = TAGGER.loss(readout_of(pack, value), pack)
            assert loss.count == TAGGER.count(pack)
            assert loss.metrics["accuracy"][1] == loss.count
            total, count = total + float(loss.sum), count + loss.count
        assert total == pytest.approx(expected, rel=1e-12)
        assert count == words


def test_a_tag_by_hand_and_its_gradient() -> None:
    """Probabilities 1/2 and 1/4 of the right tags: (ln 2 + ln 4) / 2."""
    pack = build_pack(sentences([(1, 0)]))
    value = torch.tensor([[1 / 4, 1 / 2, 1 / 4], [1 / 4, 1 / 2, 1 / 4]], dtype=torch.float64).log().requires_grad_()
    loss = TAGGER.loss(readout_of(pack, value), pack)
    assert float(loss.sum.detach()) / loss.count == pytest.approx(3 * math.log(2) / 2)
    assert loss.metrics == {"accuracy": (1.0, 2.0)}
    assert torch.autograd.gradcheck(lambda x: TAGGER.loss(readout_of(pack, x), pack).sum, (value,))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters=" "), min_size=1, max_size=5), min_size=1))
def test_every_word_is_read_at_a_token_of_its_own(template: ChatTemplate, words: list[str]) -> None:
    example = tagged(tuple(words), ("O",) * len(words))
    for pooling, place in (("first", 0), ("last", -1)):
        objective = TAGGER.model_copy(update={"pooling": pooling})
        (row,) = objective.sequences([example], template=template, max_tokens=1 << 20)
        sequence = row[0]
        text, start = " ".join(words), len(template.tokenizer.begin_ids)
        encoding = template.tokenizer._plain.encode(text, add_special_tokens=False)
        assert sequence.tokens_T[start : start + len(encoding.ids)].tolist() == encoding.ids
        marked = [int(t) - start for t in np.flatnonzero(sequence.weight_T)]
        assert len(marked) == len(words)
        begin = 0
        for word, token in zip(words, marked, strict=True):
            holding = [t for t, (a, b) in enumerate(encoding.offsets) if a < begin + len(word) and b > begin]
            assert token == holding[place]
            begin += len(word) + 1
        assert sequence.values is not None
        assert len(sequence.values) == len(words)


def test_what_is_cut_off_takes_its_tags_with_it(template: ChatTemplate) -> None:
    example = tagged(("ab", "c", "d"), ("B-X", "O", "I-X"))
    ((sequence,),) = TAGGER.sequences([example], template=template, max_tokens=100)
    (short,) = TAGGER.cut([sequence], num_tokens=len(template.tokenizer.begin_ids) + 4)
    assert short.values is not None
    assert short.values.tolist() == [0.0, 2.0]
    assert short.num_targets == 2
    assert Tags((("O",),)).filled([3]).rows == (("O", "O", "O"),)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (tagged(("a",), ("B-Y",)), "'B-Y' is none of objective.labels"),
        (Example(Origin("rows.jsonl", 3), "labelled", text="a", label="b"), "no words with tags"),
    ],
)
def test_rows_without_known_tags_are_refused(template: ChatTemplate, example: Example, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        TAGGER.sequences([example], template=template, max_tokens=100)
    assert (error.value.file, error.value.line) == ("rows.jsonl", 3)
    assert error.value.hint


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-X I-X O B-X", {("X", 0, 2), ("X", 3, 4)}),
        ("B-X B-X", {("X", 0, 1), ("X", 1, 2)}),
        ("I-X I-Y I-Y", {("X", 0, 1), ("Y", 1, 3)}),  # conlleval: another kind begins an entity
        ("O I-X E-X S-Y", {("X", 1, 3), ("Y", 3, 4)}),
        ("B-X E-X I-X", {("X", 0, 2), ("X", 2, 3)}),
        ("X X O Y-Z", {("X", 0, 2), ("Y-Z", 3, 4)}),  # IO notation, and a kind with a dash
        ("O O", set()),
    ],
)
def test_entities_by_hand(tags: str, expected: set[tuple[str, int, int]]) -> None:
    assert entities(tuple(tags.split())) == expected


def test_the_tags_are_those_of_all_rows() -> None:
    rows = [(tagged(("a", "b"), ("O", "B-X")), True), (tagged(("a",), ("I-X",)), False)]
    assert TokenClassification().fitted(rows).labels == TAGS
    with pytest.raises(DataError, match="there are 0 tags"):
        TokenClassification().fitted([(Example(Origin("a", 1), "text", text="a"), True)])


# ------------------------------------------------------------------------------------------------------------ pairs


def unit(first: str, second: str, *, row: int, tokens: tuple[int, int]) -> list[Sequence]:
    """Two texts of two tokens each."""
    return [
        Sequence(np.array([t, t + 1], np.int32), np.ones(2, np.float32), row, np.array(["ab".index(c)], np.float32))
        for c, t in zip((first, second), tokens, strict=True)
    ]


def states(pack: Pack) -> Tensor:
    """Hidden states made up from the token that is read: two dimensions."""
    angle_N = torch.from_numpy(pack.tokens_T[pack.source_N].astype(np.float64))
    return torch.stack([angle_N.cos(), 0.5 * angle_N.sin() + 0.1], dim=1)


def cosine(a: int, b: int) -> float:
    vectors = [np.mean([[math.cos(t), 0.5 * math.sin(t) + 0.1] for t in (x, x + 1)], axis=0) for x in (a, b)]
    return float(vectors[0] @ vectors[1] / np.linalg.norm(vectors[0]) / np.linalg.norm(vectors[1]))


UNITS = [("a", "a", (1, 3)), ("a", "b", (1, 7)), ("b", "b", (7, 7)), ("b", "a", (9, 3))]


@pytest.mark.parametrize("max_tokens", [1, 6, 100])
def test_pairs_cost_the_square_of_their_distance_however_they_are_laid_out(max_tokens: int) -> None:
    units = [unit(a, b, row=row, tokens=tokens) for row, (a, b, tokens) in enumerate(UNITS)]
    expected = sum((cosine(*tokens) - (a == b)) ** 2 for a, b, tokens in UNITS)
    for ordered in (units, units[::-1]):
        packs = list(build_unit_packs(ordered, max_tokens=max_tokens))
        assert sorted(int(row) for pack in packs for row in set(pack.rows_S.tolist())) == [0, 1, 2, 3]
        losses = [PAIRS.loss(readout_of(pack, states(pack)), pack) for pack in packs]
        assert sum(float(loss.sum) for loss in losses) == pytest.approx(expected, rel=1e-12)
        assert [loss.count for loss in losses] == [PAIRS.count(pack) for pack in packs]
        assert sum(loss.count for loss in losses) == 4


def test_a_pair_by_hand_and_its_gradient() -> None:
    """States at 60 degrees have the cosine 1/2, at 90 degrees 0: of one class (1/2)^2 and 1, of two (1/2)^2 and 0."""
    pack = build_pack(unit("a", "a", row=0, tokens=(1, 5)))
    at_60 = torch.tensor([[1.0, 0], [1, 0], [1, math.sqrt(3)], [1, math.sqrt(3)]], dtype=torch.float64)
    at_90 = torch.tensor([[1.0, 0], [1, 0], [0, 2], [0, 2]], dtype=torch.float64)
    other = build_pack(unit("a", "b", row=0, tokens=(1, 5)))
    found = [float(PAIRS.loss(readout_of(p, x), p).sum) for p in (pack, other) for x in (at_60, at_90)]
    assert found == pytest.approx([1 / 4, 1, 1 / 4, 0], abs=1e-12)
    assert torch.autograd.gradcheck(
        lambda x: PAIRS.loss(readout_of(pack, x), pack).sum, (at_60.clone().requires_grad_(),)
    )


@pytest.mark.parametrize("min_shared", [16, 1 << 30])
def test_the_texts_of_a_unit_stay_together_and_the_same_text_is_there_once(min_shared: int) -> None:
    units = [unit(a, b, row=row, tokens=tokens) for row, (a, b, tokens) in enumerate(UNITS)]
    for pack in build_unit_packs(units, max_tokens=8, min_shared=min_shared):
        rows, counts = np.unique(pack.rows_S, return_counts=True)
        assert len(rows)
        assert (counts == 2).all()
        starts = [node.start for node in pack.nodes]
        assert len({int(pack.tokens_T[start]) for start in starts}) == len(starts)


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 5))
def test_pairs_are_drawn_of_every_row(classes: list[int], count: int) -> None:
    objective = Contrastive(labels=tuple("abcd"), several=False, pairs=count)
    values = [np.array([c], np.float32) for c in classes]
    pairs = objective.groups(iter(values))
    assert np.array_equal(pairs, objective.groups(iter(values)))
    sizes = {c: classes.count(c) for c in set(classes)}
    if len(sizes) < 2 or max(sizes.values()) < 2:
        assert len(pairs) == 0
        return
    assert (pairs[:, 0] < pairs[:, 1]).all()
    assert len(np.unique(pairs, axis=0)) == len(pairs) <= 2 * count * len(classes)
    for row, c in enumerate(classes):
        mates = [classes[b if a == row else a] for a, b in pairs.tolist() if row in (a, b)]
        assert mates.count(c) >= min(1, sizes[c] - 1)
        assert len(mates) > mates.count(c)


def test_the_head_is_where_the_gradient_ends() -> None:
    """Against the same loss written down again: its gradient there is zero, and no direction leads further down."""
    random = np.random.default_rng(0)
    objective = Contrastive(labels=("a", "b", "c"), several=False, class_weights={"a": 2.0})
    classes = random.integers(0, 3, 40)
    state_BD = random.normal(size=(40, 5)) * 7 + classes[:, None]
    values = [np.array([c], np.float32) for c in classes]
    head_KD = objective.fitted_head(state_BD, values)
    scale = math.sqrt((state_BD**2).mean())

    def total(head: np.ndarray) -> float:
        logits = state_BD @ head.T
        nll = np.log(np.exp(logits).sum(1)) - logits[np.arange(40), classes]
        return float((np.where(classes == 0, 2.0, 1.0) * nll).sum() + ((head * scale) ** 2).sum() / 2)

    best = total(head_KD)
    for _ in range(50):
        assert total(head_KD + random.normal(size=head_KD.shape) * 1e-3) > best
    assert (state_BD @ head_KD.T).argmax(1).tolist().count(0) > 0


def test_groups_come_back_from_the_store(tmp_path: Path) -> None:
    writer = TokenWriter(tmp_path / "s")
    for row in range(3):
        tokens_T = np.full(2 + row, row, np.int32)
        values = np.array([row], np.float32)
        sequence = Sequence(tokens_T, np.ones(2 + row, np.float32), values=values)
        writer.add([sequence], origin=Origin("rows.jsonl", row + 1))
    writer.close()
    write_groups(tmp_path / "s", groups=np.array([[0, 2], [1, 2]]))
    store = TokenStore(tmp_path / "s")
    assert (len(store), store.num_units, len(store.rows())) == (2, 3, 3)
    assert [[(len(s.tokens_T), s.row) for s in store.unit(i)] for i in range(2)] == [[(2, 0), (4, 0)], [(3, 1), (4, 1)]]
    assert store.origin(1).line == 2
    assert [s.row for s in store.rows().unit(2)] == [2]


# --------------------------------------------------------------------------------------------------------- teachers


def naive_divergence(ours: Tensor, theirs: Tensor, *, temperature: float, reverse: bool) -> list[float]:
    found = []
    for a, b in zip(ours, theirs, strict=True):
        p = [math.exp(float(z) / temperature) for z in a]
        t = [math.exp(float(z) / temperature) for z in b]
        p, t = [x / sum(p) for x in p], [x / sum(t) for x in t]
        pairs = zip(p, t, strict=True) if reverse else zip(t, p, strict=True)
        found.append(sum(x * math.log(x / y) for x, y in pairs))
    return found


@pytest.mark.parametrize(("temperature", "reverse"), [(1.0, False), (2.0, False), (1.0, True), (0.5, True)])
def test_divergences_equal_their_definition_and_have_its_gradient(temperature: float, reverse: bool) -> None:
    torch.manual_seed(3)
    hidden_ND, teacher_ND = torch.randn(5, 4, dtype=torch.float64, requires_grad=True), torch.randn(5, 3).double()
    head, teacher_head = torch.nn.Linear(4, 7, dtype=torch.float64), torch.nn.Linear(3, 9, dtype=torch.float64)
    options: dict[str, Any] = {"temperature": temperature, "reverse": reverse}

    def divergence(hidden: Tensor) -> Tensor:
        return target_divergences(
            hidden, head=head, softcap=None, teacher_ND=teacher_ND, teacher_head=teacher_head, teacher_softcap=None,
            **options,
        )  # fmt: skip

    found_N = divergence(hidden_ND)
    with torch.no_grad():
        ours, theirs = head(hidden_ND), teacher_head(teacher_ND)[:, :7]  # two tokens that only the teacher's table has
    assert found_N.tolist() == pytest.approx(naive_divergence(ours, theirs, **options), rel=1e-9)
    assert torch.autograd.gradcheck(divergence, (hidden_ND,))
    (gradient,) = torch.autograd.grad(found_N.sum(), head.weight)
    step, moved = 1e-6 * torch.randn_like(gradient), []
    for sign in (1, -2):  # to one side, and from there to the other
        with torch.no_grad():
            head.weight += sign * step
            moved.append(float(divergence(hidden_ND).sum()))
    assert float((gradient * step).sum()) == pytest.approx((moved[0] - moved[1]) / 2, rel=1e-4)


def test_teaching_by_hand() -> None:
    """Weights 1 and 3, divergences 0.2 and 0.4 at temperature 2, a quarter of it the rows' own probabilities 1/2 and 1/4."""
    objective = Distillation(teacher="t", temperature=2.0, share=0.75)
    pack = build_pack([Sequence(np.array([5, 6, 7], np.int32), np.array([0, 1, 3], np.float32))])
    logprob_N = torch.tensor([0.5, 0.25], dtype=torch.float64).log()
    divergence_N = torch.tensor([0.2, 0.4], dtype=torch.float64, requires_grad=True)
    loss = objective.loss(readout_of(pack, logprob_N, divergence_N), pack)
    expected = (0.75 * 4 * 0.2 + 0.25 * math.log(2)) + 3 * (0.75 * 4 * 0.4 + 0.25 * math.log(4))
    assert (float(loss.sum.detach()), loss.count) == (pytest.approx(expected), 4.0)
    assert loss.metrics == {"divergence": (pytest.approx(0.2 + 3 * 0.4), 4.0)}
    assert torch.autograd.gradcheck(lambda x: objective.loss(readout_of(pack, logprob_N, x), pack).sum, (divergence_N,))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_through_two_models_the_loss_is_the_definition_over_transformers_logits(
    build_model: BuildModel,
    eager_twin: Callable[[Model], Any],
    architecture: str,
    divergence: Any,
    tree_rows: list[Sequence],
) -> None:
    model, teacher = build_model(architecture), build_model(architecture)
    with torch.no_grad():
        for parameter in teacher.causal.parameters():
            parameter.mul_(1.3)
    objective = Distillation(teacher="t", divergence=divergence, temperature=1.5, share=0.5)
    expected = count = 0.0
    for row in tree_rows:
        ids = torch.from_numpy(row.tokens_T).long()[None]
        with torch.no_grad():
            ours, theirs = (eager_twin(m)(input_ids=ids).logits[0] for m in (model, teacher))
        for k in np.flatnonzero(row.weight_T).tolist():
            (far,) = naive_divergence(
                ours[k - 1 : k], theirs[k - 1 : k], temperature=1.5, reverse=divergence == "reverse"
            )
            own = -float(ours[k - 1].log_softmax(-1)[row.tokens_T[k]])
            expected += float(row.weight_T[k]) * (0.5 * 1.5**2 * far + 0.5 * own)
            count += float(row.weight_T[k])
    for max_tokens in (1, 10_000):
        packs = list(build_packs(tree_rows[::-1], max_tokens=max_tokens, min_shared=2))
        losses = [forward(model, pack, objective=objective, teacher=teacher) for pack in packs]
        assert sum(float(loss.sum.detach()) for loss in losses) == pytest.approx(expected, rel=1e-9)
        assert sum(loss.count for loss in losses) == pytest.approx(count)
    own_teacher = forward(model, packs[0], objective=objective.model_copy(update={"share": 1.0}), teacher=model)
    assert float(own_teacher.sum.detach()) == pytest.approx(0, abs=1e-9)
    assert list(itertools.chain(own_teacher.metrics)) == ["divergence"]
