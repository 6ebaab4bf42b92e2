from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import save_file

from aidocks.checkpoints.files import OutputFile, hash_file
from aidocks.checkpoints.reader import Checkpoint
from aidocks.errors import CorruptCheckpoint
from aidocks.laser.batches import Device, LookAtDevice, group, run_in_batches
from aidocks.laser.calibration import Moments
from aidocks.laser.decomposition import DecomposeMatrices, DecomposeMatrix
from aidocks.laser.matrices import Matrix, find_matrices
from aidocks.laser.scan import ScanMatrices, ScanMatrix
from aidocks.laser.truncation import Basis, activation_basis, bases, load_basis, reduce, weight_basis
from aidocks.plan import Stage, UnitContext

SHAPES = [(24, 24), (20, 36), (36, 20)]
GPU = Device(gpu_bytes=80 << 30)


def random(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(side: int, seed: int) -> torch.Tensor:
    inputs = random(2 * side, side, seed) * torch.linspace(3, 0.1, side, dtype=torch.float64)
    return inputs.mT @ inputs / len(inputs)


class OfOne(BaseModel):
    matrix: Matrix


def of_shapes(*shapes: tuple[int, int]) -> list[OfOne]:
    return [
        OfOne(matrix=Matrix(name=f"layers.{i}.a.weight", layer=i, kind="a", shape=shape, dtype="F32"))
        for i, shape in enumerate(shapes)
    ]


def assert_alike(one: Basis, other: Basis, matrix: torch.Tensor, tolerance: float) -> None:
    """Directions are alike up to their signs: what matters is what they keep."""
    torch.testing.assert_close(one.values_N, other.values_N, rtol=tolerance, atol=tolerance)
    for rank in (1, 7, 19):
        kept, expected = reduce(matrix, one, rank), reduce(matrix, other, rank)
        torch.testing.assert_close(kept, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_batch_has_the_bases_of_its_matrices(shape: tuple[int, int], device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    matrices = [random(*shape, seed) for seed in range(4)]
    # The second has inputs of its own, the third never got any, the fourth is cut by its weights.
    covariances = [moments(shape[1], 5), moments(shape[1], 6), torch.zeros(shape[1], shape[1]), None]
    given = zip(matrices, covariances, strict=True)
    together = bases(((matrix.to(device), c_II) for matrix, c_II in given), precision="double")
    assert len(together) == 4
    for basis, matrix, c_II in zip(together, matrices, covariances, strict=True):
        assert basis.directions_ON.device.type == device
        assert basis.values_N.device.type == "cpu"
        alone = (
            weight_basis(matrix, precision="double")
            if c_II is None
            else activation_basis(matrix, c_II, precision="double")
        )
        assert_alike(Basis(basis.directions_ON.cpu(), basis.values_N), alone, matrix, 1e-12)


def test_without_a_gpu_every_matrix_stays_alone(tmp_path: Path) -> None:
    assert LookAtDevice().run(UnitContext(tmp_path)) == Device(gpu_bytes=0)
    assert group(of_shapes((8, 8), (8, 8), (8, 9)), Device()) == [[0], [1], [2]]


def test_a_gpu_gets_matrices_of_one_shape_as_many_as_it_holds() -> None:
    units = of_shapes((8, 8), (8, 9), (8, 8), (8, 9), (9, 8), (8, 8))
    assert group(units, GPU) == [[0, 2, 5], [1, 3], [4]]
    # 8 rows and columns need 8 numbers for each of 64 entries, and a batch has a quarter of the memory.
    assert group(of_shapes(*[(8, 8)] * 5), Device(gpu_bytes=4 * 2 * 8 * 8 * 64)) == [[0, 1], [2, 3], [4]]
    assert group(of_shapes(*[(8, 8)] * 2), Device(gpu_bytes=1)) == [[0], [1]]
    assert [len(members) for members in group(of_shapes(*[(8, 8)] * 40), GPU)] == [16, 16, 8]


def drive(plan: Any, answer: Any) -> Any:
    """Answer the only stage of a plan, if it has one; return what it returns."""
    try:
        stage = next(plan)
        plan.send([answer(unit) for unit in stage.units])
    except StopIteration as stop:
        return stop.value
    raise AssertionError("more than one stage")


def test_results_are_in_the_order_of_the_units() -> None:
    class Several(BaseModel):
        results: Sequence[int | None]

    units = of_shapes((8, 8), (8, 9), (8, 8), (9, 8), (8, 9))

    def answer(unit: Any) -> Any:
        return (
            Several(results=[u.matrix.layer for u in unit]) if isinstance(unit, tuple) else unit.matrix.layer
        )

    together: Any = tuple
    for device in (Device(), GPU):
        assert drive(run_in_batches("scan", units, device, together), answer) == [0, 1, 2, 3, 4]
        assert drive(run_in_batches("scan", [], device, together), answer) == []
    stage = next(run_in_batches("scan", units, Device(), together))
    assert stage == Stage("scan", tuple(units))  # type: ignore[arg-type]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    tensors = {f"layers.{i}.up.weight": random(36, 20, i).float() for i in range(3)}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    return directory


def scans(checkpoint: Path, cache_dir: Path) -> tuple[ScanMatrix, ...]:
    digest = hash_file(checkpoint / "model.safetensors")
    return tuple(
        ScanMatrix(checkpoint=checkpoint, matrix=matrix, file_sha256=digest, cache_dir=cache_dir)
        for matrix in find_matrices(Checkpoint(checkpoint).entries)
    )


def test_a_batch_is_scanned_like_its_matrices(checkpoint: Path, tmp_path: Path) -> None:
    context = UnitContext(tmp_path)
    alone = [unit.run(context) for unit in scans(checkpoint, tmp_path / "alone")]
    members = scans(checkpoint, tmp_path / "together")
    members[1].run(context)  # its values are kept already
    batch = ScanMatrices(units=members)
    found = ScanMatrices.model_validate_json(batch.model_dump_json()).run(context).results
    assert batch.label == "layers.0.up.weight and 2 more of 36 x 20"
    assert batch.weight == sum(unit.weight for unit in members)
    assert len(found) == 3
    for one, expected, unit in zip(found, alone, members, strict=True):
        assert one.matrix == expected.matrix
        assert one.singular_values == pytest.approx(expected.singular_values, rel=1e-12)
        assert {k: d.rank for k, d in one.decisions.items()} == {
            k: d.rank for k, d in expected.decisions.items()
        }
        assert unit.kept_at.exists()


def test_a_batch_is_decomposed_like_its_matrices(checkpoint: Path, tmp_path: Path) -> None:
    context = UnitContext(tmp_path)
    matrices = find_matrices(Checkpoint(checkpoint).entries)
    collected = Moments()
    for number, matrix in enumerate(matrices[:2]):
        collected.sums[matrix.address] = moments(20, number).float()
        collected.tokens[matrix.address] = 1
        collected.inputs[matrix.address] = matrix.address
    covariances: tuple[OutputFile, ...] = (collected.write(tmp_path / "covariances.safetensors"),)

    def units(directory: Path) -> tuple[DecomposeMatrix, ...]:
        return tuple(
            DecomposeMatrix(
                checkpoint=checkpoint,
                matrix=matrix,
                truncation="activation_aware",
                covariances=covariances,
                directory=directory,
                ranks=(3, 20),
            )
            for matrix in matrices
        )

    alone = [unit.run(context) for unit in units(tmp_path / "alone")]
    batch = DecomposeMatrices(units=units(tmp_path / "together"))
    result = DecomposeMatrices.model_validate_json(batch.model_dump_json()).run(context)
    assert batch.outputs(result) == tuple(one.file for one in result.results)
    # Of the last nothing is known.
    assert [one.truncation for one in result.results] == ["activation_aware", "activation_aware", "weight"]
    for one, expected, matrix in zip(result.results, alone, matrices, strict=True):
        assert (one.address, one.truncation, one.ranks) == (matrix.address, expected.truncation, (3, 20))
        assert one.energies == pytest.approx(expected.energies, rel=1e-12)
        stored = Checkpoint(checkpoint).tensor(matrix.name)
        assert_alike(load_basis(one.file.path), load_basis(expected.file.path), stored, 1e-6)


def test_a_matrix_that_is_not_finite_ends_its_batch(checkpoint: Path, tmp_path: Path) -> None:
    tensors = {name: Checkpoint(checkpoint).tensor(name).clone() for name in Checkpoint(checkpoint).entries}
    tensors["layers.1.up.weight"][2, 3] = torch.inf
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(CorruptCheckpoint, match=r"layers\.1\.up"):
        ScanMatrices(units=scans(checkpoint, tmp_path / "cache")).run(UnitContext(tmp_path))
