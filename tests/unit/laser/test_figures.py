from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from aidocks.laser.figures import draw_before_after, draw_candidates, draw_predictions
from aidocks.laser.ledger import LedgerLine, written_value, written_z
from aidocks.laser.ledger import with_error as written
from aidocks.laser.matrices import Matrix
from aidocks.laser.scan_figures import draw_kind
from aidocks.specs.laser_result import PartScore

PNG = b"\x89PNG"


def line(layer: int = 0, **fields: Any) -> LedgerLine:
    known: dict[str, Any] = {
        "address": f"model.layers.{layer}.self_attn.v_proj.weight",
        "layer": layer,
        "kind": "v_proj",
        "rank": 12,
        "full_rank": 64,
        "truncation": "activation_aware",
        "rule": "laserrmt",
        "decision": "not significant",
    }
    return LedgerLine(**(known | fields))


def measured(layer: int, delta: float | None, error: float | None = 0.01, **fields: Any) -> LedgerLine:
    z = delta / error if delta is not None and error else None
    return line(layer, items=32, delta=delta, standard_error=error, z=z, **fields)


def score(**fields: Any) -> PartScore:
    known: dict[str, Any] = {
        "metric": "perplexity",
        "data": "prose",
        "part": "report",
        "before": 39.89,
        "before_standard_error": 1.234,
        "after": 39.72,
        "after_standard_error": 1.2,
        "delta": -0.0041,
        "delta_standard_error": 0.0013,
        "z": -3.15,
        "items": 64,
        "tokens": 8128,
    }
    return PartScore(**(known | fields))


def test_pictures_of_a_usual_ledger_are_the_same_bytes_each_time() -> None:
    lines = [
        measured(0, -0.05, accepted=True, predicted_with_fisher=-0.03, predicted_standard_error=0.01),
        measured(1, -0.04, predicted_with_fisher=0.002, predicted_standard_error=0.004),
        measured(2, 4.0, 0.5, predicted_with_fisher=0.9),
        measured(3, None, None),
        line(4, predicted_with_fisher=0.5),
    ]
    scores = [
        score(part=part, metric=metric)
        for metric in ("perplexity", "accuracy")
        for part in ("search", "report")
    ]
    drawings = [
        lambda: draw_candidates(lines, 3.0, "perplexity"),
        lambda: draw_predictions(lines, "perplexity"),
        lambda: draw_before_after(scores),
    ]
    for draw in drawings:
        first = draw()
        assert first is not None
        assert first.startswith(PNG)
        assert draw() == first


def test_pictures_of_hardly_anything() -> None:
    assert draw_candidates([], 3.0, "accuracy").startswith(PNG)
    assert draw_candidates([line(), measured(1, None, None)], 3.0, "accuracy").startswith(PNG)
    assert draw_candidates([measured(0, 0.0, 0.0)], 3.0, "accuracy").startswith(PNG)
    assert draw_predictions([line(predicted_with_fisher=0.1), measured(1, 0.2)], "accuracy") is None
    zero = draw_predictions([measured(0, 0.0, 0.0, predicted_with_fisher=0.0)], "accuracy")
    assert zero is not None
    assert draw_before_after([]) is None
    unknown = score(
        before=None, before_standard_error=None, after=None, after_standard_error=None, delta=None, z=None
    )
    assert draw_before_after([unknown]) is not None


def test_of_many_candidates_the_best_are_drawn() -> None:
    def height(image: bytes) -> int:
        return int.from_bytes(image[20:24], "big")

    many = [measured(number, 0.001 * number) for number in range(300)]
    assert height(draw_candidates(many, 3.0, "perplexity")) == height(
        draw_candidates(many[:60], 3.0, "perplexity")
    )


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (-0.0041, 0.00134, "−0.0041 ± 0.0013"),
        (39.89, 1.234, "39.9 ± 1.2"),
        (12345.6, 234.5, "12346 ± 234"),
        (0.5, 0.0, "0.5"),
        (-2.0, None, "−2"),
        (None, None, "not finite"),
    ],
)
def test_numbers_have_the_digits_that_their_error_bears(
    value: float | None, error: float | None, text: str
) -> None:
    assert written(value, error) == text


def test_values_are_written_in_the_metrics_own_unit() -> None:
    assert written_value(score(), 39.89, 1.234) == "39.9 ± 1.2"
    assert written_value(score(metric="accuracy"), 0.579, 0.0123) == "57.9% ± 1.2%"
    assert written_value(score(metric="preference"), None, None) == "not finite"
    assert (written_z(-3.154), written_z(0.5), written_z(None)) == ("−3.15", "0.50", "")


@pytest.mark.parametrize("count", [1, 9])
def test_spectra_of_one_kind(count: int) -> None:
    spectra = [
        (
            Matrix(name=f"layers.{layer}.up.weight", layer=layer, kind="up", shape=(12, 40), dtype="F32"),
            np.sort(np.random.default_rng(layer).uniform(0, 9, 12))[::-1] * (layer != 2),  # one is zero
        )
        for layer in range(count)
    ]
    drawn = draw_kind("up", iter(spectra), count)
    assert drawn.startswith(PNG)
    assert draw_kind("up", spectra, count) == drawn
