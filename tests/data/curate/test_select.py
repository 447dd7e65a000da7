"""Choosing rows: near the best possible set, the same whatever the order of the file, and scores that can be explained."""

import itertools
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from tunesmith.data.curate.difficulty import SCORED_ROWS, Scorer
from tunesmith.data.curate.select import facility_location, quality_scores, select
from tunesmith.data.curate.words import tfidf, word_counts, words_of
from tunesmith.data.settings import SelectSettings
from tunesmith.data.types import Example, Message, Origin
from tunesmith.errors import DataError, MissingExtraError

WORDS = words_of("the order is late my parcel never came please refund what time do you open can i pay by card")


def asked(prompt, answer="yes", line=1, file="a.jsonl"):
    return Example(
        Origin(file, line), "prompt_completion", messages=(Message("user", prompt), Message("assistant", answer))
    )


def labelled(text, label, line=1):
    return Example(Origin("a.jsonl", line), "labelled", text=text, label=label)


def sentences(count, seed=0):
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, size=generator.integers(3, 9))) for _ in range(count)]


def chosen(examples, **how):
    """The contents that are chosen, which are the same wherever the rows stand."""
    origins = select(iter(examples), settings=SelectSettings(**how))
    return Counter(example.key for example in examples if example.origin in origins)


# ---------------------------------------------------------------------------------------------------- diversity


def value_of(rows, vectors, quality):
    cosine = (vectors @ vectors.T).toarray() * quality[None, :]
    return cosine[:, list(rows)].max(axis=1).sum() if rows else 0.0


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.lists(st.sampled_from(WORDS[:8]), min_size=1, max_size=5).map(" ".join), min_size=3, max_size=9),
    keep=st.integers(1, 4),
    data=st.data(),
)
def test_the_choice_is_the_greedy_one_and_near_the_best(texts, keep, data):
    keep = min(keep, len(texts))
    scores = st.lists(st.sampled_from([0.1, 0.5, 1.0]), min_size=len(texts), max_size=len(texts))
    vectors, quality = tfidf(word_counts(texts)), np.array(data.draw(scores))
    found = facility_location(vectors, quality_N=quality, keep=keep)
    assert len(set(found)) == keep
    for size in range(keep):  # each is a row by which F rises most
        reached = value_of(found[: size + 1], vectors, quality)
        others = set(range(len(texts))) - set(found[:size])
        assert reached >= max(value_of([*found[:size], row], vectors, quality) for row in others) - 1e-9
    best = max(value_of(rows, vectors, quality) for rows in itertools.combinations(range(len(texts)), keep))
    assert value_of(found, vectors, quality) >= (1 - 1 / np.e) * best - 1e-9


def test_evaluating_many_rows_at_once_changes_nothing():
    vectors = tfidf(word_counts(sentences(400)))
    quality = np.random.default_rng(1).uniform(0.2, 1, 400)
    found = facility_location(vectors, quality_N=quality, keep=40)
    cosine = (vectors @ vectors.T).toarray() * quality[None, :]
    near, greedy = np.zeros(400), []
    for _ in range(40):
        gains = np.maximum(cosine - near[:, None], 0).sum(axis=0)
        gains[greedy] = -1
        greedy.append(int(gains.argmax()))
        near = np.maximum(near, cosine[:, greedy[-1]])
    assert found == greedy


def test_the_vectors_are_tf_idf():
    vectors = tfidf(word_counts(["red red blue", "blue"])).toarray()
    idf = {"blue": 1.0, "red": 1 + np.log(3 / 2), "red red": 1 + np.log(3 / 2), "red blue": 1 + np.log(3 / 2)}
    weights = [1.0, (1 + np.log(2)) * idf["red"], idf["red red"], idf["red blue"]]
    assert sorted(vectors[0][vectors[0] > 0]) == pytest.approx(sorted(np.array(weights) / np.linalg.norm(weights)))
    assert vectors[1].max() == 1.0


def test_common_words_are_left_out_of_the_vectors_and_not_of_the_counts():
    counts = word_counts(["a x", "a y", "a z"])
    before = counts.nnz
    assert np.diff(tfidf(counts, most_rows=2).indptr).tolist() == [2, 2, 2]  # without the column of `a`
    assert counts.nnz == before == 9


