from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aidocks.checkpoints.files import OutputFile, hash_file
from aidocks.checkpoints.reader import Checkpoint
from aidocks.errors import CorruptCheckpoint
from aidocks.evaluate.objectives import ObjectiveSource
from aidocks.evaluate.texts import TextSource
from aidocks.laser.calibration import CollectCovariances, load_covariance
from aidocks.laser.decomposition import DecomposeMatrix
from aidocks.laser.matrices import Matrix, find_matrices, stored_matrix
from aidocks.laser.truncation import load_basis, reduce, weight_basis
from aidocks.plan import UnitContext
from aidocks.specs.laser import Truncation

TEXT = ObjectiveSource(
    metric="perplexity",
    text=TextSource(name="prose"),
    seq_length=32,
    sizes={"calibration": 16, "search": 8, "held_out": 8, "report": 8},
)


@pytest.fixture(scope="module")
def model(tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tiny_llama(tmp_path_factory.mktemp("tiny") / "model", num_hidden_layers=1)
    return path


@pytest.fixture(scope="module")
def matrices(model: Path) -> dict[str, Matrix]:
    return {matrix.kind: matrix for matrix in find_matrices(Checkpoint(model).entries)}


@pytest.fixture(scope="module")
def covariances(
    model: Path, matrices: dict[str, Matrix], tmp_path_factory: pytest.TempPathFactory
) -> tuple[OutputFile, ...]:
    directory = tmp_path_factory.mktemp("covariances")
    collect = CollectCovariances(
        checkpoint=model,
        objectives=(TEXT,),
        matrices=tuple(matrix.address for matrix in matrices.values()),
        directory=directory,
    )
    return collect.run(UnitContext(directory)).files


def decompose(
    model: Path,
    matrix: Matrix,
    truncation: Truncation,
    directory: Path,
    covariances: tuple[OutputFile, ...] = (),
) -> DecomposeMatrix:
    return DecomposeMatrix(
        checkpoint=model,
        matrix=matrix,
        truncation=truncation,
        covariances=covariances,
        directory=directory,
        ranks=(0, 3, matrix.full_rank),
    )


@pytest.mark.parametrize("kind", ["q_proj", "up_proj", "down_proj"])
def test_both_truncations(
    model: Path,
    matrices: dict[str, Matrix],
    covariances: tuple[OutputFile, ...],
    tmp_path: Path,
    kind: str,
) -> None:
    context, matrix = UnitContext(tmp_path), matrices[kind]
    w_OI = stored_matrix(Checkpoint(model), matrix)
    covariance = load_covariance(covariances, matrix.address)
    errors = {}
    for truncation in ("weight", "activation_aware"):
        unit = decompose(model, matrix, truncation, tmp_path, covariances)  # type: ignore[arg-type]
        result = unit.run(context)
        assert (result.address, result.truncation) == (matrix.address, truncation)
        assert unit.outputs(result) == (result.file,)
        assert hash_file(result.file.path) == result.file.sha256
        assert unit.run(context) == result
        nothing, some, everything = result.energies
        assert nothing == 0 < some < everything == pytest.approx(1)
        left = (w_OI - reduce(w_OI, load_basis(result.file.path), 3)).double()
        errors[truncation] = float((left @ covariance * left).sum())
    assert errors["activation_aware"] < errors["weight"]
    plain = load_basis(decompose(model, matrix, "weight", tmp_path).run(context).file.path)
    assert torch.equal(plain.directions_ON, weight_basis(w_OI).directions_ON)


def test_without_second_moments_the_weights_decide_and_the_result_says_so(
    model: Path, matrices: dict[str, Matrix], tmp_path: Path
) -> None:
    context = UnitContext(tmp_path)
    fallback = decompose(model, matrices["o_proj"], "activation_aware", tmp_path).run(context)
    plain = decompose(model, matrices["o_proj"], "weight", tmp_path).run(context)
    assert fallback.truncation == plain.truncation == "weight"
    assert fallback.file.path != plain.file.path
    assert fallback.file.sha256 == plain.file.sha256
    assert fallback.energies == plain.energies


def test_weights_that_are_not_finite_are_named(
    model: Path, matrices: dict[str, Matrix], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((model / "config.json").read_text())
    tensors = load_file(model / "model.safetensors")
    tensors[matrices["k_proj"].name][1, 2] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(CorruptCheckpoint, match="k_proj"):
        decompose(broken, matrices["k_proj"], "weight", tmp_path).run(UnitContext(tmp_path))
    assert not list(tmp_path.glob("basis-*"))


def test_the_number_of_threads_changes_no_bit(tmp_path: Path) -> None:
    weight = torch.randn(300, 400, generator=torch.Generator().manual_seed(0))
    save_file({"layers.0.up.weight": weight}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (matrix,) = find_matrices(Checkpoint(tmp_path).entries)
    before = torch.get_num_threads()
    made = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            unit = decompose(tmp_path, matrix, "weight", tmp_path / str(threads))
            made.append(unit.run(UnitContext(tmp_path, threads=threads)).file.sha256)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert made[0] == made[1]
