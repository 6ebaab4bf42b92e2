from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from aidocks.checkpoints.files import hash_file
from aidocks.laser.truncation import (
    Basis,
    Precision,
    activation_basis,
    factors,
    load_basis,
    load_directions,
    load_values,
    reduce,
    save_basis,
    weight_basis,
)

PRECISIONS: tuple[Precision, ...] = ("single", "mixed", "double")


class Case(NamedTuple):
    """A matrix [O, I], possibly of deficient rank, a rank to keep, and second moments of inputs, likewise."""

    matrix: torch.Tensor
    rank: int
    covariance: torch.Tensor


def random_matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows, columns = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    seed = draw(st.integers(0, 2**16))
    inner = draw(st.integers(1, 2 * min(rows, columns)))
    matrix = random_matrix(rows, inner, seed) @ random_matrix(inner, columns, seed + 1)
    matrix *= draw(st.sampled_from([0.0, 1e-3, 1.0]))
    tokens = draw(st.integers(1, 3 * columns))
    inputs = random_matrix(tokens, columns, seed + 2)
    inputs[:, 0] *= draw(st.sampled_from([0.0, 1.0, 30.0]))
    return Case(matrix, draw(st.integers(0, min(rows, columns))), inputs.mT @ inputs / tokens)


def truncated(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def output_error(matrix: torch.Tensor, reduced: torch.Tensor, covariance: torch.Tensor) -> float:
    difference = matrix.double() - reduced.double()
    return float((difference @ covariance * difference).sum().clamp_min(0).sqrt())


def ridged(covariance: torch.Tensor) -> torch.Tensor:
    return covariance + 1e-4 * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)


def assert_orthonormal(basis: Basis, tolerance: float) -> None:
    u = basis.directions_ON.double()
    torch.testing.assert_close(u.mT @ u, torch.eye(u.shape[1], dtype=torch.float64), rtol=0, atol=tolerance)


@settings(deadline=None)
@given(case=cases(), precision=st.sampled_from(PRECISIONS))
def test_a_weight_basis_is_orthonormal_spans_the_matrix_and_has_its_singular_values(
    case: Case, precision: Precision
) -> None:
    basis = weight_basis(case.matrix, precision=precision)
    exact = torch.linalg.svdvals(case.matrix)
    assert_orthonormal(basis, 1e-2 if precision == "single" else 1e-6)
    u = basis.directions_ON.double()
    torch.testing.assert_close(u @ (u.mT @ case.matrix), case.matrix, rtol=0, atol=2e-2 * float(exact[0]))
    tolerance = 2e-3 if precision == "single" else 1e-7
    torch.testing.assert_close(basis.values_N, exact, rtol=0, atol=tolerance * float(exact[0]) + 1e-300)


@settings(deadline=None)
@given(case=cases())
def test_the_residual_is_that_of_the_svd_in_fp64(case: Case) -> None:
    # A tiny gap between neighbouring values makes the truncation itself ill-conditioned; the residual is not.
    reduced = reduce(case.matrix, weight_basis(case.matrix, precision="double"), case.rank)
    expected = (case.matrix - truncated(case.matrix, case.rank)).norm()
    torch.testing.assert_close((case.matrix - reduced).norm(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(64, 64), (48, 160), (160, 48)])
@pytest.mark.parametrize("rank", [1, 7, 40])
def test_the_matrix_of_lower_rank_is_that_of_the_svd(shape: tuple[int, int], rank: int) -> None:
    matrix = random_matrix(*shape, seed=3)
    expected = truncated(matrix, rank)
    for precision, limit in (("double", 1e-12), ("mixed", 5e-6), ("single", 1e-4)):
        reduced = reduce(matrix, weight_basis(matrix, precision=precision), rank)  # type: ignore[arg-type]
        assert float((reduced - expected).norm() / expected.norm()) <= limit, precision


