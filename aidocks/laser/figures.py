"""The pictures of a report, drawn without a display and without global state. Spectra: see ``scan_figures``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from aidocks.laser.ledger import LedgerLine, loss_unit, part_title, written_z
from aidocks.picture import png
from aidocks.specs.objective import Metric
from aidocks.specs.part_score import PartScore

_ACCEPTED, _HELPED, _REJECTED, _AFTER = "#2e7d32", "#b8860b", "#8a97a3", "#1f4e79"
#: Beyond these a picture is no longer read: what is left out is said, and is in the ledger.
_MOST_LINES, _MOST_PANELS = 60, 8


def draw_candidates(lines: Sequence[LedgerLine], z_threshold: float, metric: Metric) -> bytes:
    """Draw the change of the loss by every measured candidate alone, with the error bars that decide.

    Args:
        lines: Of the ledger. Where there are many, accepted ones and those that lowered the loss most are drawn.
        z_threshold: Length of the bars, in standard errors.
        metric: Of the objective; it gives the unit.

    Returns:
        PNG.
    """
    measured = [line for line in lines if line.items]
    best = sorted(measured, key=_merit)[:_MOST_LINES]
    drawn = [line for line in measured if any(line is other for other in best)]
    figure = Figure(figsize=(7.5, max(2.2, 1.2 + 0.2 * len(drawn))), layout="constrained")
    axes = figure.add_subplot()
    limit = _limit(drawn, z_threshold)
    for row, line in enumerate(drawn):
        color = _color(line, z_threshold)
        if line.delta is None or line.standard_error is None:
            axes.text(0, row, " not finite", fontsize=6, va="center")
        elif abs(line.delta) > limit:
            side = "right" if line.delta > 0 else "left"
            place = math.copysign(limit, line.delta)
            axes.text(place, row, f" {line.delta:+.2g} ", fontsize=6, va="center", ha=side, color=color)
        else:
            error = z_threshold * line.standard_error
            axes.errorbar(line.delta, row, xerr=error, fmt="o", color=color, markersize=4)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlim(-limit, limit)
    axes.set_yticks(range(len(drawn)), [line.label for line in drawn], fontsize=5.5)
    axes.set_ylim(max(1, len(drawn)) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_xlabel(
        f"change of the loss, {loss_unit(metric)} (bars: {z_threshold:g} standard errors)", fontsize=8
    )
    left_out = len(measured) - len(drawn)
    title = "Each candidate alone (green: accepted; amber: helped alone)"
    rest = f"\n{left_out} that did worse are not drawn" if left_out else ""
    axes.set_title(title + rest, fontsize=9)
    return png(figure)


def draw_predictions(lines: Sequence[LedgerLine], metric: Metric) -> bytes | None:
    """Draw the predicted against the measured change of the loss; None where nothing was both.

    Args:
        lines: Of the ledger.
        metric: Of the objective; it gives the unit.
    """
    known = [
        (line.predicted_with_fisher, line.delta, line)
        for line in lines
        if line.predicted_with_fisher is not None and line.delta is not None
    ]
    if not known:
        return None
    figure = Figure(figsize=(5.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for predicted, measured, line in known:
        axes.errorbar(
            predicted,
            measured,
            xerr=line.predicted_standard_error,
            yerr=line.standard_error,
            fmt="o",
            color=_ACCEPTED if line.accepted else _REJECTED,
            markersize=4,
            linewidth=0.8,
        )
    # One candidate that does great harm must not squeeze all others into a corner.
    axes.set_xscale("symlog", linthresh=_scale([predicted for predicted, _, _ in known]))
    axes.set_yscale("symlog", linthresh=_scale([measured for _, measured, _ in known]))
    axes.axhline(0, color="black", linewidth=0.6)
    axes.axvline(0, color="black", linewidth=0.6)
    axes.tick_params(labelsize=6)
    axes.set_xlabel(f"predicted: first order and Fisher, {loss_unit(metric)}", fontsize=8)
    axes.set_ylabel(f"measured, {loss_unit(metric)}", fontsize=8)
    axes.set_title("Predicted and measured change of the loss (bars: one standard error)", fontsize=9)
    return png(figure)


def draw_before_after(scores: Sequence[PartScore]) -> bytes | None:
    """Draw base and result on every part of every data set, one panel a data set; None where nothing was measured.

    Args:
        scores: Of the objective and the guards, in the order in which they are drawn.
    """
    groups: dict[str, list[PartScore]] = {}
    for score in scores:
        groups.setdefault(score.label, []).append(score)
    shown = list(groups.items())[:_MOST_PANELS]
    if not shown:
        return None
    columns = min(len(shown), 2)
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4.6 * columns, 2.9 * rows + 0.4), layout="constrained")
    for number, (label, parts) in enumerate(shown, 1):
        _draw_panel(figure.add_subplot(rows, columns, number), label, parts)
    figure.suptitle(
        "Before (grey) and after (blue), with standard errors; z is of the paired change", fontsize=9
    )
    return png(figure)


def _draw_panel(axes: Any, label: str, parts: Sequence[PartScore]) -> None:
    for place, part in enumerate(parts):
        for shift, value, error, color in (
            (-0.1, part.before, part.before_standard_error, _REJECTED),
            (0.1, part.after, part.after_standard_error, _AFTER),
        ):
            if value is None:
                axes.text(place + shift, 0.5, "not finite", fontsize=6, rotation=90, ha="center")
            else:
                axes.errorbar(place + shift, value, yerr=error, fmt="o", color=color, capsize=3, markersize=5)
    names = [f"{part_title(part.part)}\nz = {written_z(part.z) or '-'}" for part in parts]
    axes.set_xticks(range(len(parts)), names, fontsize=7)
    axes.set_xlim(-0.5, len(parts) - 0.5)
    axes.tick_params(axis="y", labelsize=7)
    better = "lower" if parts[0].lower_is_better else "higher"
    axes.set_title(f"{label} ({better} is better)", fontsize=8)


def _merit(line: LedgerLine) -> tuple[bool, float]:
    return not line.accepted, math.inf if line.delta is None else line.delta


def _limit(lines: Sequence[LedgerLine], z_threshold: float) -> float:
    """Return where an axis ends on both sides, so that the few that do great harm leave the others some room."""
    sizes = sorted(
        abs(line.delta) + z_threshold * (line.standard_error or 0.0)
        for line in lines
        if line.delta is not None
    )
    if not sizes:
        return 1.0
    return 1.1 * min(sizes[-1], 4 * sizes[len(sizes) // 2] or sizes[-1]) or 1.0


def _color(line: LedgerLine, z_threshold: float) -> str:
    if line.accepted:
        return _ACCEPTED
    return _HELPED if line.z is not None and line.z <= -z_threshold else _REJECTED


def _scale(values: Sequence[float]) -> float:
    """Return the median size of values that are not zero: below it an axis is linear, above it logarithmic."""
    sizes = sorted(abs(value) for value in values if value)
    return float(sizes[len(sizes) // 2]) if sizes else 1.0
