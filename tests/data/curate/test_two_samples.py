"""Telling two sets of texts apart: chance stays chance, hand-worked numbers, and words and topics that differ."""

import math
from collections import Counter

import numpy as np
import pytest

from tunesmith.data.curate.two_samples import PRIOR_WORDS, _apart, _auc, tell_apart, telling_words, topics, vectors_of

WORDS = [f"word{number}" for number in range(60)]


def drawn(generator, *, count, words=WORDS):
    return [" ".join(generator.choice(words, size=6)) for _ in range(count)]


def test_two_draws_from_one_source_are_rarely_told_apart():
    generator, p_values = np.random.default_rng(0), []
    is_second = np.arange(120) >= 60
    for _ in range(100):
        texts = drawn(generator, count=120)
        apart, _ = tell_apart(texts, vectors_of(texts), is_second_N=is_second)
        p_values.append(apart.p)
        assert apart.found == (apart.p < 0.05 and apart.low > 0.5)
    found = np.array(p_values)
    assert (found < 0.05).sum() <= 11  # 5 % of 100, and three standard errors
    assert 0.35 < np.median(found) < 0.65


def test_a_difference_is_found_and_the_rows_that_make_it_score_highest():
    generator = np.random.default_rng(1)
    texts = [*drawn(generator, count=300), *drawn(generator, count=240), *drawn(generator, count=60, words=WORDS[:5])]
    apart, score = tell_apart(texts, vectors_of(texts), is_second_N=np.arange(600) >= 300)
    assert apart.found
    assert apart.low > 0.5
    assert 0.02 < apart.share_unlike < 0.2  # a fifth is, and the bound stays below it
    assert set(np.argsort(-score)[:40].tolist()) <= set(range(540, 600))


def test_texts_that_both_sets_have_tell_nothing():
    texts = drawn(np.random.default_rng(2), count=80) * 2
    apart, _ = tell_apart(texts, vectors_of(texts), is_second_N=np.arange(160) >= 80)
    assert apart.auc == 0.5
    assert not apart.found


def test_auc_and_its_variance_by_hand():
    auc, variance = _auc(np.array([0.1, 0.4]), np.array([0.4, 0.9]))
    assert auc == 3.5 / 4  # one tie
    assert variance == pytest.approx(np.var([1.0, 0.75], ddof=1) / 2 * 2)


def test_sets_that_are_told_apart_without_an_error_have_an_interval_all_the_same():
    apart = _apart(np.ones(5), np.zeros(5), np.full(5, 401 / (12 * 200 * 200)), np.ones(5))
    assert apart.auc == apart.high == 1.0
    assert 0.9 < apart.low < 1.0
    assert apart.share_unlike == pytest.approx(1 - math.sqrt(2 * (1 - apart.low)))


def test_the_log_odds_are_those_of_the_paper():
    rows_a, rows_b = Counter(refund=5, order=500, late=400), Counter(refund=200, order=500, late=390)
    more_a, more_b = telling_words(rows_a, rows_b)
    assert [word.word for word in more_b] == ["refund"]
    assert {word.word for word in more_a} <= {"order", "late"}
    prior = PRIOR_WORDS * 205 / 1995
    odds = [(y + prior) / (n + PRIOR_WORDS - y - prior) for y, n in ((200, 1090), (5, 905))]
    z = math.log(odds[0] / odds[1]) / math.sqrt(1 / (200 + prior) + 1 / (5 + prior))
    assert more_b[0].z == pytest.approx(z)
    assert telling_words(Counter(), Counter()) == ([], [])


def test_a_topic_of_one_set_alone_is_found_with_its_words():
    generator = np.random.default_rng(3)
    shared = [" ".join(generator.choice(WORDS, size=8)) for _ in range(500)]
    tennis = [f"tennis court racket {word}" for word in generator.choice(WORDS, size=100)]
    texts = [*shared[:300], *shared[300:], *tennis]
    found = topics(texts, vectors_of(texts), is_second_N=np.arange(600) >= 300)
    assert set(found[0].words) >= {"tennis", "court", "racket"}
    assert (found[0].share_a, found[0].share_b) == (0.0, pytest.approx(1 / 3))
    assert found[0].low > 0.2
    assert sum(topic.share_a for topic in found) == pytest.approx(1)
    assert topics(texts[:60], vectors_of(texts[:60]), is_second_N=np.arange(60) >= 30) == []
