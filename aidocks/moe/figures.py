"""The pictures of an MoE's report, drawn without a display and without global state."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from aidocks.moe.gating import WORST_CONDITION

_LONGEST_NAME = 28
_SHARE, _COSINE = "YlGnBu", "RdBu_r"


def draw_routing(weight_LE: NDArray[np.float64], names: Sequence[str]) -> bytes:
    """Draw the share of each layer's mixture that each expert supplied. Returns PNG."""
    layers, experts = weight_LE.shape
    figure = Figure(
        figsize=(max(4.2, 1.6 + 0.9 * experts), max(2.6, 1.4 + 0.2 * layers)), layout="constrained"
    )
    axes = figure.add_subplot()
    image = axes.imshow(weight_LE, aspect="auto", cmap=_SHARE, vmin=0, vmax=float(weight_LE.max()))
    axes.set_xticks(range(experts), [_short(name) for name in names], rotation=20, ha="right", fontsize=7)
    axes.set_yticks(range(0, layers, max(1, layers // 15)))
    axes.set_ylabel("layer")
    axes.set_title(f"Share of the mixture by expert (even: {1 / experts:.2f})", fontsize=9)
    if layers * experts <= 400:
        for (layer, expert), share in np.ndenumerate(weight_LE):
            dark = share > 0.6 * weight_LE.max()
            axes.text(
                expert,
                layer,
                f"{share:.2f}",
                ha="center",
                va="center",
                fontsize=6,
                color="w" if dark else "k",
            )
    figure.colorbar(image, ax=axes)
    return _png(figure)


def draw_gates(
    cosines_LEE: NDArray[np.float64], condition: Sequence[float | None], names: Sequence[str]
) -> bytes:
    """Draw how parallel the router rows are: mean cosine of every pair, and each layer's condition number.

    Args:
        cosines_LEE: Cosines between rows, by layer.
        condition: Condition numbers; None where rows are linearly dependent.
        names: Of the experts.
    """
    experts = len(names)
    figure = Figure(figsize=(8.4, max(3.0, 1.6 + 0.3 * experts)), layout="constrained")
    left, right = figure.subplots(1, 2)
    mean_EE = cosines_LEE.mean(0)
    image = left.imshow(mean_EE, cmap=_COSINE, vmin=-1, vmax=1)
    left.set_xticks(range(experts), range(experts), fontsize=7)
    left.set_yticks(range(experts), [f"{i}  {_short(name)}" for i, name in enumerate(names)], fontsize=7)
    left.set_title("Cosine of router rows, mean over layers", fontsize=9)
    if experts <= 12:
        for (i, j), cosine in np.ndenumerate(mean_EE):
            color = "w" if abs(cosine) > 0.6 else "k"
            left.text(j, i, f"{cosine:.2f}", ha="center", va="center", fontsize=6, color=color)
    figure.colorbar(image, ax=left)
    known = [(layer, number) for layer, number in enumerate(condition) if number is not None]
    right.plot([layer for layer, _ in known], [number for _, number in known], marker="o", markersize=3)
    for layer in (layer for layer, number in enumerate(condition) if number is None):
        right.axvline(layer, color="#c0392b", linewidth=0.8)
    right.axhline(WORST_CONDITION, color="#8a97a3", linestyle="--", linewidth=0.8)
    right.set_ylim(bottom=0)
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.set_xlabel("layer (red: rows are dependent)", fontsize=8)
    right.set_title("Condition number of the rows (1 is best)", fontsize=9)
    return _png(figure)


def _short(reference: str) -> str:
    name = reference.rstrip("/").rpartition("/")[2]
    return name if len(name) <= _LONGEST_NAME else f"…{name[-_LONGEST_NAME:]}"


def _png(figure: Any) -> bytes:
    FigureCanvasAgg(figure)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()