@pytest.mark.parametrize(
    ("text", "words"),
    [("Don't pay 3.5!", ["don", "t", "pay", "3", "5"]), ("我爱猫 cats", ["我", "爱", "猫", "cats"]), ("", [])],
)
def test_words(text, words):
    assert words_of(text) == words


# ------------------------------------------------------------------------------------------------------- select


def test_of_three_sorts_of_rows_one_each_is_kept():
    sorts = ["my parcel is late and never came number", "do you open on sundays at hour", "can i pay by card no"]
    rows = [
        asked(f"{sort} {number}", line=10 * place + number + 1)
        for place, sort in enumerate(sorts)
        for number in range(8)
    ]
    origins = select(iter(rows), settings=SelectSettings(keep=3, by="diversity"))
    assert {(origin.line - 1) // 10 for origin in origins} == {0, 1, 2}


@pytest.mark.parametrize("by", ["random", "diversity", "quality", "quality+diversity"])
def test_the_order_of_the_rows_decides_nothing(by):
    texts = [*sentences(60), *sentences(5)]
    rows = [asked(text, line=line) for line, text in enumerate(texts, start=1)]
    moved = [asked(text, line=line, file="b.jsonl") for line, text in enumerate(reversed(texts), start=7)]
    assert chosen(rows, keep=12, by=by) == chosen(moved, keep=12, by=by)
    assert chosen(rows, keep=0.2, by=by).total() == 13


@pytest.mark.parametrize("by", ["random", "quality+diversity"])
def test_classes_keep_their_shares_and_one_row_at_least(by):
    sizes = {"late": 60, "lost": 30, "card": 9, "rare": 1}
    texts = iter(sentences(100))
    rows = [
        labelled(next(texts), name, line=line)
        for line, name in enumerate(n for n, size in sizes.items() for _ in range(size))
    ]
    origins = select(iter(rows), settings=SelectSettings(keep=20, by=by))
    kept = Counter(row.label for row in rows if row.origin in origins)
    assert kept == {"late": 11, "lost": 6, "card": 2, "rare": 1}


def test_a_row_of_several_classes_counts_for_its_rarest():
    rows = [labelled(text, ("late",), line=line) for line, text in enumerate(sentences(20), start=1)]
    rows.append(labelled("the order is late and the card was refused", ("late", "card"), line=21))
    for keep in (2, 5):
        assert Origin("a.jsonl", 21) in select(iter(rows), settings=SelectSettings(keep=keep, by="random"))


def test_fewer_rows_than_classes_are_refused_unless_the_classes_are_numbers():
    texts = sentences(30)
    rows = [labelled(text, f"class {line}", line=line) for line, text in enumerate(texts, start=1)]
    with pytest.raises(DataError, match="keeps 5 rows and there are 30 classes"):
        select(iter(rows), settings=SelectSettings(keep=5))
    rows = [labelled(text, f"{line / 4}", line=line) for line, text in enumerate(texts, start=1)]
    assert len(select(iter(rows), settings=SelectSettings(keep=5))) == 5


@pytest.mark.parametrize("keep", [10, 500])
def test_a_choice_that_leaves_nothing_out_is_refused(keep):
    with pytest.raises(DataError, match="there are 10 rows to choose from, so nothing"):
        select((asked(text, line=line) for line, text in enumerate(sentences(10))), settings=SelectSettings(keep=keep))


def test_without_rows_there_is_nothing_to_choose_from():
    with pytest.raises(DataError, match="there are 0 rows to choose from"):
        select(iter([]), settings=SelectSettings(keep=5, by="diversity"))


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    rows = [asked(text, line=line) for line, text in enumerate(sentences(10))]
    with pytest.raises(MissingExtraError, match=r"data\.select\.by: diversity needs scikit-learn") as caught:
        select(iter(rows), settings=SelectSettings(keep=5, by="diversity"))
    assert caught.value.hint == "pip install 'tunesmith[curate]'"
    assert len(select(iter(rows), settings=SelectSettings(keep=5, by="quality"))) == 5


def test_a_row_without_words_is_chosen_last():
    vectors = csr_matrix(np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    assert facility_location(vectors, quality_N=np.ones(3), keep=3) == [1, 2, 0]


# ------------------------------------------------------------------------------------------------------ quality

GOOD = "You can change the address in your account. Open the orders, choose the parcel, press the pencil. It takes a minute."


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (GOOD, 1.0),
        (
            "I'm sorry, but I cannot help with the address of an order, because I am a text and have no account of yours.",
            0.1,
        ),
        (
            "As an AI language model I have no access to accounts, orders or parcels, and addresses are not known to me.",
            0.1,
        ),
        (
            "We're sorry that the parcel is late; your money will be back on your card within three days from now on.",
            1.0,
        ),
        (GOOD.removesuffix(" minute."), 0.5),
        (
            "Вы можете изменить адрес в настройках вашей учётной записи, если посылка ещё не отправлена со склада сегодня",
            0.5,
        ),
        ("press the pencil " * 7, 3 / 19),
    ],
)
def test_what_lowers_the_score(answer, score):
    rows = [asked(f"question {number}", GOOD + " " * (number % 3 * 16)) for number in range(15)]
    scores = quality_scores([*rows, asked("how?", answer)])
    assert (scores[:-1] == 1).all()
    assert scores[-1] == pytest.approx(score)


