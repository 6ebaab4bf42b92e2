"""Blocks, threads and positions: the same bits however a tensor is walked through."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aidocks.errors import CorruptCheckpoint, InvalidSpec
from aidocks.merge import order
from aidocks.merge.in_memory import merge_tensors
from aidocks.merge.inputs import Block, Inputs, Merged, finite_blocks
from aidocks.merge.method import Method, find_method, known_methods
from aidocks.merge.random import random_words
from aidocks.merge.rows import MemoryRows

few = settings(max_examples=25, deadline=None)
#: Values that make every method do something.
SOME: Mapping[str, Any] = {
    "weight": 0.7,
    "t": 0.1,
    "density": 0.5,
    "epsilon": 0.1,
    "gamma": 0.1,
    "select_topk": 0.4,
    "scale": 0.5,
}


def tensors(count: int, *shape: int, seed: int = 0, steps: float = 0) -> tuple[MemoryRows, ...]:
    """Return a base and models near it. ``steps``: rounded to multiples of that, so that many values are equal."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    made = [base] + [base + 0.3 * torch.randn(shape, generator=generator) for _ in range(count - 1)]
    return tuple(
        MemoryRows(str(number), (each / steps).round() * steps if steps else each)
        for number, each in enumerate(made)
    )


def apply(method: Method, inputs: Inputs) -> torch.Tensor:
    values = {}
    for each in method.parameters:
        value = SOME.get(each.name, each.default)
        many = {"tensor": 0, "model": inputs.num_models, "input": len(inputs.rows)}[each.scope]
        values[each.name] = (value,) * many if each.scope != "tensor" else value
    return torch.cat(list(method.apply(inputs, values))).reshape(inputs.shape)


def inputs_of(method: Method, *, steps: float = 0, **settings: Any) -> Inputs:
    count = max(method.models[0], min(method.models[1] or 2, 2)) + (method.base == "required")
    return Inputs(
        "w", tensors(count, 37, 24, steps=steps), 0 if method.base == "required" else None, **settings
    )


@pytest.mark.parametrize("name", sorted(known_methods()))
def test_threads_do_not_change_a_bit(name: str) -> None:
    method = known_methods()[name]
    alone = apply(method, inputs_of(method, block_values=50))
    for threads in (2, 3):
        assert torch.equal(alone, apply(method, inputs_of(method, block_values=50, threads=threads)))
    torch.set_num_threads(2)
    try:
        assert torch.equal(alone, apply(method, inputs_of(method, block_values=50)))
        assert torch.get_num_threads() == 2, "what the process may use stays as it was"
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("name", sorted(known_methods()))
@pytest.mark.parametrize("steps", [0, 0.125])
def test_blocks_change_sums_by_rounding_only(name: str, steps: float) -> None:
    method = known_methods()[name]
    whole = apply(method, inputs_of(method, steps=steps))
    for block_values in (1, 100, 24 * 8):
        other = apply(method, inputs_of(method, steps=steps, block_values=block_values))
        torch.testing.assert_close(other, whole, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "name", ["ties", "breadcrumbs", "breadcrumbs_ties", "sce", "arcee_fusion", "nearswap"]
)
@few
@given(st.integers(1, 300), st.integers(0, 10**6), st.sampled_from([0, 0.25, 1.0]))
def test_what_is_selected_does_not_depend_on_blocks(
    name: str, block_values: int, seed: int, steps: float
) -> None:
    method = find_method(name)
    rows = tensors(3 if method.models[1] is None else 2, 23, 12, seed=seed, steps=steps)
    whole = apply(method, Inputs("w", rows, 0))
    in_blocks = apply(method, Inputs("w", rows, 0, block_values=block_values))
    if name == "sce":  # its weights are sums
        assert torch.equal(whole == rows[0].tensor, in_blocks == rows[0].tensor)
    else:
        assert torch.equal(whole, in_blocks)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("steps", [0, 0.5])
@few
@given(st.data())
def test_order_is_a_stable_sorts(dtype: str, steps: float, data: st.DataObject) -> None:
    (rows,) = tensors(1, 19, 7, seed=data.draw(st.integers(0, 10**6)), steps=steps)
    inputs = Inputs("w", (rows,), dtype=dtype, block_values=data.draw(st.integers(1, 200)))
    count = data.draw(st.integers(1, inputs.num_values))
    ((cut,),) = order.first(inputs, lambda block: [order.ascending(block.values[0])], [[count]])
    parts = inputs.collect(lambda block: cut.first(order.ascending(block.values[0]), block.number))
    ranked = rows.tensor.flatten().sort(stable=True)
    assert (
        torch.cat(parts).flatten().nonzero().flatten().tolist()
        == ranked.indices[:count].sort().values.tolist()
    )
    assert order.value_of(cut.key, dtype) == float(ranked.values[count - 1])


@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 5))
@few
def test_random_words_depend_on_the_place_alone(height: int, width: int, begin: int) -> None:
    inputs = Inputs("w", tensors(1, 45, width), seed=7)
    whole = random_words(inputs, Block(0, 0, (torch.empty(45, width),), None), 1)
    part = random_words(inputs, Block(3, begin, (torch.empty(height, width),), None), 1)
    assert torch.equal(part, whole[begin : begin + height][: 45 - begin]) or height > 45 - begin


def test_random_words_differ_by_seed_name_and_model() -> None:
    block = Block(0, 0, (torch.empty(4, 8),), None)
    rows = tensors(1, 4, 8)
    words = [
        random_words(Inputs(name, rows, seed=seed), block, model)
        for name, seed, model in [("a", 0, 0), ("a", 0, 1), ("a", 1, 0), ("b", 0, 0)]
    ]
    assert all((one != other).all() for n, one in enumerate(words) for other in words[:n])


