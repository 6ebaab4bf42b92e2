"""What an order of passages is worth, and how sure that is: figures of one query, and the bootstrap over queries.

The definitions are those of trec_eval, so that figures compare with published ones:

========= ==================================================================================================
ndcg@k    Discounted cumulative gain over that of the best order: Järvelin & Kekäläinen, Cumulated gain-based
          evaluation of IR techniques, ACM TOIS 20(4), 2002. The gain of a passage is its grade (linear, as trec_eval
          has it, and not 2^grade - 1), the discount log2(rank + 1)
mrr@k     1 / rank of the first right passage, 0 beyond k: Voorhees, The TREC-8 question answering track report, 1999
map@k     Mean over all right passages of the precision where each was found; one that was not found within k
          counts 0: Manning, Raghavan & Schütze, Introduction to Information Retrieval, 2008, section 8.4
recall@k  Share of the right passages that are among the first k
spearman  Correlation of ranks, equal values sharing the mean of theirs: Spearman 1904
========= ==================================================================================================

Intervals are percentiles of means of queries drawn with replacement: Efron & Tibshirani, An introduction to the
bootstrap, 1993, chapter 13; of two systems on the same queries, of the mean difference (paired; Sakai, SIGIR 2006).
A bootstrap of one query would call it proof. So what no randomisation test of the queries that changed could tell from
chance (Smucker, Allan & Carterette, CIKM 2007) is not told from it here: fewer than six prove nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import log2
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aidocks.specs.train_retrieval_result import Metric

#: The figures of a ranking, in the order of a table; the first is the one that counts.
RANKING_METRICS: tuple[Metric, ...] = (
    "ndcg@10",
    "mrr@10",
    "map@100",
    "recall@1",
    "recall@10",
    "recall@100",
)
#: Passages of a ranking that any figure looks at.
DEEPEST = 100
ROUNDS = 2000
#: Share of the drawn means that an interval leaves out, at both ends together.
_OUTSIDE = 0.05
#: Numbers of a block of draws: bounds memory to some tens of megabytes.
_DRAWN = 1 << 21

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


class Change(NamedTuple):
    """How a figure differs between two systems: mean difference, its 95 % interval, and two-sided p of no change."""

    delta: float
    low: float
    high: float
    p: float


def ranking_figures(ranked: Sequence[int], relevant: Mapping[int, float]) -> dict[Metric, float]:
    """Return the figures of one query, each from 0 to 1.

    Args:
        ranked: Passages by number, the best first; only the first 100 are looked at. Those of equal scores are to be in
            the order of their numbers, as :func:`in_order` puts them.
        relevant: Grade of every right passage of the query, above 0, whether or not it was found.

    Raises:
        ValueError: No passage is right, or one is ranked twice.
    """
    grades = {passage: grade for passage, grade in relevant.items() if grade > 0}
    if not grades:
        raise ValueError("a query without a right passage has no figures")
    top = list(ranked[:DEEPEST])
    if len(set(top)) != len(top):
        raise ValueError("a passage is ranked twice")
    found = [rank for rank, passage in enumerate(top, 1) if passage in grades]
    best = sorted(grades.values(), reverse=True)
    gained = sum(grades[top[rank - 1]] / log2(rank + 1) for rank in found if rank <= 10)
    possible = sum(grade / log2(rank + 1) for rank, grade in enumerate(best[:10], 1))
    precisions = sum(number / rank for number, rank in enumerate(found, 1))

    def recall(depth: int) -> float:
        return sum(rank <= depth for rank in found) / len(grades)

    return {
        "ndcg@10": gained / possible,
        "mrr@10": 1 / found[0] if found and found[0] <= 10 else 0.0,
        "map@100": precisions / len(grades),
        "recall@1": recall(1),
        "recall@10": recall(10),
        "recall@100": recall(100),
    }


def in_order(scores: ArrayLike, count: int | None = None) -> list[int]:
    """Return the numbers of the best passages, the best first; of equal ones, the lower number first.

    Args:
        scores: [N], higher is better. Not-a-number comes last.
        count: How many; None for all.
    """
    values = np.asarray(scores)
    values = np.where(np.isnan(values), -np.inf, values)
    if count is not None and count < len(values):
        # Everything that is as good as the last one of the best, so that ties at the edge are settled by number.
        edge = np.partition(values, len(values) - count)[len(values) - count]
        candidates = np.flatnonzero(values >= edge)
    else:
        candidates = np.arange(len(values))
    order = candidates[np.argsort(-values[candidates], kind="stable")]
    return [int(number) for number in order[:count]]


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Return the correlation of the ranks of two lists [N], -1 to 1; 0 where one of them is constant."""
    ranks_a, ranks_b = _ranks(np.asarray(a, np.float64)[None]), _ranks(np.asarray(b, np.float64)[None])
    return float(_correlation(ranks_a, ranks_b)[0])


