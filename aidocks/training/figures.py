"""The curves of a training as one picture: losses, what the method is about, and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from aidocks.picture import png
from aidocks.training.run import ONLINE_METHODS, Point

_BLUE, _AMBER, _GREEN, _GREY = "#1f4e79", "#b8860b", "#2e7d32", "#8a97a3"
#: Points of a curve's smoothed line: each is the mean of a share of them.
_SMOOTHED = 40
#: What a panel shows of a method, by TRL's names: figure -> what people call it.
_FURTHER: dict[str, str] = {
    "rewards/accuracies": "pairs the right way round",
    "rewards/margins": "reward margin",
    "accuracy": "pairs the right way round",
    "margin": "score margin",
    "kl": "KL from the reference",
    "mean_token_accuracy": "tokens predicted",
}


def draw_curves(method: str, points: Sequence[Point], loss: str = "loss, nats") -> bytes | None:
    """Draw a training as a PNG: a panel for each kind of curve that it has; None where nothing was logged.

    Args:
        method: Of the training, or the loss of what finds texts.
        points: In the order of the steps.
        loss: What people call the loss, with its unit.
    """
    panels = _panels(method, points, loss)
    if not panels:
        return None
    figure = Figure(figsize=(6.4, 0.5 + 1.7 * len(panels)), layout="constrained")
    for axes, (title, curves) in zip(
        figure.subplots(len(panels), 1, squeeze=False).flat, panels, strict=True
    ):
        for curve in curves:
            _draw(axes, **curve)
        axes.set_title(title, fontsize=8, loc="left")
        axes.tick_params(labelsize=6, length=2)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(linewidth=0.3, color="#d5dae0")
        if any(curve.get("label") for curve in curves):
            axes.legend(fontsize=6, frameon=False)
    axes.set_xlabel("optimiser step", fontsize=7)
    return png(figure)


def _panels(method: str, points: Sequence[Point], title: str) -> list[tuple[str, list[dict[str, Any]]]]:
    panels: list[tuple[str, list[dict[str, Any]]]] = []
    if method in ONLINE_METHODS:
        rewards = _series(points, "reward")
        spread = dict(_series(points, "reward_std"))
        if rewards:
            band = [spread.get(step, 0.0) for step, _ in rewards]
            panels.append(
                ("reward of the answers (band: their spread)", [_curve(rewards, _GREEN, band=band)])
            )
    losses = [(p.step, p.loss) for p in points if p.loss is not None]
    held_out = [(p.step, p.eval_loss) for p in points if p.eval_loss is not None]
    both = [_curve(losses, _BLUE, label="training")] if losses else []
    both += [_curve(held_out, _AMBER, label="held out", marks=True)] if held_out else []
    if both:
        panels.append((title, both))
    for name, called in _FURTHER.items():
        series = _series(points, name)
        if series and len(panels) < 4:
            panels.append((called, [_curve(series, _GREEN)]))
    rate = [(p.step, p.learning_rate) for p in points if p.learning_rate is not None]
    if rate:
        panels.append(("learning rate", [_curve(rate, _GREY, smooth=False)]))
    return panels


def _series(points: Sequence[Point], name: str) -> list[tuple[int, float]]:
    return [(p.step, p.further[name]) for p in points if name in p.further]


def _curve(
    series: Sequence[tuple[int, float | None]],
    color: str,
    *,
    label: str | None = None,
    band: Sequence[float] | None = None,
    marks: bool = False,
    smooth: bool = True,
) -> dict[str, Any]:
    return {
        "series": series,
        "color": color,
        "label": label,
        "band": band,
        "marks": marks,
        "smooth": smooth and not marks,
    }


def _draw(
    axes: Any,
    *,
    series: Sequence[tuple[int, float]],
    color: str,
    label: str | None,
    band: Sequence[float] | None,
    marks: bool,
    smooth: bool,
) -> None:
    steps = [step for step, _ in series]
    values = [value if math.isfinite(value) else math.nan for _, value in series]
    if band is not None:
        low = [value - width for value, width in zip(values, band, strict=True)]
        high = [value + width for value, width in zip(values, band, strict=True)]
        axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    smoothed = _smoothed(steps, values) if smooth else None
    if smoothed is None:
        axes.plot(
            steps, values, color=color, linewidth=1, marker="o" if marks else None, markersize=3, label=label
        )
        return
    axes.plot(steps, values, color=color, linewidth=0.5, alpha=0.35)
    axes.plot(*smoothed, color=color, linewidth=1.3, label=label)


def _smoothed(steps: Sequence[int], values: Sequence[float]) -> tuple[list[float], list[float]] | None:
    """Return means of equal shares of a curve; None where it has too few points to need them."""
    size = len(values) // _SMOOTHED
    if size < 2:
        return None
    parts = [range(begin, min(begin + size, len(values))) for begin in range(0, len(values), size)]
    return [fmean(steps[i] for i in part) for part in parts], [
        fmean(values[i] for i in part) for part in parts
    ]
