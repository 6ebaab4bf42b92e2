"""Every merge method against its formula, on random tensors of all shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aidocks.merge.in_memory import merge_tensors
from tests.unit.merge.methods import references

SHAPES = st.sampled_from(
    [(), (1,), (7,), (64,), (1, 9), (5, 1), (6, 8), (17, 33), (3, 4, 5), (0,), (0, 4), (4, 0)]
)
FILLED = SHAPES.filter(lambda shape: 0 not in shape)
SEEDS = st.integers(0, 10**6)
few = settings(max_examples=25, deadline=None)


def tensors(seed: int, count: int, shape: tuple[int, ...], noise: float = 0.3) -> list[torch.Tensor]:
    """Return a base and models near it: float64, every other one not contiguous."""
    random = np.random.default_rng(seed)
    base = random.standard_normal(shape)
    drawn = [base] + [base + noise * random.standard_normal(shape) for _ in range(count)]
    made = [torch.from_numpy(np.asarray(array)) for array in drawn]
    return [
        torch.stack([each, -each], dim=-1)[..., 0] if number % 2 else each for number, each in enumerate(made)
    ]


def merged(method: str, given_: list[torch.Tensor], base: int | None = None, **parameters: Any) -> Any:
    before = [each.clone() for each in given_]
    result = merge_tensors(
        method, given_, base, {name.rstrip("_"): value for name, value in parameters.items()}
    )
    assert result.shape == given_[0].shape
    assert all(torch.equal(one, other) for one, other in zip(before, given_, strict=True)), (
        "inputs are not changed"
    )
    return result.numpy()


def deltas(given_: list[torch.Tensor]) -> Any:
    base, *models = given_
    return base.numpy(), np.stack([(model - base).numpy() for model in models])


def same(one: Any, other: Any) -> None:
    np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-11)


@few
@given(SEEDS, SHAPES, st.booleans())
def test_linear(seed: int, shape: tuple[int, ...], normalize: bool) -> None:
    x = tensors(seed, 2, shape)
    weight = [0.3, 1.5, -0.2]
    expected = references.linear(np.stack([each.numpy() for each in x]), np.array(weight), normalize)
    same(merged("linear", x, weight=weight, normalize=normalize), expected)


@few
@given(SEEDS, FILLED, st.floats(0, 1), st.sampled_from([0, 1]))
def test_slerp(seed: int, shape: tuple[int, ...], t: float, base: int) -> None:
    x = tensors(seed, 1, shape)
    same(merged("slerp", x, base, t=t), references.slerp(x[base].numpy(), x[1 - base].numpy(), t))


@few
@given(SEEDS, FILLED, st.booleans())
def test_nuslerp_of_whole_tensors(seed: int, shape: tuple[int, ...], has_base: bool) -> None:
    x = tensors(seed, 2, shape)
    base, d = deltas(x)
    if not has_base:
        base, d = np.zeros(shape), np.stack([each.numpy() for each in x[1:]])
    got = merged("nuslerp", x if has_base else x[1:], 0 if has_base else None, weight=[1, 3])
    same(got, base + references.slerp_rows(d[0].reshape(-1), d[1].reshape(-1), 0.75, 0).reshape(shape))


@few
@given(SEEDS, FILLED.filter(lambda shape: shape and shape[-1] > 1), st.booleans())
def test_nuslerp_by_rows_and_columns(seed: int, shape: tuple[int, ...], row_wise: bool) -> None:
    x = tensors(seed, 2, shape)
    base, d = deltas(x)
    got = merged("nuslerp", x, 0, weight=[1, 3], nuslerp_flatten=False, nuslerp_row_wise=row_wise)
    np.testing.assert_allclose(
        got, base + references.slerp_rows(d[0], d[1], 0.75, 0 if row_wise else -1), rtol=1e-7, atol=1e-7
    )


@few
@given(SEEDS, FILLED, st.booleans())
def test_multislerp(seed: int, shape: tuple[int, ...], has_base: bool) -> None:
    x = tensors(seed, 3, shape)
    base, d = deltas(x)
    if not has_base:
        base, d = np.zeros(shape), np.stack([each.numpy() for each in x[1:]])
    weight = np.array([0.5, 1.0, 0.25])
    got = merged("multislerp", x if has_base else x[1:], 0 if has_base else None, weight=list(weight), eps=0)
    units = d.reshape(3, -1) / np.linalg.norm(d.reshape(3, -1), axis=1)[:, None]
    if np.linalg.norm(weight @ units) > 1e-2:
        same(got, base + references.multislerp(d, weight))


@few
@given(SEEDS, FILLED.filter(lambda shape: np.prod(shape) > 4), st.integers(2, 4))
def test_karcher(seed: int, shape: tuple[int, ...], count: int) -> None:
    x = tensors(seed, count - 1, shape)
    expected = references.karcher(np.stack([each.numpy() for each in x]))
    np.testing.assert_allclose(merged("karcher", x), expected, rtol=1e-5, atol=1e-5)


@few
@given(SEEDS, FILLED.filter(lambda shape: np.prod(shape) > 4), st.integers(2, 4))
def test_model_stock(seed: int, shape: tuple[int, ...], count: int) -> None:
    x = tensors(seed, count, shape)
    np.testing.assert_allclose(
        merged("model_stock", x, 0), references.model_stock(*deltas(x)), rtol=1e-6, atol=1e-6
    )


def test_model_stock_by_rows() -> None:
    x = tensors(3, 3, (6, 8))
    rows = [references.model_stock(*deltas([each[row] for each in x])) for row in range(6)]
    same(merged("model_stock", x, 0, filter_wise=True), np.stack(rows))


@few
@given(SEEDS, SHAPES, st.booleans())
def test_task_arithmetic(seed: int, shape: tuple[int, ...], normalize: bool) -> None:
    x = tensors(seed, 2, shape)
    base, d = deltas(x)
    expected = base + 1.5 * references.linear(d, np.array([0.5, 0.7]), normalize)
    same(merged("task_arithmetic", x, 0, weight=[0.5, 0.7], lambda_=1.5, normalize=normalize), expected)


@few
@given(SEEDS, SHAPES, st.floats(0, 1), st.booleans(), st.booleans(), st.booleans())
def test_ties(
    seed: int, shape: tuple[int, ...], density: float, normalize: bool, rescale: bool, tied: bool
) -> None:
    x = tensors(seed, 2, shape)
    if tied:  # few magnitudes: many equal ones, also at the cut
        x = [(each * 3).round() / 2 for each in x]
    base, d = deltas(x)
    thinned = np.stack([references.trim(one, share) for one, share in zip(d, (density, 0.4), strict=True)])
    if rescale:
        thinned = np.stack([references.keep_l1(one, kept) for one, kept in zip(d, thinned, strict=True)])
    weight = np.array([0.75, 0.5])
    got = merged(
        "ties",
        x,
        0,
        weight=list(weight),
        density=[density, 0.4],
        normalize=normalize,
        rescale=rescale,
        lambda_=0.9,
    )
    if not (tied and rescale):  # signs of sums that are 0 but for rounding
        same(got, base + 0.9 * references.elect_and_merge(thinned, weight, normalize))


@few
@given(SEEDS, SHAPES, st.floats(0, 1), st.floats(0, 0.5), st.booleans(), st.booleans())
def test_breadcrumbs(
    seed: int, shape: tuple[int, ...], density: float, gamma: float, elect: bool, tied: bool
) -> None:
    x = tensors(seed, 2, shape)
    if tied:
        x = [(each * 3).round() / 2 for each in x]
    base, d = deltas(x)
    thinned = np.stack([references.mask_outliers(one, density, gamma) for one in d])
    weight = np.array([0.75, 0.5])
    got = merged(f"breadcrumbs{'_ties' * elect}", x, 0, weight=list(weight), density=density, gamma=gamma)
    expected = (
        references.elect_and_merge(thinned, weight, False)
        if elect
        else references.linear(thinned, weight, False)
    )
    same(got, base + expected)


@few
@given(SEEDS, FILLED, st.sampled_from([0.0, 0.3, 0.7, 1.0]))
def test_sce(seed: int, shape: tuple[int, ...], top: float) -> None:
    x = tensors(seed, 3, shape)
    base, d = deltas(x)
    same(merged("sce", x, 0, select_topk=top), base + references.sce(d, top))


@few
@given(SEEDS, FILLED)
def test_arcee_fusion(seed: int, shape: tuple[int, ...]) -> None:
    x = tensors(seed, 1, shape)
    base, other = (each.numpy() for each in x)
    got = merged("arcee_fusion", x, 0)
    mask = references.importance_mask(base, other) if shape else True
    # Importances that equal the threshold but for rounding may fall on either side.
    assert np.mean(~np.isclose(got, np.where(mask, other, base), rtol=1e-9, atol=1e-11)) <= 0.02


@few
@given(SEEDS, SHAPES)
def test_nearswap(seed: int, shape: tuple[int, ...]) -> None:
    x = tensors(seed, 1, shape)
    a, b = (each.numpy() for each in x)
    w = np.clip(0.2 / np.maximum(np.abs(a - b), 1e-6), 0, 1)
    same(merged("nearswap", x, 0, t=0.2), w * b + (1 - w) * a)


@few
@given(SEEDS, SHAPES, st.floats(0, 0.5))
def test_ram(seed: int, shape: tuple[int, ...], epsilon: float) -> None:
    x = tensors(seed, 3, shape)
    base, d = deltas(x)
    same(merged("ram", x, 0, epsilon=epsilon), base + references.ram(d, epsilon, np.ones(3)))
    changed = np.abs(d) > epsilon
    number = changed.sum(0)
    flat = tuple(range(1, d.ndim))
    ratios = (changed & (number > 1)).sum(flat) / np.maximum((changed & (number == 1)).sum(flat), 1)
    factors = 1 + 0.4 * np.minimum(ratios, 0.5)
    got = merged("ramplus_tl", x, 0, epsilon=epsilon, r=0.4, alpha=0.5)
    same(got, base + references.ram(d, epsilon, factors))


@few
@given(SEEDS, SHAPES)
def test_passthrough(seed: int, shape: tuple[int, ...]) -> None:
    (x,) = tensors(seed, 0, shape)
    assert np.array_equal(merged("passthrough", [x]), x.numpy())
    same(merged("passthrough", [x], scale=0.5), x.numpy() / 2)