def bootstrap(values: ArrayLike, seed: int, rounds: int = ROUNDS) -> Interval:
    """Return the 95 % interval of a mean.

    Args:
        values: Of every query [N], N at least 1.
        seed: Of the draws.
        rounds: How often as many queries are drawn.
    """
    numbers = np.asarray(values, np.float64)
    return _interval(_resampled(len(numbers), seed, rounds, lambda drawn: numbers[drawn].mean(axis=1)))


def paired_bootstrap(before: ArrayLike, after: ArrayLike, seed: int, rounds: int = ROUNDS) -> Change:
    """Return how the mean changed between two systems on the same queries.

    Args:
        before: Of every query [N].
        after: Of the same queries [N].
        seed: Of the draws.
        rounds: How often as many queries are drawn.
    """
    differences = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    drawn = _resampled(len(differences), seed, rounds, lambda rows: differences[rows].mean(axis=1))
    return _change(float(differences.mean()), drawn, int(np.count_nonzero(differences)))


def bootstrap_spearman(scores: ArrayLike, gold: ArrayLike, seed: int, rounds: int = ROUNDS) -> Interval:
    """Return the 95 % interval of the correlation of ranks of scores [N] and what they should be [N]."""
    a, b = np.asarray(scores, np.float64), np.asarray(gold, np.float64)
    return _interval(
        _resampled(len(a), seed, rounds, lambda rows: _correlation(_ranks(a[rows]), _ranks(b[rows])))
    )


def paired_bootstrap_spearman(
    before: ArrayLike, after: ArrayLike, gold: ArrayLike, seed: int, rounds: int = ROUNDS
) -> Change:
    """Return how the correlation of ranks with ``gold`` [N] changed from scores ``before`` [N] to ``after`` [N].

    The pairs are drawn, and both correlations are computed anew of each draw.
    """
    first, second, right = (np.asarray(one, np.float64) for one in (before, after, gold))

    def difference(rows: NDArray[np.int64]) -> Floats:
        ranks = _ranks(right[rows])
        return _correlation(_ranks(second[rows]), ranks) - _correlation(_ranks(first[rows]), ranks)

    delta = spearman(second, right) - spearman(first, right)
    drawn = _resampled(len(right), seed, rounds, difference)
    return _change(delta, drawn, int(np.count_nonzero(first != second)))


def _resampled(count: int, seed: int, rounds: int, figure: Callable[[NDArray[np.int64]], Floats]) -> Floats:
    """Return a figure of every draw [rounds]; ``figure`` gets the rows of several draws [draws, count]."""
    if count < 1:
        raise ValueError("there is nothing to draw from")
    generator = np.random.default_rng(seed)
    at_once = max(1, _DRAWN // count)
    parts = [
        figure(generator.integers(0, count, size=(min(at_once, rounds - begin), count)))
        for begin in range(0, rounds, at_once)
    ]
    return np.concatenate(parts)


def _interval(drawn: Floats) -> Interval:
    low, high = np.quantile(drawn, (_OUTSIDE / 2, 1 - _OUTSIDE / 2))
    return Interval(float(low), float(high))


def _change(delta: float, drawn: Floats, changed: int) -> Change:
    """Return a change whose p agrees with its interval: twice the share of draws on the other side of 0.

    Args:
        delta: The change.
        drawn: The same of every draw [rounds].
        changed: Queries (or pairs) whose value is another one after than before.
    """
    low, high = _interval(drawn)
    p = 2 * float(min((drawn <= 0).mean(), (drawn >= 0).mean()))
    # So many draws tell nothing smaller; and of k values there are 2^k ways to say which came before.
    least = max(1 / len(drawn), 2.0 ** (1 - changed))
    if least > _OUTSIDE:
        low, high = min(low, 0.0), max(high, 0.0)
    return Change(delta, low, high, min(1.0, max(p, least)))


def _ranks(values: Floats) -> Floats:
    """Return the ranks of each row [R, N], equal values sharing the mean of theirs."""
    from scipy.stats import rankdata

    ranks: Floats = np.asarray(rankdata(values, axis=1), np.float64)
    return ranks


def _correlation(a: Floats, b: Floats) -> Floats:
    """Return the correlation of each row of [R, N] with that of the other; 0 where one is constant."""
    a = a - a.mean(axis=1, keepdims=True)
    b = b - b.mean(axis=1, keepdims=True)
    size = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    found: Floats = np.divide((a * b).sum(axis=1), size, out=np.zeros(len(a)), where=size > 0)
    return found
