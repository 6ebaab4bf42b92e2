"""The pictures of a report, drawn without a display and without global state."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from aidocks.laser import marchenko_pastur as mp
from aidocks.laser.matrices import Matrix
from aidocks.laser.selection import Candidate
from aidocks.specs.laser import BeforeAfter

_BULK, _LAW, _EDGE, _ORIGINAL = "#b8c4d0", "#1f4e79", "#c0392b", "#b8860b"
_ACCEPTED, _REJECTED = "#2e7d32", "#8a97a3"


def draw_spectra(spectra: Sequence[tuple[Matrix, mp.Values]]) -> bytes:
    """Draw histograms of singular values with the fitted Marchenko-Pastur density and the thresholds of
    both rules.

    Args:
        spectra: Matrices with all of their singular values.
    """
    columns = 2 if len(spectra) > 1 else 1
    rows = -(-len(spectra) // columns)
    figure = Figure(figsize=(5.6 * columns, 3.2 * rows), layout="constrained")
    for index, (matrix, values) in enumerate(spectra):
        axes = figure.add_subplot(rows, columns, index + 1)
        _draw_spectrum(axes, matrix, values)
    figure.suptitle("Singular values and the Marchenko-Pastur law")
    return _png(figure)


def _draw_spectrum(axes: Any, matrix: Matrix, values: mp.Values) -> None:
    fitted, original = mp.marchenko_pastur(values, matrix.shape), mp.laserrmt(values, matrix.shape)
    small, large = min(matrix.shape), max(matrix.shape)
    unit = fitted.sigma * large**0.5
    # The few largest values would flatten the picture: they are counted at its right border instead.
    limit = max(fitted.threshold * 1.6, float(np.quantile(values, 0.98)))
    bins = max(8, min(60, len(values) // 4))
    axes.hist(
        np.clip(values, None, limit), bins=bins, density=True, color=_BULK, label=f"{len(values)} values"
    )
    if unit > 0:
        x = np.linspace(0, limit, 600)
        axes.plot(x, mp.density(x / unit, small / large) / unit, color=_LAW, label="law, sigma by median")
    axes.axvline(fitted.threshold, color=_EDGE, label=f"edge: rank {fitted.rank}")
    axes.axvline(original.threshold, color=_ORIGINAL, linestyle="--", label=f"laserrmt: rank {original.rank}")
    axes.set_title(f"{matrix.name}  {matrix.shape[0]} x {matrix.shape[1]}", fontsize=8)
    axes.set_xlim(0, limit)
    axes.legend(fontsize=7)


def draw_candidates(candidates: Sequence[Candidate], z_threshold: float) -> bytes:
    """Draw the change of the loss of every candidate alone, with the error bars that decide."""
    figure = Figure(figsize=(7.5, max(2.2, 1.2 + 0.22 * len(candidates))), layout="constrained")
    axes = figure.add_subplot()
    for row, candidate in enumerate(candidates):
        alone = candidate.alone
        if alone is None or alone.delta is None or alone.standard_error is None:
            axes.text(0, row, "not finite", fontsize=7, va="center")
            continue
        color = _ACCEPTED if candidate.verdict == "accepted" else _REJECTED
        axes.errorbar(
            alone.delta, row, xerr=z_threshold * alone.standard_error, fmt="o", color=color, markersize=4
        )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(candidates)), [c.label for c in candidates], fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel(f"change of the loss, nats per token (bars: {z_threshold:g} standard errors)", fontsize=8)
    axes.set_title("Each candidate alone; green ones were accepted", fontsize=9)
    return _png(figure)


def draw_before_after(search: BeforeAfter, held_out: BeforeAfter) -> bytes:
    """Draw perplexity before and after on both splits."""
    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for place, part in enumerate((search, held_out)):
        for shift, value, error, color in (
            (-0.17, part.before, part.before_standard_error, _REJECTED),
            (0.17, part.after, part.after_standard_error, _LAW),
        ):
            if value is not None:
                axes.bar(place + shift, value, 0.32, yerr=error, color=color, capsize=3)
    labels = [f"{name}\nz = {_number(p.z)}" for name, p in (("search", search), ("held out", held_out))]
    axes.set_xticks((0, 1), labels)
    axes.set_ylabel("perplexity (lower is better)")
    axes.set_title("Before (grey) and after (blue); z is of the paired difference", fontsize=9)
    return _png(figure)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    image = BytesIO()
    figure.savefig(image, format="png", dpi=130, metadata={"Software": None})
    return image.getvalue()
