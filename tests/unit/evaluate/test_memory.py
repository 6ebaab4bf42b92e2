"""What a unit that loads a model says of the memory that it needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from aidocks.evaluate.memory import memory_to_load
from aidocks.evaluate.perplexity import MeasurePerplexity

GIB = 1 << 30


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A directory whose weight files claim 3 GiB: they have holes."""
    model = tmp_path / "large"
    model.mkdir()
    for number, size in enumerate((2 * GIB, GIB)):
        with (model / f"model-{number}.safetensors").open("wb") as file:
            file.truncate(size)
    (model / "tokenizer.json").write_text("{}")
    return model


def test_it_is_twice_the_weights_and_what_is_beside_them(large: Path, tmp_path: Path) -> None:
    assert memory_to_load(large) == 7 * GIB
    small = tmp_path / "small"
    small.mkdir()
    (small / "model.safetensors").write_bytes(b"x")
    assert memory_to_load(small) is None
    assert memory_to_load(tmp_path / "absent") is None
    assert memory_to_load(small, large) == 7 * GIB, "an average is as large as the largest"


def test_it_is_no_part_of_what_a_unit_is(large: Path) -> None:
    unit = MeasurePerplexity(model=large)
    before = unit.unit_id
    assert unit.memory == 7 * GIB
    (large / "model-0.safetensors").unlink()
    assert unit.memory == 3 * GIB
    assert unit.unit_id == before
    assert "memory" not in unit.model_dump()
