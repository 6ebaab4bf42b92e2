"""Factors of small rank: as close as any can be, or nearly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from aidocks.merge.extraction.low_rank import LowRank, decompose

SIDES = st.integers(1, 24)


def matrix(rows: int, columns: int, seed: int, decay: float = 1.0) -> torch.Tensor:
    """Return a matrix whose singular values are 1, decay, decay^2, ..."""
    generator = torch.Generator().manual_seed(seed)
    side = min(rows, columns)
    u, v = (
        torch.linalg.qr(torch.randn(n, side, generator=generator, dtype=torch.float64)).Q
        for n in (rows, columns)
    )
    values = decay ** torch.arange(side, dtype=torch.float64)
    return (u * values) @ v.mT


def error(d_OI: torch.Tensor, found: LowRank) -> float:
    product = found.b_OK.double() @ found.a_KI.double()
    return float((d_OI - product).norm() / d_OI.norm())


@given(SIDES, SIDES, st.integers(1, 30), st.integers(0, 1000), st.floats(0.3, 1.0))
@settings(max_examples=40, deadline=None)
def test_the_exact_error_is_the_least_there_is(
    rows: int, columns: int, rank: int, seed: int, decay: float
) -> None:
    d_OI = matrix(rows, columns, seed, decay)
    found = decompose(d_OI, rank)
    values = torch.linalg.svdvals(d_OI)
    least = float(values[rank:].norm() / values.norm())
    assert found.rank <= rank
    assert error(d_OI, found) == pytest.approx(least, abs=2e-6)
    assert error(d_OI, found) ** 2 == pytest.approx(1 - found.energy, abs=1e-6)
    # Balanced: neither factor is larger than the other.
    assert torch.allclose(found.b_OK.norm(dim=0), found.a_KI.norm(dim=1), rtol=1e-3)


@given(st.integers(2, 20), st.integers(2, 20), st.floats(0.05, 1.0), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_energy_chooses_the_smallest_rank_that_keeps_it(
    rows: int, columns: int, energy: float, seed: int
) -> None:
    d_OI = matrix(rows, columns, seed, 0.7)
    found = decompose(d_OI, 64, energy=energy)
    shares = torch.linalg.svdvals(d_OI).square().cumsum(0) / d_OI.square().sum()
    assert found.energy >= energy - 1e-9
    assert found.rank == 1 or float(shares[found.rank - 2]) < energy
    assert decompose(d_OI, 1, energy=energy).rank == 1


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
@pytest.mark.parametrize("decay", [0.9, 0.97])
@pytest.mark.parametrize("rank", [4, 16, 32])
def test_the_randomised_error_is_within_a_percent_of_the_least(
    shape: tuple[int, int], decay: float, rank: int
) -> None:
    d_OI = matrix(*shape, seed=3, decay=decay)
    least = error(d_OI, decompose(d_OI, rank))
    found = decompose(d_OI, rank, method="randomized", seed=1, name="x")
    assert found.rank == rank
    assert least - 1e-6 <= error(d_OI, found) <= least * 1.01
    assert found.energy == pytest.approx(1 - error(d_OI, found) ** 2, abs=1e-4)


def test_random_vectors_are_those_of_seed_and_name() -> None:
    d_OI = matrix(120, 100, seed=0, decay=0.99)

    def factor(seed: int, name: str) -> torch.Tensor:
        return decompose(d_OI, 8, method="randomized", seed=seed, name=name).a_KI

    assert torch.equal(factor(1, "x"), factor(1, "x"))
    assert not torch.equal(factor(1, "x"), factor(2, "x"))
    assert not torch.equal(factor(1, "x"), factor(1, "y"))


@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_a_rank_that_is_not_there_is_not_used(method: str) -> None:
    d_OI = matrix(80, 90, seed=0)[:, :3] @ matrix(80, 90, seed=1)[:3]
    found = decompose(d_OI, 20, method=method)  # type: ignore[arg-type]
    assert found.rank == 3
    assert error(d_OI, found) < 1e-5
    nothing = decompose(torch.zeros(5, 7), 4, method=method)  # type: ignore[arg-type]
    assert (nothing.rank, nothing.energy) == (0, 1.0)
    assert (nothing.b_OK @ nothing.a_KI).shape == (5, 7)
    assert math.isfinite(nothing.energy)


@pytest.mark.parametrize("shape", [(64, 100_000), (100_000, 64)])
@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_nothing_as_large_as_the_matrix_is_made_in_float64(shape: tuple[int, int], method: str) -> None:
    class Largest(TorchDispatchMode):
        values = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.dtype == torch.float64:
                self.values = max(self.values, made.numel())
            return made

    d_OI = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with Largest() as largest:
        found = decompose(d_OI, 4, method=method)  # type: ignore[arg-type]
    assert found.rank == 4
    assert 0 < largest.values < d_OI.numel()
