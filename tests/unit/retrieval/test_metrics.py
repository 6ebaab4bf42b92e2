"""Figures of rankings and their intervals: published examples, a slow reference, and what must always hold."""

from __future__ import annotations

from math import isclose, log2

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aidocks.retrieval.metrics import (
    RANKING_METRICS,
    bootstrap,
    bootstrap_spearman,
    in_order,
    paired_bootstrap,
    paired_bootstrap_spearman,
    ranking_figures,
    spearman,
)


def test_the_usual_example_of_discounted_gain() -> None:
    # Grades 3, 2, 3, 0, 1, 2 in this order gain 6.861; two more passages of grades 3 and 2 were not found. The best
    # order of all eight gains 8.740 with its first six (the worked example of Wikipedia's article on it).
    relevant = dict(enumerate([3.0, 2.0, 3.0, 0.0, 1.0, 2.0, 3.0, 2.0]))

    figures = ranking_figures(range(6), relevant)

    assert figures["ndcg@10"] == pytest.approx(6.861 / (8.740 + 1 / log2(8)), abs=1e-4)


def test_figures_are_those_of_trec_eval() -> None:
    """Computed by hand by the formulas of trec_eval (m_ndcg_cut, m_recip_rank, m_map_cut, m_recall)."""
    # Found are grades 1, 0, 3, 0 and 2; one more of grade 2 is not.
    found = ranking_figures([7, 8, 5, 9, 6], {5: 3, 6: 2, 7: 1, 4: 2})

    gained = 1 / 1 + 3 / 2 + 2 / np.log2(6)
    possible = 3 / 1 + 2 / np.log2(3) + 2 / 2 + 1 / np.log2(5)
    assert found["ndcg@10"] == pytest.approx(gained / possible)
    assert found["mrr@10"] == 1
    assert found["map@100"] == pytest.approx((1 / 1 + 2 / 3 + 3 / 5) / 4)
    assert (found["recall@1"], found["recall@10"]) == (1 / 4, 3 / 4)


def test_the_textbook_example_of_average_precision() -> None:
    # Right passages at ranks 1, 3, 6, 9 and 10 of ten: (1 + 2/3 + 3/6 + 4/9 + 5/10) / 5.
    figures = ranking_figures(range(1, 11), {1: 1, 3: 1, 6: 1, 9: 1, 10: 1})

    assert figures["map@100"] == pytest.approx((1 + 2 / 3 + 3 / 6 + 4 / 9 + 5 / 10) / 5)
    assert figures["mrr@10"] == 1
    assert figures["recall@1"] == pytest.approx(0.2)
    assert figures["recall@10"] == 1


def test_a_passage_that_was_not_found_counts_as_missing() -> None:
    figures = ranking_figures([5, 7], {7: 1, 99: 1})

    assert figures["recall@100"] == 0.5
    assert figures["map@100"] == 0.25
    assert figures["mrr@10"] == 0.5
    assert ranking_figures([5], {99: 1}) == dict.fromkeys(RANKING_METRICS, 0.0)


@pytest.mark.parametrize(("ranked", "relevant"), [([1], {}), ([1], {1: 0.0}), ([1, 1], {1: 1.0})])
def test_what_has_no_figures_is_refused(ranked: list[int], relevant: dict[int, float]) -> None:
    with pytest.raises(ValueError, match=r"right passage|twice"):
        ranking_figures(ranked, relevant)


_grades = st.dictionaries(st.integers(0, 40), st.sampled_from([1.0, 2.0, 3.0]), min_size=1, max_size=12)


@given(st.permutations(range(30)), _grades)
def test_figures_lie_between_0_and_1_and_the_best_order_is_best(
    ranked: list[int], grades: dict[int, float]
) -> None:
    figures = ranking_figures(ranked, grades)
    best = ranking_figures(sorted(grades, key=lambda one: -grades[one]), grades)

    assert set(figures) == set(RANKING_METRICS)
    for metric, value in figures.items():
        assert 0 <= value <= best[metric] + 1e-12
    assert isclose(best["ndcg@10"], 1)
    assert figures["recall@1"] <= figures["recall@10"] <= figures["recall@100"]


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=60), st.integers(1, 70))
def test_equal_scores_are_in_the_order_of_their_numbers(scores: list[float], count: int) -> None:
    expected = sorted(range(len(scores)), key=lambda number: (-scores[number], number))

    assert in_order(scores) == expected
    assert in_order(np.array(scores), count) == expected[:count]


