from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aidocks.laser import spectrum
from aidocks.laser.spectrum import blocks_of, gram, singular_values
from aidocks.threads import one_thread

shapes = st.tuples(st.integers(2, 40), st.integers(2, 40))


def random_matrix(shape: tuple[int, int], seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


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


def test_one_thread_is_for_a_cpu_and_for_a_while() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with one_thread("cuda:0"):
            assert torch.get_num_threads() == 3
        with one_thread("cpu"):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
        with pytest.raises(RuntimeError), one_thread("cpu"):
            raise RuntimeError
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
