"""From the recipe of a tensor to its values, and to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from aidocks.checkpoints.dtypes import from_torch
from aidocks.checkpoints.writer import SINGLE_FILE, ShardPlan, TensorPlan
from aidocks.errors import CorruptCheckpoint, IncompatibleModels
from aidocks.merge.recipe import Operand, Source, TensorMerge
from aidocks.merge.shard import MergeShard, OpenedSources, expected_memory, merge_tensor
from aidocks.plan import UnitContext


def models(directory: Path, *values: torch.Tensor) -> tuple[Source, ...]:
    """Save each value as the tensor `w` of a model of its own."""
    sources = []
    for number, value in enumerate(values):
        place = directory / f"model-{number}"
        place.mkdir(parents=True)
        (place / "config.json").write_text("{}")
        save_file({"w": value}, place / "model.safetensors")
        sources.append(Source(reference=f"org/model-{number}", checkpoint=place))
    return tuple(sources)


def recipe(value: torch.Tensor, count: int, method: str | None = "linear", **fields: Any) -> TensorMerge:
    given = {
        "name": "out",
        "dtype": from_torch(value.dtype),
        "shape": tuple(value.shape),
        "operands": tuple(Operand(source=number, tensor="w") for number in range(count)),
        "method": method,
        "values": {"weight": (1.0,) * count, "normalize": True} if method == "linear" else {},
    }
    return TensorMerge.model_validate(given | fields)


def merged(tensor: TensorMerge, sources: tuple[Source, ...], **how: Any) -> torch.Tensor:
    return torch.cat([block.clone() for block in merge_tensor(tensor, OpenedSources(sources), **how)])


def write(tensor: TensorMerge, sources: tuple[Source, ...], directory: Path) -> torch.Tensor:
    shard = ShardPlan(
        file_name=SINGLE_FILE,
        tensors=(TensorPlan(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape),),
    )
    unit = MergeShard(directory=directory, shard=shard, sources=sources, tensors=(tensor,))
    carried = MergeShard.model_validate_json(unit.model_dump_json())
    assert carried.unit_id == unit.unit_id
    (file,) = carried.run(UnitContext(directory)).files
    found: torch.Tensor = load_file(file.path)[tensor.name]
    return found


@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    stored=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    dtype=st.sampled_from(["F32", "BF16", "F16", "F64"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_any_shape_of_any_type_becomes_any_type(
    tmp_path_factory: pytest.TempPathFactory,
    shape: list[int],
    stored: torch.dtype,
    dtype: str,
    seed: int,
) -> None:
    directory = tmp_path_factory.mktemp("shard")
    generator = torch.Generator().manual_seed(seed)
    one, two = (torch.randn(shape, generator=generator).to(stored) for _ in range(2))
    tensor = recipe(one, 2, dtype=dtype)
    found = write(tensor, models(directory, one, two), directory / "out")
    assert from_torch(found.dtype) == dtype
    assert found.shape == one.shape
    # In float32 exact inputs, computed in float32, rounded once.
    expected = ((one.float() + two.float()) / 2).to(found.dtype)
    assert torch.allclose(found.double(), expected.double(), rtol=2**-7, atol=1e-6)


def test_computing_in_float64_is_closer(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(40, 30, generator=generator, dtype=torch.float64) for _ in range(3)]
    sources = models(tmp_path, *values)
    exact = sum(values) / 3
    tensor = recipe(values[0], 3)
    single, double = (
        float((merged(tensor, sources, compute_dtype=d) - exact).abs().max()) for d in ("float32", "float64")
    )
    assert double < 1e-15 < single < 1e-6


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_what_is_not_merged_is_copied_if_all_have_it(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.tensor([[1, 0], [0, 1], [1, 1]]).to(dtype)
    tensor = recipe(value, 2, None)
    sources = models(tmp_path, value, value)
    assert torch.equal(write(tensor, sources, tmp_path / "out"), value)
    other = value.clone()
    other[2, 0] = 0
    with pytest.raises(IncompatibleModels, match=r"w of org/model-1 differs from w of org/model-0") as caught:
        merged(tensor, models(tmp_path / "others", value, other))
    assert str(dtype).removeprefix("torch.") in str(caught.value)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_an_input_that_is_not_finite_is_named(tmp_path: Path, bad: float) -> None:
    fine, spoilt = torch.ones(9, 4), torch.ones(9, 4)
    spoilt[8, 3] = bad
    with pytest.raises(CorruptCheckpoint, match="not finite") as caught:
        merged(recipe(fine, 2), models(tmp_path, fine, spoilt))
    assert caught.value.value == "w of org/model-1"
    assert caught.value.hint


def test_a_result_that_its_type_cannot_hold(tmp_path: Path) -> None:
    large = torch.full((3, 4), 60_000.0)
    sources = models(tmp_path, large, large)
    values = {"weight": (1.0, 1.0), "normalize": False}
    assert merged(recipe(large, 2, values=values), sources).max() == 120_000
    with pytest.raises(IncompatibleModels, match="too large for float16") as caught:
        merged(recipe(large, 2, values=values, dtype="F16"), sources)
    assert (caught.value.field, caught.value.value) == ("out_dtype", "float16")
    assert "bfloat16" in str(caught.value.hint)
    # A sum that overflows is no value that does.
    wide = torch.full((40, 40), 3e38)
    assert torch.equal(merged(recipe(wide, 1), models(tmp_path / "wide", wide)), wide)


def test_a_model_that_changes_under_the_merge(tmp_path: Path) -> None:
    value = torch.ones(4, 4)
    sources = models(tmp_path, value, value)
    save_file({"v": value}, sources[1].checkpoint / "model.safetensors")
    with pytest.raises(CorruptCheckpoint, match=r"w of org/model-1 is not there any more"):
        merged(recipe(value, 2), sources)


def test_memory_grows_with_the_models_and_not_with_the_tensor() -> None:
    few, many = expected_memory(2), expected_memory(8)
    assert 0 < few < many < 2 * few + 10**9
