"""Pictures of all sizes: nothing is cut off, nothing overlaps, and odd names and numbers do no harm."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from aidocks.evaluate import figures as comparing
from aidocks.moe import figures
from aidocks.moe.report import TrainingPoint
from aidocks.specs.perplexities import DomainPerplexity, ModelPerplexity

SIZES = [(1, 2, 2), (3, 5, 3), (4, 30, 3), (9, 32, 8), (9, 80, 8), (20, 12, 64)]


def domains(count: int) -> list[str]:
    return [*(f"experts[{number}]" for number in range(count - 1)), "text"]


def names(count: int) -> list[str]:
    odd = ["$x_1$", "a" * 90, "org/name", "smörgås_bord"]
    return (odd + [f"expert-{number}" for number in range(count)])[:count]


def shares(*shape: int) -> Any:
    return np.random.default_rng(0).dirichlet(np.ones(shape[-1]) * 0.5, size=shape[:-1])


def models(experts: int, texts: int) -> list[ModelPerplexity]:
    scale = np.random.default_rng(1).uniform(5, 900, size=texts)
    subjects = ["base", *(f"experts[{number}]" for number in range(experts)), "average", "moe"]
    return [
        ModelPerplexity(
            model=model,
            reference=model,
            domains=tuple(
                DomainPerplexity(
                    domain=domain,
                    # One that is not finite, and one that is beyond all others.
                    perplexity=None
                    if (row, column) == (1, 0)
                    else scale[column] * (1e6 if row == 2 else 1 + row / 9),
                    standard_error=None if (row, column) == (1, 0) else scale[column] / 30,
                    tokens=100,
                )
                for column, domain in enumerate(domains(texts))
            ),
        )
        for row, model in enumerate(subjects)
    ]


def require_sound(png: bytes, figure: Figure) -> None:
    """Require that the picture has a reasonable size, that nothing is cut off, and that titles do not overlap."""
    image = Image.open(BytesIO(png))
    assert image.format == "PNG"
    assert 300 < image.width < 3000
    assert 200 < image.height < 3000
    pixels = np.asarray(image.convert("L"))
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (border == 255).all(), "something reaches the picture's border"
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    titles = [axes.title for axes in figure.axes if axes.title.get_text()]
    if figure._suptitle is not None:  # type: ignore[attr-defined]
        titles.append(figure._suptitle)  # type: ignore[attr-defined]
    extents = [title.get_window_extent(renderer) for title in titles]
    for number, box in enumerate(extents):
        assert not any(box.overlaps(other) for other in extents[:number]), "titles overlap"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were made, to be looked into."""
    made: list[Figure] = []

    class Kept(Figure):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            made.append(self)

    monkeypatch.setattr(figures, "Figure", Kept)
    monkeypatch.setattr(comparing, "Figure", Kept)
    return made


@pytest.mark.parametrize(("texts", "layers", "experts"), SIZES)
def test_routing_and_balance(texts: int, layers: int, experts: int, drawn: list[Figure]) -> None:
    weight_DLE = shares(texts, layers, experts)
    require_sound(figures.draw_routing(weight_DLE, domains(texts), names(experts)), drawn[-1])
    assert drawn[-1].axes[0].get_title() in ("expert 0's text", "common text")
    panels = [axes for axes in drawn[-1].axes if axes.get_title()]
    assert len(panels) == min(texts, 12)
    assert {axes.images[0].get_clim() for axes in panels} == {(0.0, weight_DLE[:12].max())}
    aux = np.linspace(2, 2.4, layers).tolist()
    require_sound(figures.draw_balance(weight_DLE.mean(0), aux, 2, names(experts)), drawn[-1])


@pytest.mark.parametrize(("texts", "experts"), [(1, 2), (2, 2), (4, 3), (9, 8), (16, 40)])
def test_perplexities(texts: int, experts: int, drawn: list[Figure]) -> None:
    compared = models(experts, texts)
    titles = [model.model for model in compared]
    require_sound(comparing.draw_perplexities(compared, titles, domains(texts)), drawn[-1])
    panels = [axes for axes in drawn[-1].axes if axes.get_title()]
    assert len(panels) == min(texts, 12)
    assert all(axes.get_xscale() == "log" for axes in panels)
    assert all(axes.get_xticks().size for axes in panels)


@pytest.mark.parametrize("condition", [(), (None, None), (1.5, None, 80.0)])
@pytest.mark.parametrize("experts", [2, 8, 40])
def test_gates(condition: tuple[float | None, ...], experts: int, drawn: list[Figure]) -> None:
    require_sound(figures.draw_gates(np.eye(experts), condition, names(experts)), drawn[-1])
    titles = [axes.get_title() for axes in drawn[-1].axes if axes.get_title()]
    assert len(titles) == 1 + bool(condition)


@pytest.mark.parametrize("texts", [1, 4, 9, 40])
@pytest.mark.parametrize("steps", [1, 21])
def test_training(texts: int, steps: int, drawn: list[Figure]) -> None:
    points = [
        TrainingPoint(step=step, losses=dict.fromkeys(domains(texts), 2 + 1 / (1 + step)), aux_loss=2.0)
        for step in range(steps)
    ]
    require_sound(figures.draw_training(points), drawn[-1])


def test_the_same_numbers_give_the_same_bytes() -> None:
    weight_DLE = shares(2, 4, 3)
    first, second = (figures.draw_routing(weight_DLE, domains(2), names(3)) for _ in range(2))
    assert first == second