@pytest.mark.parametrize("shape", [(48, 160), (160, 48)])
def test_a_stored_weight_is_rounded_once(shape: tuple[int, int]) -> None:
    matrix = random_matrix(*shape, seed=4).bfloat16()
    expected = truncated(matrix, 20)
    before = matrix.clone()
    reduced = reduce(matrix, weight_basis(matrix), 20)
    assert torch.equal(matrix, before)
    assert (reduced.dtype, reduced.shape, reduced.is_contiguous()) == (torch.bfloat16, matrix.shape, True)
    rounding = (expected.bfloat16().double() - expected).norm()
    assert (reduced.double() - expected).norm() < 1.05 * rounding


@settings(deadline=None)
@given(case=cases())
def test_knowing_the_inputs_never_gives_a_larger_output_error(case: Case) -> None:
    matrix, rank, covariance = case.matrix, case.rank, ridged(case.covariance)
    aware = reduce(matrix, activation_basis(matrix, case.covariance, precision="double"), rank)
    plain = reduce(matrix, weight_basis(matrix, precision="double"), rank)
    scale = output_error(matrix, torch.zeros_like(matrix), covariance)
    error = output_error(matrix, aware, covariance)
    assert error <= output_error(matrix, plain, covariance) + 1e-7 * scale
    # It is the truncated SVD of W C^{1/2}, whose residual is the tail of the singular values.
    lower = torch.linalg.cholesky(covariance) if float(covariance.trace()) > 0 else covariance
    tail = torch.linalg.svdvals(matrix @ lower)[rank:].norm()
    assert error == pytest.approx(float(tail), abs=1e-6 * scale + 1e-12)


@settings(deadline=None)
@given(case=cases(), precision=st.sampled_from(PRECISIONS))
def test_a_basis_that_knows_the_inputs_is_one(case: Case, precision: Precision) -> None:
    basis = activation_basis(case.matrix, case.covariance, precision=precision)
    assert_orthonormal(basis, 1e-2 if precision == "single" else 1e-6)
    assert bool((basis.values_N.diff() <= 0).all())
    u = basis.directions_ON.double()
    norm = float(case.matrix.norm())
    torch.testing.assert_close(u @ (u.mT @ case.matrix), case.matrix, rtol=0, atol=2e-2 * norm)


@pytest.mark.parametrize("shape", [(30, 30), (20, 50), (50, 20)])
def test_for_white_inputs_both_are_the_same(shape: tuple[int, int]) -> None:
    matrix = random_matrix(*shape, seed=5)
    white = torch.eye(shape[1])
    aware = reduce(matrix, activation_basis(matrix, 3 * white, precision="double"), 9)
    torch.testing.assert_close(aware, truncated(matrix, 9), rtol=0, atol=1e-10)
    # Inputs that were never there at all do not matter either.
    silent = reduce(matrix, activation_basis(matrix, 0 * white, precision="double"), 9)
    torch.testing.assert_close(silent, truncated(matrix, 9), rtol=0, atol=1e-10)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_second_moments_that_rounding_made_indefinite_still_serve(precision: Precision) -> None:
    matrix = random_matrix(50, 20, seed=13)
    inputs = random_matrix(3, 20, seed=14)
    covariance = inputs.mT @ inputs / 3
    covariance -= 1e-3 * covariance.diagonal().mean() * torch.eye(20, dtype=torch.float64)
    basis = activation_basis(matrix, covariance, precision=precision)
    assert_orthonormal(basis, 1e-2 if precision == "single" else 1e-6)
    plain = reduce(matrix, weight_basis(matrix), 3)
    exact = inputs.mT @ inputs / 3
    assert output_error(matrix, reduce(matrix, basis, 3), exact) < output_error(matrix, plain, exact) / 10


