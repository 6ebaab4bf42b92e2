"""The pictures of an MoE's report, drawn without a display and without global state.

Experts are numbered as in the request; texts are called by the expert whose examples they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from aidocks.evaluate.figures import short_name
from aidocks.moe.report import WORST_CONDITION, TrainingPoint, own_expert, text_title
from aidocks.picture import png

_SHARE, _COSINE = "YlGnBu", "RdBu_r"
_GREY, _RED, _BLUE, _AMBER, _GREEN = "#8a97a3", "#c0392b", "#1f4e79", "#b8860b", "#2e7d32"
#: Beyond these a picture is no longer read: what is left out is said, and is in the report's numbers.
_MOST_PANELS, _MOST_EXPERTS, _MOST_NAMES, _MOST_LINES = 12, 12, 16, 10


def draw_routing(weight_DLE: NDArray[np.float64], domains: Sequence[str], names: Sequence[str]) -> bytes:
    """Draw the share of each layer's mixture that each expert supplied, one panel a text, all in one scale.

    Args:
        weight_DLE: Shares, [domains, layers, experts]; rows sum to 1.
        domains: Names of the domains.
        names: Of the experts.

    Returns:
        PNG.
    """
    shown = weight_DLE[:_MOST_PANELS]
    panels, layers, experts = shown.shape
    columns = panels if panels <= 4 else ceil(panels / ceil(panels / 5))
    rows = ceil(panels / columns)
    width, height = min(3.4, max(1.25, 0.3 + 0.24 * experts)), min(4.4, max(1.3, 0.4 + 0.1 * layers))
    size = (max(4.6, 1.3 + width * columns), 0.75 + (height + 0.4) * rows)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    highest = float(shown.max())
    image = None
    for number, axes in enumerate(grid.flat):
        if number >= panels:
            axes.set_axis_off()
            continue
        image = axes.imshow(shown[number], aspect="auto", cmap=_SHARE, vmin=0, vmax=highest)
        axes.set_title(text_title(domains[number]), fontsize=7)
        axes.set_xticks(range(0, experts, ceil(experts / 16)))
        axes.tick_params(labelsize=6, length=2)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        own = own_expert(domains[number])
        for label in axes.get_xticklabels():
            label.set_fontweight("bold" if label.get_text() == str(own) else "normal")
        if layers <= 12 and experts <= 8:
            _write_shares(axes, shown[number], highest)
    for axes in grid[:, 0]:
        axes.set_ylabel("layer", fontsize=7)
    assert image is not None, "there is a domain"
    bar = figure.colorbar(image, ax=grid, aspect=30, shrink=0.9)
    bar.ax.tick_params(labelsize=6)
    bar.ax.axhline(1 / experts, color="k", linewidth=0.8)
    bar.set_label(f"share of the mixture\n(line: even, {1 / experts:.2g})", fontsize=7)
    left_out = len(weight_DLE) - panels
    figure.suptitle(
        "Which expert served which text" + (f" ({left_out} more texts are not drawn)" if left_out else ""),
        fontsize=9,
    )
    figure.supxlabel(_numbered(names, per_line=max(24, int(size[0] * 15))), fontsize=7)
    return png(figure)


def _write_shares(axes: Any, weight_LE: NDArray[np.float64], highest: float) -> None:
    for (layer, expert), share in np.ndenumerate(weight_LE):
        color = "w" if share > 0.6 * highest else "k"
        text = f"{share:.2f}".removeprefix("0")
        axes.text(expert, layer, text, ha="center", va="center", fontsize=5, color=color)


def draw_balance(
    load_LE: NDArray[np.float64], aux_L: Sequence[float], experts_per_token: int, names: Sequence[str]
) -> bytes:
    """Draw how evenly the experts of each layer are used over all texts, and the load-balancing loss.

    Args:
        load_LE: Shares of each layer's choices over the mix of all texts, [layers, experts].
        aux_L: Load-balancing loss of each layer; ``experts_per_token`` is even.
        experts_per_token: k.
        names: Of the experts.
    """
    layers, experts = load_LE.shape
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = np.arange(layers)
    if experts <= _MOST_LINES:
        for number in range(experts):
            left.plot(x, load_LE[:, number], marker=".", linewidth=1, color=f"C{number}", label=str(number))
        left.legend(fontsize=6, ncols=min(5, experts), title="expert", title_fontsize=6, loc="upper right")
    else:
        left.fill_between(
            x, load_LE.min(1), load_LE.max(1), color=_BLUE, alpha=0.25, label="least to most used"
        )
        left.plot(x, np.median(load_LE, 1), color=_BLUE, label="median expert")
        left.legend(fontsize=6, loc="upper right")
    left.axhline(1 / experts, color=_GREY, linestyle="--", linewidth=0.8)
    # Room for the legend above the lines.
    left.set_ylim(0, max(1.5 / experts, float(load_LE.max()) * 1.35))
    left.set_title(f"Share of the layer's choices (dashed: even, {1 / experts:.2g})", fontsize=8)
    right.plot(x, aux_L, marker=".", linewidth=1, color=_BLUE)
    right.axhline(experts_per_token, color=_GREY, linestyle="--", linewidth=0.8)
    low, high = min(*aux_L, experts_per_token), max(*aux_L, experts_per_token)
    room = max(0.08 * (high - low), 0.02 * high)
    right.set_ylim(low - room, high + room)
    right.set_title(f"Load-balancing loss (dashed: even, {experts_per_token}; worst: {experts})", fontsize=8)
    for axes in (left, right):
        axes.set_xlabel("layer", fontsize=7)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(labelsize=7)
    figure.supxlabel(_numbered(names, per_line=130), fontsize=7)
    return png(figure)


def draw_gates(
    mean_EE: NDArray[np.float64], condition: Sequence[float | None], names: Sequence[str]
) -> bytes:
    """Draw how parallel the router rows are: mean cosine of every pair, and each layer's condition number.

    Args:
        mean_EE: Cosines between rows, mean over layers.
        condition: Condition number of each layer; None where rows are linearly dependent. May be empty: then
            only the cosines are drawn.
        names: Of the experts.
    """
    experts = len(names)
    side = min(6.0, max(2.6, 1.2 + 0.3 * experts))
    figure = Figure(figsize=(side + 2.6 + (3.8 if condition else 0), side), layout="constrained")
    widths = [side + 2.6, 3.8][: 2 if condition else 1]
    left, *rest = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    # Not of equal aspect: the layout could not find room for long names then.
    image = left.imshow(mean_EE, aspect="auto", cmap=_COSINE, vmin=-1, vmax=1)
    ticks = range(0, experts, ceil(experts / 32))
    left.set_xticks(ticks, ticks, fontsize=7)
    left.set_yticks(ticks, [f"{i}  {short_name(names[i])}" for i in ticks], fontsize=7)
    left.set_title("Cosine of router rows, mean over layers", fontsize=8)
    if experts <= 12:
        for (i, j), cosine in np.ndenumerate(mean_EE):
            color = "w" if abs(cosine) > 0.6 else "k"
            left.text(j, i, f"{cosine:.2f}", ha="center", va="center", fontsize=6, color=color)
    figure.colorbar(image, ax=left, shrink=0.9).ax.tick_params(labelsize=6)
    for axes in rest:
        _draw_condition(axes, condition)
    return png(figure)


def _draw_condition(axes: Any, condition: Sequence[float | None]) -> None:
    dependent = [layer for layer, number in enumerate(condition) if number is None]
    known = [number for number in condition if number is not None]
    # NaN breaks the line where there is no number.
    axes.plot([np.nan if number is None else number for number in condition], marker=".", color=_BLUE)
    for layer in dependent:
        axes.axvline(layer, color=_RED, linewidth=0.8)
    axes.axhline(WORST_CONDITION, color=_GREY, linestyle="--", linewidth=0.8)
    axes.set_ylim(0, 1.1 * max([WORST_CONDITION, *known]))
    axes.set_xlim(-0.5, len(condition) - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=7)
    axes.set_xlabel("layer (red: rows are dependent)" if dependent else "layer", fontsize=7)
    axes.set_title("Condition number of the rows (1 is best)", fontsize=8)


def draw_training(points: Sequence[TrainingPoint]) -> bytes:
    """Draw how the gates learned: the loss of every text, and the load-balancing loss, by step."""
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [point.step for point in points]
    domains = list(points[0].losses)
    for number, domain in enumerate(domains):
        losses = [point.losses.get(domain, np.nan) for point in points]
        color = f"C{number}" if len(domains) <= _MOST_LINES else _GREY
        left.plot(steps, losses, marker=".", linewidth=1, color=color, label=text_title(domain))
    if 1 < len(domains) <= _MOST_LINES:
        left.plot(steps, [point.mean_loss for point in points], color="k", linewidth=1.4, label="mean")
    if len(domains) <= _MOST_LINES:
        figure.legend(fontsize=6, loc="outside lower center", ncols=min(6, len(domains) + 1), frameon=False)
    left.set_title("Loss, nats per token", fontsize=8)
    right.plot(steps, [point.aux_loss for point in points], marker=".", linewidth=1, color=_BLUE)
    right.set_title("Load-balancing loss, mean over layers", fontsize=8)
    for axes in (left, right):
        axes.set_xlabel("step", fontsize=7)
        axes.tick_params(labelsize=7)
        axes.margins(y=0.08)
    return png(figure)


def _numbered(names: Sequence[str], per_line: int) -> str:
    """Return `0 name   1 name ...` in lines of limited length."""
    items = [f"{number} {short_name(name)}" for number, name in enumerate(names[:_MOST_NAMES])]
    if len(names) > _MOST_NAMES:
        items.append(f"… {len(names) - 1}")
    lines = [""]
    for item in items:
        if lines[-1] and len(lines[-1]) + len(item) > per_line:
            lines.append("")
        lines[-1] += f"    {item}" if lines[-1] else item
    return "\n".join(lines)
