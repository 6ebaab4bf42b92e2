"""Tables of what a training was worth, with intervals, and queries for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from aidocks.retrieval.eval_set import EvalSet
from aidocks.retrieval.measures import Measured
from aidocks.retrieval.parts import read_lines
from aidocks.specs.train_llm_result import Verdict
from aidocks.specs.train_retrieval_result import Domain, Figure, FoundExample, Metric

#: Of the draws of every bootstrap: the same queries have the same intervals.
_SEED = 0


def domains(
    sets: Sequence[EvalSet],
    before: Sequence[Measured] | None,
    after: Sequence[Measured],
    alone: Sequence[Measured | None] | None = None,
) -> tuple[Domain, ...]:
    """Return the tables of all sets of which something was measured, in their order.

    Args:
        sets: What was measured on.
        before: Of the base; None where it gives no scores.
        after: Of the result, on the same queries.
        alone: Of the retriever's order without the reranker.
    """
    found = []
    for number, (one, new) in enumerate(zip(sets, after, strict=True)):
        if not new.measures.numbers:
            continue
        old = before[number] if before is not None else None
        assert old is None or old.measures.numbers == new.measures.numbers, "measured on the same queries"
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


def _rankings(old: Measured | None, new: Measured, retriever: Measured | None) -> tuple[Figure, ...]:
    from aidocks.retrieval.metrics import bootstrap, paired_bootstrap

    figures = []
    for metric, values in new.measures.figures.items():
        if _says_nothing(metric, new.passages):
            continue
        low, high = bootstrap(values, _SEED)
        figure = Figure(
            metric=metric,
            before=None,
            after=fmean(values),
            delta=None,
            after_low=low,
            after_high=high,
            retriever=fmean(retriever.measures.figures[metric]) if retriever is not None else None,
            verdict="not distinguishable",
        )
        if old is not None:
            earlier = old.measures.figures[metric]
            change = paired_bootstrap(earlier, values, _SEED)
            figure = _compared(figure, fmean(earlier), tuple(bootstrap(earlier, _SEED)), tuple(change))
        figures.append(figure)
    return tuple(figures)


def _pairs(old: Measured | None, new: Measured) -> tuple[Figure, ...]:
    from aidocks.retrieval.metrics import bootstrap_spearman, paired_bootstrap_spearman, spearman

    wanted, scores = new.measures.wanted, new.measures.scores
    low, high = bootstrap_spearman(scores, wanted, _SEED)
    figure = Figure(
        metric="spearman",
        before=None,
        after=spearman(scores, wanted),
        delta=None,
        after_low=low,
        after_high=high,
        verdict="not distinguishable",
    )
    if old is not None:
        earlier = old.measures.scores
        change = paired_bootstrap_spearman(earlier, scores, wanted, _SEED)
        ends = bootstrap_spearman(earlier, wanted, _SEED)
        figure = _compared(figure, spearman(earlier, wanted), tuple(ends), tuple(change))
    return (figure,)


def _compared(figure: Figure, before: float, ends: tuple[float, ...], change: tuple[float, ...]) -> Figure:
    """Return a figure beside that of the base.

    Args:
        figure: Of the result.
        before: Of the base.
        ends: Of the base's interval.
        change: Of the paired bootstrap: delta, low, high, p.
    """
    delta, low, high, p = change
    verdict: Verdict = "improved" if low > 0 else "worse" if high < 0 else "not distinguishable"
    return figure.model_copy(
        update={
            "before": before,
            "before_low": ends[0],
            "before_high": ends[1],
            "delta": delta,
            "low": low,
            "high": high,
            "p": p,
            "verdict": verdict,
        }
    )


def _says_nothing(metric: Metric, passages: int) -> bool:
    """Say whether a figure is 1 whatever a model does, for there are no more passages than it looks at."""
    name, _, depth = metric.partition("@")
    return name == "recall" and passages <= int(depth)


def examples(
    sets: Sequence[EvalSet],
    before: Sequence[Measured] | None,
    after: Sequence[Measured],
    count: int,
) -> tuple[FoundExample, ...]:
    """Return queries of the sets for people to read: those that gained most by the training, and that lost most.

    Args:
        sets: What was measured on; of each about the same number is shown, of scored pairs none.
        before: Of the base; None where it gives no scores.
        after: Of the result, on the same queries.
        count: Of all sets together, at most.
    """
    ranked = [
        number for number, one in enumerate(sets) if one.rows == "ranking" and after[number].measures.numbers
    ]
    found: list[FoundExample] = []
    for place, number in enumerate(ranked):
        share = -(-(count - len(found)) // (len(ranked) - place))
        old = before[number] if before is not None else None
        found += _examples_of(sets[number], old, after[number], share)
    return tuple(found)


def _examples_of(one: EvalSet, old: Measured | None, new: Measured, count: int) -> list[FoundExample]:
    assert one.corpus is not None, "rankings have a corpus"
    numbers, ranks = new.measures.numbers, new.measures.ranks
    earlier = old.measures.ranks if old is not None else (None,) * len(numbers)
    chosen = _telling([_gain(a, b) for a, b in zip(earlier, ranks, strict=True)], count)
    rows = read_lines(one.queries.path, {numbers[place] for place in chosen})
    right = {
        place: int(max(rows[numbers[place]]["relevant"].items(), key=lambda item: item[1])[0])
        for place in chosen
    }
    firsts = [measured.measures.first for measured in (old, new) if measured is not None]
    lines = {*right.values(), *(first[place] for first in firsts for place in chosen)}
    texts = read_lines(one.corpus.path, {line for line in lines if line is not None})

    def text(measured: Measured | None, place: int) -> str:
        line = measured.measures.first[place] if measured is not None else None
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