def test_a_score_that_is_no_number_comes_last() -> None:
    assert in_order([float("nan"), 0.0, 1.0]) == [2, 1, 0]


@given(
    st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=40),
)
@settings(deadline=None)
def test_correlation_of_ranks_is_that_of_scipy(pairs: list[tuple[int, int]]) -> None:
    from scipy.stats import spearmanr

    a, b = (list(one) for one in zip(*pairs, strict=True))
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert spearman(a, b) == 0
    else:
        assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(1).normal(0.5, 0.2, 2000)

    low, high = bootstrap(values, seed=0)

    half = 1.96 * values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=half * 0.1)
    assert high == pytest.approx(values.mean() + half, abs=half * 0.1)
    assert bootstrap(values, seed=0) == (low, high)
    assert bootstrap([0.25], seed=3) == (0.25, 0.25)


def test_pairs_tell_a_small_change_that_means_alone_do_not() -> None:
    generator = np.random.default_rng(2)
    before = generator.uniform(0, 1, 200)
    after = before + 0.01 + generator.normal(0, 0.02, 200)

    change = paired_bootstrap(before, after, seed=0)

    assert change.low > 0
    assert change.p <= 0.01
    assert bootstrap(after, seed=0).low < before.mean()
    assert change.delta == pytest.approx((after - before).mean())


def test_no_change_has_no_significance() -> None:
    same = paired_bootstrap([0.5, 1.0, 0.0], [0.5, 1.0, 0.0], seed=0)

    assert same == (0.0, 0.0, 0.0, 1.0)
    assert paired_bootstrap([0.2] * 40, [0.1] * 40, seed=0).p == pytest.approx(1 / 2000)


def test_a_handful_of_queries_proves_nothing() -> None:
    # Whatever else stays as it was: only what changed can tell.
    for count, rest in ((1, 0), (5, 0), (5, 500)):
        change = paired_bootstrap([0.0] * (count + rest), [1.0] * count + [0.0] * rest, seed=0)
        assert change.low <= 0 < change.high
        assert change.p >= 2 ** (1 - count)
    enough = paired_bootstrap([0.0] * 6, [1.0] * 6, seed=0)
    assert (enough.low, enough.p) == (1.0, 2**-5)
    assert paired_bootstrap_spearman([3, 1, 2], [1, 2, 3], [1, 2, 3], seed=0).low <= 0


@given(st.integers(0, 1000))
@settings(deadline=None, max_examples=20)
def test_p_agrees_with_the_interval(seed: int) -> None:
    generator = np.random.default_rng(seed)
    before = generator.uniform(0, 1, 30)
    after = before + generator.normal(0.05, 0.2, 30)

    change = paired_bootstrap(before, after, seed, rounds=500)

    excludes_nothing = change.low > 0 or change.high < 0
    assert excludes_nothing == (change.p < 0.05) or change.p == pytest.approx(0.05, abs=0.005)


def test_correlations_are_drawn_in_pairs() -> None:
    generator = np.random.default_rng(4)
    gold = generator.uniform(0, 1, 300)
    weak, strong = (gold + generator.normal(0, noise, 300) for noise in (0.6, 0.2))

    change = paired_bootstrap_spearman(weak, strong, gold, seed=0, rounds=400)
    low, high = bootstrap_spearman(strong, gold, seed=0, rounds=400)

    assert change.low > 0
    assert change.delta == pytest.approx(spearman(strong, gold) - spearman(weak, gold))
    assert low < spearman(strong, gold) < high
    assert paired_bootstrap_spearman(weak, weak, gold, seed=0, rounds=100).p == 1
