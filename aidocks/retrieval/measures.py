"""What a model made of held-out queries, query by query: the values from which tables are computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from math import isfinite

from pydantic import BaseModel, ConfigDict, Field

from aidocks.checkpoints.files import OutputFile
from aidocks.specs.train_retrieval_result import Metric
from aidocks.training.retriever import RowKind

#: Below every score that a model gives.
_LAST = -1e300


class Measures(BaseModel):
    """What was measured of some queries, a value a query in each list.

    Attributes:
        numbers: Lines of the queries in their file, from 0.
        figures: Of every query (rankings).
        ranks: Of the best right passage, from 1; None where it is not among what was found (rankings).
        first: Line of the corpus of what came first; None where nothing was found (rankings).
        ordered: Passages that were put in order (rankings).
        scores: Of every pair, by the model (scored pairs).
        wanted: The same by the data (scored pairs).
        file: What was found, where that was to be written: rows of ``candidates``, one of each query.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    numbers: tuple[int, ...] = ()
    figures: dict[Metric, tuple[float, ...]] = Field(default_factory=dict)
    ranks: tuple[int | None, ...] = ()
    first: tuple[int | None, ...] = ()
    ordered: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    wanted: tuple[float, ...] = ()
    file: OutputFile | None = None


class Measured(BaseModel):
    """What one model made of one set.

    Attributes:
        passages: In which a query looks; of a reranker, that it puts in order, on average.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    rows: RowKind
    passages: int
    measures: Measures


def comparable(scores: Iterable[float]) -> tuple[float, ...]:
    """Return scores of which each can be put in order and be written; what is no finite number comes last.

    JSON has no other numbers.
    """
    return tuple(float(score) if isfinite(score) else _LAST for score in scores)


def measures_of(
    numbers: Sequence[int], found: Sequence[Sequence[int]], relevant: Sequence[Mapping[str, float]]
) -> Measures:
    """Return the measures of orders of passages.

    Args:
        numbers: Lines of the queries.
        found: Of each query, lines of the corpus, the best first.
        relevant: Of each query, the right lines and their grades, as an :class:`~.eval_set.EvalSet` has them.
    """
    from aidocks.retrieval.metrics import RANKING_METRICS, ranking_figures

    right = [{int(line): float(grade) for line, grade in one.items()} for one in relevant]
    figures = [ranking_figures(order, grades) for order, grades in zip(found, right, strict=True)]
    return Measures(
        numbers=tuple(numbers),
        figures={metric: tuple(one[metric] for one in figures) for metric in RANKING_METRICS},
        ranks=tuple(_rank(order, grades) for order, grades in zip(found, right, strict=True)),
        first=tuple(order[0] if len(order) else None for order in found),
        ordered=tuple(len(order) for order in found),
    )


def joined(parts: Sequence[Measures]) -> Measures:
    """Return what was measured of all queries, of the parts in their order."""
    metrics = dict.fromkeys(metric for part in parts for metric in part.figures)
    return Measures(
        numbers=_chained([part.numbers for part in parts]),
        # A part without queries has no figures.
        figures={metric: _chained([part.figures.get(metric, ()) for part in parts]) for metric in metrics},
        ranks=tuple(chain.from_iterable(part.ranks for part in parts)),
        first=tuple(chain.from_iterable(part.first for part in parts)),
        ordered=_chained([part.ordered for part in parts]),
        scores=_chained([part.scores for part in parts]),
        wanted=_chained([part.wanted for part in parts]),
    )


def _chained(lists: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(chain.from_iterable(lists))


def _rank(order: Sequence[int], grades: Mapping[int, float]) -> int | None:
    return next((rank for rank, line in enumerate(order, 1) if grades.get(line, 0) > 0), None)
