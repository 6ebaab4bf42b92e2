"""From a figure to a picture, without a display and without global state."""

from __future__ import annotations

from io import BytesIO

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def png(figure: Figure) -> bytes:
    """Return a figure as PNG: the same bytes for the same figure."""
    FigureCanvasAgg(figure)
    image = BytesIO()
    figure.savefig(image, format="png", dpi=130, metadata={"Software": None})
    return image.getvalue()