@pytest.mark.parametrize("shape", [(30, 30), (20, 50), (50, 20)])
def test_it_is_the_whitened_svd(shape: tuple[int, int]) -> None:
    matrix = random_matrix(*shape, seed=6)
    inputs = random_matrix(200, shape[1], seed=7) * torch.logspace(0, 2, shape[1], dtype=torch.float64)
    covariance = inputs.mT @ inputs / len(inputs)
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.sqrt()) @ vectors.mT
    expected = truncated(matrix @ root, 8) @ torch.linalg.inv(root)
    basis = activation_basis(matrix, covariance, precision="double", ridge=0.0)
    torch.testing.assert_close(reduce(matrix, basis, 8), expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(basis.values_N, torch.linalg.svdvals(matrix @ root), rtol=1e-6, atol=1e-6)
    before = covariance.clone()
    activation_basis(matrix, covariance)
    assert torch.equal(covariance, before)


@settings(deadline=None)
@given(case=cases(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_all_directions_give_every_bit_back_and_none_give_zero(case: Case, dtype: torch.dtype) -> None:
    matrix = case.matrix.to(dtype)
    for basis in (weight_basis(matrix), activation_basis(matrix, case.covariance)):
        whole = reduce(matrix, basis, min(matrix.shape))
        assert torch.equal(whole, matrix)
        assert whole.data_ptr() != matrix.data_ptr()
        assert not reduce(matrix, basis, 0).any()
        a, b = factors(matrix, basis, 0)
        assert (a.shape, b.shape) == ((len(matrix), 0), (0, matrix.shape[1]))


@settings(deadline=None)
@given(case=cases(), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_the_product_of_the_factors_is_the_reduced_matrix(case: Case, dtype: torch.dtype) -> None:
    matrix = case.matrix.to(dtype)
    basis = activation_basis(matrix, case.covariance, precision="double")
    a, b = factors(matrix, basis, case.rank)
    assert (a.shape, b.shape) == ((len(matrix), case.rank), (case.rank, matrix.shape[1]))
    assert a.dtype is b.dtype is dtype
    error = (a.double() @ b.double() - reduce(matrix, basis, case.rank).double()).norm()
    assert float(error) <= 4 * torch.finfo(dtype).eps * float(matrix.double().norm()) + 1e-12


def test_both_ways_to_project_agree() -> None:
    matrix = random_matrix(40, 60, seed=8).float()
    basis = weight_basis(matrix)
    u = basis.directions_ON
    for rank in (19, 20, 21, 39):
        torch.testing.assert_close(
            reduce(matrix, basis, rank), u[:, :rank] @ (u[:, :rank].mT @ matrix), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
def test_shrinking_recovers_a_planted_signal_better(shape: tuple[int, int]) -> None:
    pytest.importorskip("aidocks.laser.rules")
    signal = 12 * random_matrix(shape[0], 3, seed=9) @ random_matrix(3, shape[1], seed=10) / shape[1] ** 0.5
    noisy = (signal + random_matrix(*shape, seed=11)).float()
    basis = weight_basis(noisy)
    kept, shrunken = (reduce(noisy, basis, 3, shrink=shrink) for shrink in (False, True))
    assert (shrunken - signal).norm() < (kept - signal).norm()
    a, b = factors(noisy, basis, 3, shrink=True)
    torch.testing.assert_close(a @ b, shrunken, rtol=0, atol=1e-4)
    # What lies within the noise is shrunk to nothing, so keeping more changes nothing.
    torch.testing.assert_close(reduce(noisy, basis, min(shape), shrink=True), shrunken, rtol=0, atol=1e-4)


def test_a_file_keeps_a_basis(tmp_path: Path) -> None:
    matrix = random_matrix(7, 5, seed=12)
    basis = weight_basis(matrix)
    written = save_basis(tmp_path / "bases" / "one.safetensors", basis)
    assert written.sha256 == hash_file(written.path)
    assert written.bytes == written.path.stat().st_size
    with safe_open(written.path, "pt") as file:
        assert file.get_slice("directions").get_shape() == [5, 7]  # each in one piece
    read = load_basis(written.path)
    assert read.directions_ON.dtype is torch.float32
    assert read.values_N.dtype is torch.float64
    assert torch.equal(read.directions_ON, basis.directions_ON)
    assert torch.equal(read.values_N, basis.values_N)
    assert torch.equal(load_values(written.path), basis.values_N)
    for first in (0, 2, 5):
        assert torch.equal(load_directions(written.path, first), basis.directions_ON[:, first:])
    again = save_basis(tmp_path / "two.safetensors", weight_basis(matrix, precision="double"))
    torch.testing.assert_close(load_basis(again.path).directions_ON, basis.directions_ON)
