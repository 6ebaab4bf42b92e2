from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aidocks.laser import spectrum
from aidocks.laser.spectrum import blocks_of, gram, reduce_rank, singular_values

shapes = st.tuples(st.integers(2, 40), st.integers(2, 40))


def random_matrix(shape: tuple[int, int], seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def truncated(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@settings(deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**16))
def test_values_agree_with_the_svd(shape: tuple[int, int], seed: int) -> None:
    matrix = random_matrix(shape, seed)
    expected = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(singular_values(matrix), expected, rtol=1e-9, atol=1e-7 * float(expected[0]))


@pytest.mark.parametrize("shape", [(7, 300), (300, 7), (64, 64), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_blocks_make_no_difference(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = random_matrix(shape, 1, dtype)
    expected = torch.linalg.svdvals(matrix.double())
    monkeypatch.setattr(spectrum, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(spectrum, "_LEAST_ROWS", 5)
    blocks = list(blocks_of(matrix))
    assert all(block.shape[0] <= 5 and block.dtype is dtype for block in blocks)
    assert sum(block.shape[0] for block in blocks) == max(shape)
    torch.testing.assert_close(singular_values(matrix), expected, rtol=1e-8, atol=1e-7 * float(expected[0]))
    small = matrix.double() if shape[0] <= shape[1] else matrix.double().mT
    torch.testing.assert_close(gram(blocks, min(shape)), small @ small.mT)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_has_no_values(value: float) -> None:
    matrix = random_matrix((5, 9), 0, torch.bfloat16)
    matrix[3, 8] = value
    assert bool(singular_values(matrix).isnan().all())


def test_a_matrix_of_zeros() -> None:
    assert singular_values(torch.zeros(3, 8)).tolist() == [0, 0, 0]


@settings(deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**16), data=st.data())
def test_reduction_agrees_with_the_svd(shape: tuple[int, int], seed: int, data: st.DataObject) -> None:
    matrix = random_matrix(shape, seed)
    rank = data.draw(st.integers(0, min(shape)))
    before = matrix.clone()
    exact = reduce_rank(matrix, rank, torch.float64)
    expected = truncated(matrix, rank)
    assert torch.equal(matrix, before)
    assert exact.shape == matrix.shape
    # A tiny gap between neighbouring values makes the truncation itself ill-conditioned; the residual is not.
    residual = (matrix - exact).norm()
    torch.testing.assert_close(residual, (matrix - expected).norm(), rtol=1e-9, atol=1e-9)
    assert int(torch.linalg.matrix_rank(exact, rtol=1e-7)) <= rank


@pytest.mark.parametrize("shape", [(64, 64), (48, 160), (160, 48)])
@pytest.mark.parametrize("rank", [1, 7, 40])
def test_fp32_reduction_is_far_below_the_rounding_of_a_stored_weight(
    shape: tuple[int, int], rank: int
) -> None:
    matrix = random_matrix(shape, 3, torch.bfloat16)
    expected = truncated(matrix, rank)
    error = (reduce_rank(matrix.float(), rank).double() - expected).norm() / expected.norm()
    assert error < 1e-4
    stored = reduce_rank(matrix, rank)
    assert stored.dtype is torch.bfloat16
    assert stored.is_contiguous()
    rounding = (expected.bfloat16().double() - expected).norm() / expected.norm()
    assert (stored.double() - expected).norm() / expected.norm() < 1.05 * rounding


def test_full_rank_changes_no_bit() -> None:
    matrix = random_matrix((6, 9), 0, torch.float16)
    reduced = reduce_rank(matrix, 6)
    assert torch.equal(reduced, matrix)
    assert reduced.data_ptr() != matrix.data_ptr()
