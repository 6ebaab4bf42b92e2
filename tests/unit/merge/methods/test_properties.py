"""What is known of merge methods beforehand: ends, symmetries, norms, counts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aidocks.errors import CorruptCheckpoint, IncompatibleModels, InvalidSpec
from aidocks.merge.in_memory import merge_tensors
from aidocks.merge.method import known_methods
from aidocks.merge.random import stage_seed

few = settings(max_examples=20, deadline=None)


def random(*shape: int, seed: int = 0, count: int = 2, noise: float = 0.1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    return [base] + [base + noise * torch.randn(shape, generator=generator) for _ in range(count - 1)]


def merge(method: str, *tensors: Any, base: int | None = None, **parameters: Any) -> list[Any]:
    made = [torch.tensor(each, dtype=torch.float64) for each in tensors]
    result: list[Any] = merge_tensors(
        method, made, base, {name.rstrip("_"): value for name, value in parameters.items()}
    ).tolist()
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("noise", [1e-4, 0.1, 10])
def test_slerp_ends_are_the_models_bit_for_bit(dtype: torch.dtype, noise: float) -> None:
    a, b = (each.to(dtype) for each in random(33, 65, noise=noise))
    assert torch.equal(merge_tensors("slerp", [a, b], 0, {"t": 0}), a)
    assert torch.equal(merge_tensors("slerp", [a, b], 0, {"t": 1}), b)
    assert torch.equal(merge_tensors("slerp", [a, b], 1, {"t": 0}), b)


@few
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_slerp_keeps_the_norm_of_equal_norms(seed: int, t: float) -> None:
    a, b = (each.double() / each.norm() for each in random(20, 30, seed=seed, noise=2))
    assert merge_tensors("slerp", [a, b], 0, {"t": t}).norm() == pytest.approx(float(a.norm()), rel=1e-6)


def test_slerp_of_known_vectors() -> None:
    half = math.sqrt(0.5)
    assert merge("slerp", [1, 0], [0, 1], base=0, t=0.5) == pytest.approx([half, half])
    assert merge("slerp", [1, 0], [3, 0], base=0, t=0.5) == [2, 0]
    assert merge("slerp", [1, 0], [-1, 0], base=0, t=0.25) == [0.5, 0]


def test_nuslerp_of_known_rows() -> None:
    a = [[1, 0], [1, 0], [1, 0], [1, 0]]
    b = [[1, 0], [2, 0], [-1, 0], [0, 1]]
    got = merge("nuslerp", a, b, weight=[3, 1], nuslerp_flatten=False)
    assert got[0] == [1, 0]
    assert got[1] == [1.25, 0]
    assert got[2] == [0.5, 0]
    assert got[3] == pytest.approx([math.cos(math.pi / 8), math.sin(math.pi / 8)])


def test_nuslerp_takes_the_middle_where_the_weights_cancel() -> None:
    assert merge("nuslerp", [1, 0], [0, 1], weight=[1, -1]) == pytest.approx([math.sqrt(0.5)] * 2)


def test_nuslerp_and_multislerp_and_karcher_agree_with_slerp_on_two_unit_vectors() -> None:
    a, b = (each / each.norm() for each in random(50, noise=2))
    expected = merge_tensors("slerp", [a, b], 0, {"t": 0.5})
    for other in (
        merge_tensors("nuslerp", [a, b], None, {"weight": 1}),
        merge_tensors("multislerp", [a, b], None, {"weight": 1}),
        merge_tensors("karcher", [a, b]),
    ):
        torch.testing.assert_close(other, expected, atol=1e-6, rtol=1e-6)


def test_karcher_of_known_vectors() -> None:
    assert merge("karcher", [1, 0], [2, 0]) == pytest.approx([1.5, 0])
    assert merge("karcher", [1e-9, 0], [0, 1e-9]) == [0, 0]
    x = random(40)[0]
    torch.testing.assert_close(merge_tensors("karcher", [x, x, x]), x, atol=2e-7, rtol=2e-7)


def test_multislerp_refuses_directions_that_cancel() -> None:
    angles = [0, 2 * math.pi / 3, 4 * math.pi / 3]
    vectors = [[math.cos(angle), math.sin(angle)] for angle in angles]
    with pytest.raises(InvalidSpec, match="add up to 0") as error:
        merge("multislerp", *vectors, weight=1)
    assert error.value.field == "parameters.weight"
    with pytest.raises(InvalidSpec, match="weights"):
        merge("multislerp", *vectors, weight=[1, -1, 0])
    assert merge("multislerp", [1, 0], [-1, 0], weight=1) == [0, 0]


def test_task_arithmetic_of_known_vectors() -> None:
    models = [[1, -2, 3, 0.5], [-1.5, -1, 1, 0.5]]
    assert merge("task_arithmetic", [0] * 4, *models, base=0, weight=0.5) == [-0.25, -1.5, 2, 0.5]
    assert merge("task_arithmetic", [0] * 4, *models, base=0, weight=0.5, lambda_=2) == [-0.5, -3, 4, 1]


def test_ties_of_known_vectors() -> None:
    models = [[1, -2, 3, 0.5], [-1.5, -1, 1, 0.5]]
    assert merge("ties", [0] * 4, *models, base=0, weight=1) == [-1.5, -1.5, 2, 0.5]
    assert merge("ties", [0] * 4, *models, base=0, weight=1, density=0.5) == [-1.5, -1.5, 3, 0]
    assert merge("ties", [0], [2], [-2], base=0, weight=1) == [2], "equal sums of both signs count as +"
    assert merge("ties", [1, 1, 1], [2, 3, 4], base=0, weight=1, density=0.01) == [1, 1, 4], (
        "at least one is kept"
    )
    assert merge("ties", [1, 1, 1], [2, 3, 4], base=0, weight=1, density=0) == [1, 1, 1]


def test_ties_keeps_the_first_of_equal_magnitudes() -> None:
    assert merge("ties", [0] * 6, [1, -1, 1, 1, -1, 1], base=0, weight=1, density=0.5) == [1, -1, 1, 0, 0, 0]


@few
@given(st.floats(0, 0.99), st.floats(0, 0.9))
def test_breadcrumbs_keep_their_number(density: float, gamma: float) -> None:
    base, model = torch.zeros(100), torch.arange(1.0, 101)
    got = merge_tensors("breadcrumbs", [base, model], 0, {"weight": 1, "density": density, "gamma": gamma})
    assert int(got.count_nonzero()) == int(density * 100)


def test_breadcrumbs_keep_the_middle() -> None:
    got = merge_tensors(
        "breadcrumbs",
        [torch.zeros(100), torch.arange(1.0, 101)],
        0,
        {"weight": 1, "density": 0.9, "gamma": 0.05},
    )
    assert got.nonzero().flatten().tolist() == list(range(5, 95))


def test_model_stock_of_two_models() -> None:
    cos = 0.3
    got = merge("model_stock", [0, 0], [1, 0], [cos, math.sqrt(1 - cos**2)], base=0)
    t = 2 * cos / (1 + cos)
    assert got == pytest.approx([t * (1 + cos) / 2, t * math.sqrt(1 - cos**2) / 2])
    assert merge("model_stock", [5, 5], [6, 5], [4, 5], base=0) == [5, 5], "opposite changes say nothing"


def test_others_of_known_vectors() -> None:
    assert merge("ram", [0] * 4, [1, 0, 2, 0], [0, 1, 4, 0], base=0) == [1, 1, 3, 0]
    assert merge("nearswap", [1, 1], [1.0001, 2], base=0, t=0.001) == pytest.approx([1.0001, 1.001])
    assert merge("sce", [0, 1], [1, 2], [1, 2], base=0) == [1, 2]
    assert merge("linear", [1, 2], [3, 6], weight=[1, 3]) == [2.5, 5]


@pytest.mark.parametrize("name", sorted(known_methods()))
def test_what_all_models_agree_on_stays(name: str) -> None:
    """Of models that are the base itself the result is the base; of the arcs, but for rounding."""
    method, x = known_methods()[name], random(9, 14)[0]
    count = method.models[0] + (method.base == "required")
    base = 0 if method.base == "required" else None
    needed = {each.name: 1.0 for each in method.parameters if each.default is None}
    torch.testing.assert_close(merge_tensors(method, [x] * count, base, needed), x, atol=3e-7, rtol=3e-7)


@pytest.mark.parametrize("name", sorted(known_methods()))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_type_is_computed_wider_and_kept(name: str, dtype: torch.dtype) -> None:
    method = known_methods()[name]
    count = method.models[0] + (method.base == "required")
    tensors = [each.to(dtype) for each in random(8, 16, count=max(count, 1))]
    needed = {each.name: 0.7 for each in method.parameters if each.default is None}
    base = 0 if method.base == "required" else None
    got = merge_tensors(method, tensors, base, needed, seed=1)
    assert got.dtype == dtype
    exact = merge_tensors(method, [each.float() for each in tensors], base, needed, seed=1)
    if dtype != torch.float64:
        assert torch.equal(got, exact.to(dtype))


def test_what_does_not_fit_is_refused() -> None:
    a, b = random(3, 4)
    with pytest.raises(IncompatibleModels, match=r"\[3, 4\]"):
        merge_tensors("linear", [a, b.T], None, {"weight": 1})
    with pytest.raises(IncompatibleModels, match="floating point"):
        merge_tensors("linear", [a, b.long()], None, {"weight": 1})
    with pytest.raises(CorruptCheckpoint, match=r"tensors\[1\]"):
        merge_tensors("linear", [a, b / 0], None, {"weight": 1})
    with pytest.raises(InvalidSpec, match="needs a base"):
        merge_tensors("slerp", [a, b], None, {"t": 0.5})
    with pytest.raises(InvalidSpec, match="1 model"):
        merge_tensors("slerp", [a, b, b], 0, {"t": 0.5})


@pytest.mark.parametrize(
    ("parameters", "field", "says"),
    [
        ({}, "parameters.weight", "needs the parameter"),
        ({"weight": 1, "densty": 1}, "parameters.densty", "Did you mean 'density'"),
        ({"weight": [1, 2]}, "parameters.weight", "2 values for 1"),
        ({"weight": True}, "parameters.weight[0]", "a number"),
        ({"weight": math.nan}, "parameters.weight[0]", "a number"),
        ({"weight": 1, "density": 1.5}, "parameters.density[0]", "from 0 to 1"),
        ({"weight": 1, "normalize": 2}, "parameters.normalize", "true or false"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(parameters: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(InvalidSpec, match=says) as error:
        merge_tensors("ties", random(3), 0, parameters)
    assert error.value.field == field


def test_parameters_are_read_as_a_request_s_are() -> None:
    x = random(5, 7)
    said = merge_tensors("ties", x, 0, {"weight": "5e-1", "normalize": "no"})
    assert torch.equal(said, merge_tensors("ties", x, 0, {"weight": 0.5, "normalize": False}))


def test_the_function_is_there_for_users() -> None:
    import aidocks.merge

    assert aidocks.merge.merge_tensors is merge_tensors
    with pytest.raises(AttributeError, match="no attribute 'merge_tensor'"):
        _ = aidocks.merge.merge_tensor  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_stages_of_a_merge_draw_numbers_of_their_own(method: str) -> None:
    base, model = torch.zeros(200, 200), torch.ones(200, 200)
    settings = {"weight": 1, "density": 0.5, "rescale": False}
    seeds = [stage_seed(7, name) for name in ("first", "second", "")]
    assert seeds[2] == 7
    for seed in seeds:
        model = merge_tensors(method, [base, model], 0, settings, seed=seed)
    assert float(model.mean()) == pytest.approx(0.125, abs=0.01)


def test_ignored_parameters_change_nothing() -> None:
    x = random(5, 7)
    with_it = merge_tensors("ties", x, 0, {"weight": 1, "density": 0.5, "int8_mask": True})
    assert torch.equal(with_it, merge_tensors("ties", x, 0, {"weight": 1, "density": 0.5}))
