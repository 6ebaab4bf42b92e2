"""The pictures of a scan, drawn without a display and without global state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from aidocks.laser import marchenko_pastur as mp
from aidocks.laser.layer_lists import group_by_kind
from aidocks.laser.matrices import Matrix
from aidocks.picture import png
from aidocks.specs.laser_scan import ScannedMatrix

_BULK, _LAW, _EDGE, _ORIGINAL = "#b8c4d0", "#1f4e79", "#c0392b", "#b8860b"
#: What is left out of the colours at either end: smaller ratios look like this one.
_LEAST_RATIO = 1e-2
#: Small multiples side by side.
_COLUMNS = 8


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
    return png(figure)


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
    return png(figure)


def draw_kind(title: str, spectra: Iterable[tuple[Matrix, mp.Values]], count: int) -> bytes:
    """Draw the spectra of one kind as small multiples.

    Args:
        title: Of the picture.
        spectra: Matrices with all of their singular values.
        count: How many they are.
    """
    columns = min(count, _COLUMNS)
    rows = -(-count // columns)
    width, height = max(6.4, 1.5 * columns), 1.3 * rows + 0.8
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(0.1 / width, 0.25 / height, 1 - 0.1 / width, 1 - 0.65 / height, 0.12, 0.5)
    for index, (matrix, values_N) in enumerate(spectra):
        axes = figure.add_subplot(rows, columns, index + 1)
        edge, fit = mp.marchenko_pastur(values_N, matrix.shape), mp.fit_bulk(values_N, matrix.shape)
        _draw_bulk(axes, matrix, values_N, fit, edge)
        axes.set_title(f"{_place(matrix)}: k {edge.rank}, D {fit.distance:.3f}", fontsize=5, pad=2)
        axes.set_yticks([])
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.tick_params(labelsize=4, length=2, pad=1)
    legend = (
        "grey: singular values, blue: the law fitted to their bulk (D: distance), red: edge (k: values above)"
    )
    figure.suptitle(f"{title}\n{legend}", fontsize=7, y=1 - 0.08 / height)
    return png(figure)


def _place(matrix: Matrix) -> str:
    """Name a matrix within the picture of its kind: by the numbers in its address, or all of it."""
    if matrix.layer is None:
        return matrix.address.removesuffix(".weight")
    numbers = [part for part in matrix.name.split(".") if part.isdecimal()]
    if matrix.expert is not None:
        numbers.append(str(matrix.expert))
    return "layer " + ", ".join(numbers)


def _draw_spectrum(axes: Any, matrix: Matrix, values_N: mp.Values) -> None:
    fit = mp.fit_bulk(values_N, matrix.shape)
    edge, original = mp.marchenko_pastur(values_N, matrix.shape), mp.laserrmt(values_N, matrix.shape)
    limit = _draw_bulk(axes, matrix, values_N, fit, edge)
    axes.axvline(
        min(original.threshold, limit),
        color=_ORIGINAL,
        linestyle="--",
        label=f"laserrmt: rank {original.rank}",
    )
    axes.set_title(f"{matrix.address}  {matrix.shape[0]} x {matrix.shape[1]}", fontsize=7)
    axes.legend(fontsize=6)


def _draw_bulk(axes: Any, matrix: Matrix, values_N: mp.Values, fit: mp.BulkFit, edge: mp.Decision) -> float:
    """Draw the histogram of a spectrum, the law that was fitted, and the edge; return where the axis ends."""
    small, large = (side - fit.outliers for side in (min(matrix.shape), max(matrix.shape)))
    # The few largest values would flatten the picture: they are counted at its right border instead.
    limit = max(edge.threshold * 1.6, float(np.quantile(values_N, 0.98))) or 1.0
    bins = max(8, min(60, len(values_N) // 4))
    counts, edges = np.histogram(np.clip(values_N, None, limit), bins=bins, range=(0, limit))
    axes.stairs(counts, edges, fill=True, color=_BULK, label=f"{len(values_N)} values")
    highest = float(counts[:-1].max())
    unit = fit.sigma * large**0.5
    if unit > 0:
        x = np.linspace(0, limit, 600)
        law = small * limit / bins / unit * mp.density(x / unit, small / large)
        label = f"law, sigma {fit.sigma:.3g}, distance {fit.distance:.3f}"
        axes.plot(x, law, color=_LAW, linewidth=1, label=label)
        highest = max(highest, float(law.max()))
    axes.axvline(edge.threshold, color=_EDGE, linewidth=1, label=f"edge: rank {edge.rank}")
    axes.set_xlim(0, limit * 1.02)
    # Nor may the bar that counts them.
    axes.set_ylim(0, 1.1 * highest or 1.0)
    return limit