def test_random_words_are_these() -> None:
    """They must stay what they are: a merge made again with the same seed is the same."""
    words = random_words(Inputs("w", tensors(1, 1, 4), seed=7), Block(0, 0, (torch.empty(1, 4),), None), 1)
    assert words.tolist() == [[-747047743, -33237318, 1489207593, 779544436]]


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_the_seed_decides(name: str) -> None:
    base, model = (rows.tensor for rows in tensors(2, 30, 20))
    values = {"weight": 1, "density": 0.5} | ({"epsilon": 0.2} if "della" in name else {})
    first = merge_tensors(name, [base, model], 0, values, seed=1)
    assert torch.equal(first, merge_tensors(name, [base, model], 0, values, seed=1))
    assert not torch.equal(first, merge_tensors(name, [base, model], 0, values, seed=2))


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_random_methods_keep_their_share_and_the_l1_norm(name: str) -> None:
    base, model = torch.zeros(400, 100), torch.randn(400, 100, generator=torch.Generator().manual_seed(3))
    values = {"weight": 1, "density": 0.3} | ({"epsilon": 0.1} if "della" in name else {})
    kept = merge_tensors(name, [base, model], 0, values)
    assert int(kept.count_nonzero()) / kept.numel() == pytest.approx(0.3, abs=0.01)
    assert float(kept.abs().sum()) == pytest.approx(float(model.abs().sum()), rel=1e-6)
    unscaled = merge_tensors(name, [base, model], 0, values | {"rescale": False})
    assert torch.equal(unscaled[unscaled != 0], model[unscaled != 0])


def test_della_keeps_large_values_more_often() -> None:
    model = torch.rand(4000, 50, generator=torch.Generator().manual_seed(3)) + 0.1
    values = {"weight": 1, "density": 0.3, "epsilon": 0.1, "rescale": False}
    kept = merge_tensors("della_linear", [torch.zeros_like(model), model], 0, values) != 0
    by_rank = kept.gather(1, model.argsort(dim=1)).float().mean(dim=0)
    expected = torch.linspace(0.2, 0.4, 50)
    assert (by_rank - expected).abs().max() < 0.04
    assert (by_rank - expected).abs().mean() < 0.01


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.15), (0.9, 0.1), (0.5, 0.5)])
def test_della_refuses_probabilities_outside_of_0_and_1(density: float, epsilon: float) -> None:
    base, model = (rows.tensor for rows in tensors(2, 3, 4))
    with pytest.raises(InvalidSpec, match="epsilon") as error:
        merge_tensors("della", [base, model], 0, {"weight": 1, "density": density, "epsilon": epsilon})
    assert error.value.field == "parameters.epsilon"


@pytest.mark.parametrize("threads", [1, 2])
def test_a_value_that_is_not_finite_is_named_and_walking_ends(threads: int) -> None:
    rows = tensors(2, 30, 4)
    rows[1].tensor[17, 2] = torch.inf
    inputs = Inputs("w", rows, 0, threads=threads, block_values=8)
    with pytest.raises(CorruptCheckpoint, match="1 contains values that are not finite"):
        inputs.gram()
    with pytest.raises(CorruptCheckpoint, match="not finite"):
        list(inputs.combine([1, 1]))


def test_methods_may_overwrite_their_blocks() -> None:
    rows = tensors(2, 9, 4)
    before = [each.tensor.clone() for each in rows]

    def spoil(block: Block) -> torch.Tensor:
        return block.values[0].zero_()

    merged: Merged = Inputs("w", rows, 0).map(spoil)
    assert not torch.cat(list(merged)).any()
    assert all(torch.equal(each.tensor, old) for each, old in zip(rows, before, strict=True))


class Counted:
    """Random rows; each reading counts what is held in float64 meanwhile."""

    label = "x"

    def __init__(self, *shape: int) -> None:
        self.shape = shape
        self.most = 0

    def read(self, begin: int, end: int) -> torch.Tensor:
        held = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.dtype == torch.float64]
        self.most = max(self.most, sum(tensor.numel() for tensor in held))
        return torch.full((end - begin, self.shape[-1]), 0.5)


@pytest.fixture
def few_objects() -> Iterator[None]:
    """What other tests have left is not looked at again and again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("few_objects")
@pytest.mark.parametrize("shape", [(800, 64), (100, 8, 64)])
def test_vectors_along_the_first_axis_are_added_up_and_not_kept(shape: tuple[int, ...]) -> None:
    rows = Counted(*shape), Counted(*shape)
    inputs = Inputs("x", rows, block_values=512)
    settings = {"weight": (1.0, 1.0), "nuslerp_flatten": False, "nuslerp_row_wise": True}
    for _ in find_method("nuslerp").apply(inputs, settings):
        pass
    vectors = 800 * 64 // shape[0]
    assert rows[1].most <= 16 * (vectors + 512)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_blocks_are_looked_at(dtype: torch.dtype) -> None:
    values = torch.randn(700, 600).mul(6e4).clamp(-6e4, 6e4).to(dtype)  # whose sum float16 does not hold
    rows = MemoryRows("w of a", values)
    assert torch.equal(torch.cat([block.clone() for block in finite_blocks(rows)]), values)
    values[699, 3] = torch.inf
    with pytest.raises(CorruptCheckpoint, match="w of a contains values that are not finite"):
        list(finite_blocks(rows))
