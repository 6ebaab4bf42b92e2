"""What a training of `/train/emb` or `/train/rerank` was worth, as the benchmarks tell it."""

from __future__ import annotations

import json
import sys
from typing import Any

from aidocks.specs.train_retrieval_result import Domain, Figure, RetrieverTrainResult
from benchmarks.comparison import Comparison, Facts
from benchmarks.train_locally import Run, given_by_hand, train_retriever


def figure_of(domain: Domain, metric: str) -> Figure:
    """Return one figure of a table."""
    return next(figure for figure in domain.figures if figure.metric == metric)


def shown(figure: Figure) -> dict[str, str | float | int]:
    """Return one figure before and after a training, as facts; intervals are of 95 %."""
    facts: dict[str, str | float | int] = {
        "before": f"{figure.before:.4f} [{figure.before_low:.4f}, {figure.before_high:.4f}]",
        "after": f"{figure.after:.4f} [{figure.after_low:.4f}, {figure.after_high:.4f}]",
        "change": f"{figure.delta:+.4f} [{figure.low:+.4f}, {figure.high:+.4f}]",
        "p": float(f"{figure.p:.2g}"),
        "verdict": figure.verdict,
    }
    return facts if figure.retriever is None else facts | {"retriever": round(figure.retriever, 4)}


def beside_base(
    title: str,
    domain: Domain,
    metric: str,
    done: Run[RetrieverTrainResult],
    must_reach: str,
    facts: Facts,
    *,
    retriever: bool = False,
) -> Comparison:
    """Return one figure on held-out queries after a training, beside the base.

    Args:
        title: What was done.
        domain: The table that it is of.
        metric: Its name.
        done: The training.
        must_reach: What it is to be.
        facts: Said beside it.
        retriever: Put it beside the retriever's own order, and not beside the base.
    """
    figure = figure_of(domain, metric)
    other = figure.retriever if retriever else figure.before
    assert other is not None
    others = {
        one.metric: f"{one.before:.4f} -> {one.after:.4f}" for one in domain.figures if one.metric != metric
    }
    sizes = {"queries": domain.queries, "passages": domain.passages}
    return Comparison(
        title,
        (figure.after,),
        (other,),
        "the retriever alone" if retriever else "base",
        unit="",
        facts={**shown(figure), **sizes, **others, **facts, **done.facts, "must reach": must_reach},
    )


def chosen_by_hand(operation: str, request: dict[str, Any]) -> None:
    """Train as a request says; print what came of it, beside what the command line had asked for."""
    done = train_retriever(operation, request, lambda text: print(text, file=sys.stderr, flush=True))
    given = given_by_hand()
    for domain in done.result.domains:
        for figure in domain.figures:
            found = {"dataset": domain.dataset, "metric": figure.metric, **shown(figure)}
            print(json.dumps({**given, **found}, ensure_ascii=False))
    print(json.dumps(done.facts), flush=True)
