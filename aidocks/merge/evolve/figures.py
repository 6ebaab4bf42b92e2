"""The picture of a search, drawn without a display and without global state."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from aidocks.laser.ledger import loss_unit
from aidocks.merge.evolve.report import EvolutionLine
from aidocks.picture import png
from aidocks.specs.merge_evolve_result import FoundValue
from aidocks.specs.objective import Metric

_BEST, _MEAN, _ONE, _START = "#2e7d32", "#1f4e79", "#8a97a3", "#b8860b"
#: Beyond these a picture is no longer read.
_MOST_VARIABLES = 10


def draw_evolution(
    lines: Sequence[EvolutionLine], variables: Sequence[FoundValue], spreads: Sequence[float], metric: Metric
) -> bytes:
    """Draw the loss of all candidates by generation, the best so far and the mean; and where the values went.

    Args:
        lines: Of the ledger.
        variables: The searched numbers.
        spreads: Of each generation, as shares of the ranges.
        metric: Of the objective; it gives the unit.

    Returns:
        PNG.
    """
    figure = Figure(figsize=(7.5, 6.4), layout="constrained")
    losses, values = figure.subplots(2, 1, sharex=True)
    generations = _by_generation(lines)
    _draw_losses(losses, lines, generations, metric)
    _draw_values(values, generations, variables, spreads)
    values.xaxis.set_major_locator(MaxNLocator(integer=True))
    values.set_xlabel("generation (0: the initial values)", fontsize=8)
    return png(figure)


def _by_generation(lines: Sequence[EvolutionLine]) -> dict[int, list[EvolutionLine]]:
    found: dict[int, list[EvolutionLine]] = {}
    for line in lines:
        if line.what != "centre":
            found.setdefault(line.generation, []).append(line)
    return found


def _draw_losses(
    axes: Any, lines: Sequence[EvolutionLine], generations: dict[int, list[EvolutionLine]], metric: Metric
) -> None:
    shown = [line for line in lines if line.loss is not None and line.what != "centre"]
    for is_sound, label in ((True, "candidates"), (False, "broke a guard, or given up early")):
        points = [(line.generation, line.loss) for line in shown if line.is_sound == is_sound]
        if points:
            fill = _ONE if is_sound else "none"
            axes.plot(
                *zip(*points, strict=True), "o", color=_ONE, markerfacecolor=fill, markersize=3.5, label=label
            )
    means = {
        generation: fmean(known)
        for generation, members in generations.items()
        if (known := [line.loss for line in members if line.loss is not None])
    }
    axes.plot(list(means), list(means.values()), color=_MEAN, linewidth=1, label="mean of the generation")
    sound = [(line.generation, line.loss) for line in shown if line.is_sound and line.loss is not None]
    best = [(number, min(loss for at, loss in sound if at <= number)) for number in generations]
    axes.step(*zip(*best, strict=True), where="post", color=_BEST, linewidth=1.6, label="best so far")
    start = lines[0].loss
    if start is not None:
        axes.axhline(start, color=_START, linewidth=0.8, linestyle="--", label="initial values")
    # A few candidates that do great harm must not squeeze all others into a line.
    losses = sorted(line.loss for line in shown if line.loss is not None)
    low, high = losses[0], min(losses[-1], max(median(losses), start or losses[-1]) * 2 - losses[0])
    room = 0.05 * (high - low) or 0.05
    axes.set_ylim(low - room, high + room)
    axes.set_ylabel(f"loss on the search data, {loss_unit(metric)}", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7)


def _draw_values(
    axes: Any,
    generations: dict[int, list[EvolutionLine]],
    variables: Sequence[FoundValue],
    spreads: Sequence[float],
) -> None:
    for number, variable in enumerate(variables[:_MOST_VARIABLES]):
        width = variable.max - variable.min
        means = [
            (generation, fmean((line.values[number] - variable.min) / width for line in members))
            for generation, members in generations.items()
        ]
        axes.plot(*zip(*means, strict=True), linewidth=1, label=variable.name)
    axes.plot(range(1, len(spreads) + 1), spreads, color="black", linestyle=":", label="spread")
    axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel("mean of the generation, share of the range", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=6, ncols=2)
