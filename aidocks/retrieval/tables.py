"""Tables of what a training was worth, with intervals, and queries for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from aidocks.retrieval.eval_set import EvalSet
from aidocks.retrieval.measures import Measured
from aidocks.retrieval.parts import read_lines
from aidocks.specs.train_llm_result import Verdict
from aidocks.specs.train_retrieval_result import Domain, Figure, FoundExample, Metric

if TYPE_CHECKING:
    from aidocks.retrieval.metrics import Change, Interval

#: Of the draws of every bootstrap: the same queries have the same intervals.
_SEED = 0


def domains(
    sets: Sequence[EvalSet],
    before: Sequence[Measured],
    after: Sequence[Measured],
    alone: Sequence[Measured | None] | None = None,
) -> tuple[Domain, ...]:
    """Return the tables of all sets of which something was measured, in their order.

    Args:
        sets: What was measured on.
        before: Of the base.
        after: Of the result, on the same queries.
        alone: Of the retriever's order without the reranker.
    """
    found = []
    for number, (one, old, new) in enumerate(zip(sets, before, after, strict=True)):
        if not new.measures.numbers:
            continue
        assert old.measures.numbers == new.measures.numbers, "measured on the same queries"
        retriever = alone[number] if alone is not None else None
        figures = _pairs(old, new) if one.rows == "scored" else _rankings(old, new, retriever)
        found.append(
            Domain(
                dataset=one.name,
                trained=one.trained,
                rows=one.rows,
                queries=len(new.measures.numbers),
                passages=new.passages,
                figures=figures,
            )
        )
    return tuple(found)


def _rankings(old: Measured, new: Measured, retriever: Measured | None) -> tuple[Figure, ...]:
    from aidocks.retrieval.metrics import bootstrap, paired_bootstrap

    figures = []
    for metric, values in new.measures.figures.items():
        if _says_nothing(metric, new.passages):
            continue
        earlier = old.measures.figures[metric]
        figure = _compared(
            metric,
            (fmean(earlier), bootstrap(earlier, _SEED)),
            (fmean(values), bootstrap(values, _SEED)),
            paired_bootstrap(earlier, values, _SEED),
            fmean(retriever.measures.figures[metric]) if retriever is not None else None,
        )
        figures.append(figure)
    return tuple(figures)


def _pairs(old: Measured, new: Measured) -> tuple[Figure, ...]:
    from aidocks.retrieval.metrics import bootstrap_spearman, paired_bootstrap_spearman, spearman

    wanted, earlier, scores = new.measures.wanted, old.measures.scores, new.measures.scores
    figure = _compared(
        "spearman",
        (spearman(earlier, wanted), bootstrap_spearman(earlier, wanted, _SEED)),
        (spearman(scores, wanted), bootstrap_spearman(scores, wanted, _SEED)),
        paired_bootstrap_spearman(earlier, scores, wanted, _SEED),
    )
    return (figure,)


def _compared(
    metric: Metric,
    before: tuple[float, Interval],
    after: tuple[float, Interval],
    change: Change,
    retriever: float | None = None,
) -> Figure:
    """Return a figure of the base beside that of the result, each with its interval."""
    verdict: Verdict = "improved" if change.low > 0 else "worse" if change.high < 0 else "not distinguishable"
    return Figure(
        metric=metric,
        before=before[0],
        before_low=before[1].low,
        before_high=before[1].high,
        after=after[0],
        after_low=after[1].low,
        after_high=after[1].high,
        **change._asdict(),
        retriever=retriever,
        verdict=verdict,
    )


def _says_nothing(metric: Metric, passages: int) -> bool:
    """Say whether a figure is 1 whatever a model does, for there are no more passages than it looks at."""
    name, _, depth = metric.partition("@")
    return name == "recall" and passages <= int(depth)


def examples(
    sets: Sequence[EvalSet],
    before: Sequence[Measured],
    after: Sequence[Measured],
    count: int,
) -> tuple[FoundExample, ...]:
    """Return queries of the sets for people to read: those that gained most by the training, and that lost most.

    Args:
        sets: What was measured on; of each about the same number is shown, of scored pairs none.
        before: Of the base.
        after: Of the result, on the same queries.
        count: Of all sets together, at most.
    """
    ranked = [
        number for number, one in enumerate(sets) if one.rows == "ranking" and after[number].measures.numbers
    ]
    found: list[FoundExample] = []
    for place, number in enumerate(ranked):
        share = -(-(count - len(found)) // (len(ranked) - place))
        found += _examples_of(sets[number], before[number], after[number], share)
    return tuple(found)


def _examples_of(one: EvalSet, old: Measured, new: Measured, count: int) -> list[FoundExample]:
    assert one.corpus is not None, "rankings have a corpus"
    numbers, ranks, earlier = new.measures.numbers, new.measures.ranks, old.measures.ranks
    chosen = _telling([_gain(a, b) for a, b in zip(earlier, ranks, strict=True)], count)
    rows = read_lines(one.queries.path, {numbers[place] for place in chosen})
    right = {
        place: int(max(rows[numbers[place]]["relevant"].items(), key=lambda item: item[1])[0])
        for place in chosen
    }
    firsts = (measured.measures.first for measured in (old, new))
    lines = {*right.values(), *(first[place] for first in firsts for place in chosen)}
    texts = read_lines(one.corpus.path, {line for line in lines if line is not None})

    def text(measured: Measured, place: int) -> str:
        line = measured.measures.first[place]
        return "" if line is None else str(texts[line]["text"])

    return [
        FoundExample(
            dataset=one.name,
            query=str(rows[numbers[place]]["query"]),
            right=str(texts[right[place]]["text"]),
            rank_before=earlier[place],
            rank_after=ranks[place],
            first_before=text(old, place),
            first_after=text(new, place),
        )
        for place in chosen
    ]


def _gain(before: int | None, after: int | None) -> float:
    """Return by how much the reciprocal rank rose."""
    return (1 / after if after else 0.0) - (1 / before if before else 0.0)


def _telling(gains: Sequence[float], count: int) -> list[int]:
    """Return the places of what gained most and of what lost most, half and half where there are so many of both."""
    falling = sorted(range(len(gains)), key=lambda place: (-gains[place], place))
    lost = [place for place in reversed(falling) if gains[place] < 0][: count // 2]
    won = [place for place in falling if place not in lost]
    return won[: count - len(lost)] + lost[::-1]
