"""The pictures of a scan, drawn without a display and without global state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from aidocks.laser import marchenko_pastur as mp
from aidocks.laser.layer_lists import group_by_kind
from aidocks.laser.matrices import Matrix
from aidocks.specs.laser_scan import ScannedMatrix

_BULK, _LAW, _EDGE, _ORIGINAL = "#b8c4d0", "#1f4e79", "#c0392b", "#b8860b"
#: What is left out of the colours at either end: smaller ratios look like this one.
_LEAST_RATIO = 1e-2


def draw_noise_ratios(rows: Sequence[ScannedMatrix]) -> bytes:
    """Draw the corrected signal-to-noise ratio as a heat map, layer by kind; of several experts, their median."""
    groups = group_by_kind(rows)
    layers = sorted({row.layer for members in groups.values() for row in members if row.layer is not None})
    place = {layer: row for row, layer in enumerate(layers)}
    ratios = np.full((max(1, len(layers)), max(1, len(groups))), np.nan)
    for column, members in enumerate(groups.values()):
        found: dict[int, list[float]] = {}
        for row in members:
            found.setdefault(place[row.layer or 0], []).append(
                math.inf if row.noise_ratio is None else row.noise_ratio
            )
        for line, values in found.items():
            ratios[line, column] = float(np.median(values))
    figure = Figure(figsize=(2.5 + 0.75 * len(groups), 2.4 + 0.17 * len(layers)), layout="constrained")
    axes = figure.add_subplot()
    shown = ratios[np.isfinite(ratios)]
    highest = max(float(shown.max(initial=0.0)), 2 * _LEAST_RATIO)
    image = axes.imshow(
        np.clip(ratios, _LEAST_RATIO, highest),
        aspect="auto",
        cmap="viridis",
        norm=LogNorm(_LEAST_RATIO, highest),
    )
    axes.set_xticks(range(len(groups)), list(groups), rotation=40, ha="right", fontsize=7)
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=6)
    axes.set_ylabel("layer")
    axes.set_title("Corrected signal-to-noise ratio", fontsize=9)
    figure.colorbar(image, ax=axes)
    return _png(figure)


def draw_spectra(spectra: Sequence[tuple[Matrix, mp.Values]]) -> bytes:
    """Draw histograms of singular values with the law that was fitted to the bulk, and two thresholds.

    Args:
        spectra: Matrices with all of their singular values.
    """
    columns = 2 if len(spectra) > 1 else 1
    rows = -(-len(spectra) // columns)
    figure = Figure(figsize=(5.6 * columns, 3.0 * rows), layout="constrained")
    for index, (matrix, values_N) in enumerate(spectra):
        _draw_spectrum(figure.add_subplot(rows, columns, index + 1), matrix, values_N)
    figure.suptitle("Singular values and the Marchenko-Pastur law", fontsize=10)
    return _png(figure)


def _draw_spectrum(axes: Any, matrix: Matrix, values_N: mp.Values) -> None:
    fit = mp.fit_bulk(values_N, matrix.shape)
    edge, original = mp.marchenko_pastur(values_N, matrix.shape), mp.laserrmt(values_N, matrix.shape)
    small, large = (side - fit.outliers for side in (min(matrix.shape), max(matrix.shape)))
    # The few largest values would flatten the picture: they are counted at its right border instead.
    limit = max(edge.threshold * 1.6, float(np.quantile(values_N, 0.98))) or 1.0
    bins = max(8, min(60, len(values_N) // 4))
    axes.hist(
        np.clip(values_N, None, limit),
        bins=bins,
        range=(0, limit),
        color=_BULK,
        label=f"{len(values_N)} values",
    )
    unit = fit.sigma * large**0.5
    if unit > 0:
        x = np.linspace(0, limit, 600)
        scale = small * limit / bins / unit
        label = f"law, sigma {fit.sigma:.3g}, distance {fit.distance:.3f}"
        axes.plot(x, scale * mp.density(x / unit, small / large), color=_LAW, label=label)
    axes.axvline(edge.threshold, color=_EDGE, label=f"edge: rank {edge.rank}")
    axes.axvline(
        min(original.threshold, limit),
        color=_ORIGINAL,
        linestyle="--",
        label=f"laserrmt: rank {original.rank}",
    )
    axes.set_title(f"{matrix.address}  {matrix.shape[0]} x {matrix.shape[1]}", fontsize=7)
    axes.set_xlim(0, limit * 1.02)
    axes.legend(fontsize=6)


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    image = BytesIO()
    figure.savefig(image, format="png", dpi=130, metadata={"Software": None})
    return image.getvalue()
