"""Figures before and after a training as one picture: a panel for each data set, a line for each figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure as Picture

from aidocks.evaluate.comparison import shown
from aidocks.picture import png
from aidocks.retrieval.report import called
from aidocks.specs.train_retrieval_result import Domain, Figure

_BEFORE, _BETTER, _WORSE, _SAME = "#8a97a3", "#2e7d32", "#b03a2e", "#1f4e79"
_COLORS = {"improved": _BETTER, "worse": _WORSE, "not distinguishable": _SAME}
#: Data sets that are drawn, at most; all are in the tables.
_MOST = 6


def draw_figures(domains: Sequence[Domain]) -> bytes | None:
    """Draw every figure of every data set, before (grey) and after, with its 95 % interval, as a PNG.

    Returns:
        None where nothing was measured.
    """
    drawn = [one for one in domains if one.figures][:_MOST]
    if not drawn:
        return None
    heights = [0.7 + 0.28 * len(one.figures) for one in drawn]
    picture = Picture(figsize=(6.4, 0.4 + sum(heights)), layout="constrained")
    panels = picture.subplots(len(drawn), 1, squeeze=False, height_ratios=heights).flat
    for axes, domain in zip(panels, drawn, strict=True):
        _draw(axes, domain)
    return png(picture)


def _draw(axes: Any, domain: Domain) -> None:
    for place, figure in enumerate(reversed(domain.figures)):
        _mark(axes, place + 0.16, (figure.before, figure.before_low, figure.before_high), _BEFORE)
        _mark(
            axes, place - 0.16, (figure.after, figure.after_low, figure.after_high), _COLORS[figure.verdict]
        )
        if figure.retriever is not None:
            axes.plot([figure.retriever], [place], marker="|", markersize=9, color=_BEFORE)
    names = [called(figure.metric) for figure in reversed(domain.figures)]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.tick_params(labelsize=6, length=2)
    axes.grid(axis="x", linewidth=0.3, color="#d5dae0")
    what = "pairs" if domain.rows == "scored" else "queries"
    seen = (
        f"{domain.queries:,} held-out {what}"
        if domain.trained
        else f"{domain.queries:,} {what}, not trained on"
    )
    axes.set_title(
        f"{shown(domain.dataset)}: {seen} (grey: before{_alone(domain.figures)})", fontsize=7, loc="left"
    )


def _alone(figures: Sequence[Figure]) -> str:
    return "; stroke: the retriever alone" if any(one.retriever is not None for one in figures) else ""


def _mark(axes: Any, place: float, drawn: tuple[float, float, float], color: str) -> None:
    value, low, high = drawn
    axes.plot([low, high], [place, place], color=color, linewidth=1)
    axes.plot([value], [place], marker="o", markersize=3.5, color=color)