def test_an_unusual_length_counts_by_how_far_it_is_from_the_usual_ones():
    lengths = [90, 100, 100, 110, 110, 120, 1000]
    scores = quality_scores([asked("how?", "x" * length) for length in lengths])
    away = np.abs(np.log1p(lengths) - np.log(111))
    assert (scores[:-1] == 1).all()
    assert scores[-1] == pytest.approx(2 * 1.4826 * np.median(away) / away[-1])
    assert scores[-1] < 0.2


def test_an_answer_that_repeats_the_prompt():
    answers = [f"{GOOD} {'x' * number}." for number in range(9)]
    scores = quality_scores([*(asked("how?", answer) for answer in answers), asked(answers[0].upper(), answers[0])])
    assert scores[-1] == pytest.approx(0.3)


def test_labels_and_code_are_not_taken_for_sentences_that_break_off():
    code = "def f(x):\n    y = x + 1\n    z = y * 2\n    return z - 3 if z > 4 else abs(z) + max(x, y, 5) % 7 // 8"
    assert quality_scores([asked("write f", code)]).tolist() == [1.0]
    text = "My parcel is late. I have waited for nine days now and nobody on the phone can tell me where it might be"
    assert quality_scores([labelled(text, "late")]).tolist() == [1.0]
    assert quality_scores([asked("complain", text)]).tolist() == [0.5]


def test_good_rows_are_preferred():
    rows = [asked(text, f"{GOOD} {text}.", line=line) for line, text in enumerate(sentences(40), start=1)]
    rows += [asked(text, "I cannot help with that.", line=line) for line, text in enumerate(sentences(40), start=41)]
    origins = select(iter(rows), settings=SelectSettings(keep=20))
    assert max(origin.line for origin in origins) <= 40


# --------------------------------------------------------------------------------------------------- difficulty


def test_the_hardest_rows_that_their_question_helps_are_chosen_and_those_without_a_score_come_last():
    count = SCORED_ROWS + 40
    generator = np.random.default_rng(0)
    scores = np.stack([generator.uniform(1, 3, count), np.full(count, 2.0)], axis=1)  # a difficulty of 0.5 to 1.5
    scores[:30] = np.nan
    examples = [labelled(f"text {n}", None, line=n + 1) for n in range(count)]
    scorer = Scorer(lambda rows: scores[[row.origin.line - 1 for row in rows]])

    def kept(keep):
        origins = select(iter(examples), settings=SelectSettings(keep=keep, by="difficulty"), scorer=scorer)
        return {origin.line - 1 for origin in origins}

    difficulty = scores[:, 0] / scores[:, 1]
    helped = [n for n in np.argsort(-difficulty) if difficulty[n] < 1]
    assert 50 < len(helped) < count - 90
    assert kept(50) == set(helped[:50])
    idle = [n for n in np.argsort(difficulty) if difficulty[n] >= 1]
    assert kept(len(helped) + 20) == set(helped) | set(idle[:20])
    assert kept(count - 1) >= set(helped) | set(idle)
    scores[:] = np.nan
    with pytest.raises(DataError, match="needs a question and an answer"):
        kept(50)
