from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from aidocks.checkpoints.files import hash_file
from aidocks.checkpoints.reader import Checkpoint
from aidocks.errors import CorruptCheckpoint
from aidocks.laser import scan, spectrum
from aidocks.laser.marchenko_pastur import laserrmt
from aidocks.laser.matrices import find_matrices
from aidocks.laser.scan import MatrixSpectrum, ScanMatrix, decision_key
from aidocks.plan import UnitContext


def save(directory: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    directory.mkdir(exist_ok=True)
    save_file(dict(tensors), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return directory


def units(directory: Path, cache_dir: Path, keeps: tuple[float, ...] = ()) -> list[ScanMatrix]:
    digest = hash_file(directory / "model.safetensors")
    matrices = find_matrices(Checkpoint(directory).entries, all_weights=True)
    return [
        ScanMatrix(checkpoint=directory, matrix=m, file_sha256=digest, cache_dir=cache_dir, keeps=keeps)
        for m in matrices
    ]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TENSORS = {
    "layers.0.square.weight": random(24, 24),
    "layers.0.tall.weight": random(70, 9).bfloat16(),
    "layers.0.wide.weight": random(9, 70).half(),
    "layers.1.experts.up": random(3, 12, 20).bfloat16(),
    "layers.1.double.weight": random(8, 30).double(),
    "embed.weight": random(90, 6),
}


@pytest.mark.parametrize("small_blocks", [False, True])
def test_every_matrix_is_read_from_its_place(
    tmp_path: Path, small_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small_blocks:
        monkeypatch.setattr(spectrum, "_BLOCK_BYTES", 1)
        monkeypatch.setattr(spectrum, "_LEAST_ROWS", 7)
    directory = save(tmp_path / "model", TENSORS)
    found = units(directory, tmp_path)
    assert len(found) == 5 + 3
    for unit in found:
        tensor = TENSORS[unit.matrix.name]
        stored = tensor if unit.matrix.expert is None else tensor[unit.matrix.expert]
        expected = torch.linalg.svdvals(stored.double()).numpy()
        values = unit.values(UnitContext(tmp_path))
        np.testing.assert_allclose(values, expected, rtol=1e-8, atol=1e-7 * expected[0], err_msg=unit.label)


def test_what_a_spectrum_says(tmp_path: Path) -> None:
    directory = save(tmp_path / "model", {"layers.0.a.weight": random(80, 200)})
    (unit,) = units(directory, tmp_path, (0.25, 0.9))
    found = unit.run(UnitContext(tmp_path))
    assert MatrixSpectrum.model_validate_json(found.model_dump_json()) == found
    assert set(found.decisions) == {
        "laserrmt", "marchenko_pastur", "gavish_donoho", "optimal_shrinkage", "screenot",
        "fraction 0.25", "fraction 0.9", "energy 0.25", "energy 0.9",
    }  # fmt: skip
    assert found.decisions[decision_key("fraction", 0.25)].rank == 20
    assert found.noise_ratio == found.decisions["marchenko_pastur"].snr
    assert found.noise_ratio == pytest.approx(0, abs=0.1)
    assert found.snr == found.decisions["laserrmt"].snr
    assert found.snr is not None
    assert found.snr > 1
    assert found.sigma == pytest.approx(1, abs=0.1)
    assert found.bulk_distance < 0.05
    assert found.frobenius == pytest.approx(float(random(80, 200).norm()))
    assert found.spectral_norm == pytest.approx(float(torch.linalg.matrix_norm(random(80, 200), 2)))
    assert len(found.singular_values) == 64


@pytest.mark.parametrize("shape", [(40, 40), (30, 90), (90, 30), (13, 77), (2, 2), (2, 50)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_original_rank_is_reproduced(tmp_path: Path, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Against the original formula, step by step, on an fp64 SVD."""
    for seed in range(5):
        weight = (random(*shape, seed=seed) * random(1, shape[1], seed=seed + 1).exp()).to(dtype)
        values = torch.linalg.svdvals(weight.double())
        sigma = (torch.quantile(values, 0.75) - torch.quantile(values, 0.25)) / 1.349
        beta = min(shape) / max(shape)
        rank = int((values > sigma * np.sqrt((1 + np.sqrt(beta)) ** 2)).sum())
        directory = save(tmp_path / f"{seed}", {"a.weight": weight})
        (unit,) = units(directory, tmp_path)
        assert unit.run(UnitContext(tmp_path)).decisions["laserrmt"].rank == rank
        assert laserrmt(values.numpy(), shape).rank == rank


@pytest.mark.parametrize(
    ("weight", "rank"),
    [
        (torch.zeros(6, 9), 0),
        (torch.ones(6, 9), 1),
        (torch.eye(7), 0),
        (torch.full((2, 2), 1e-38), 0),
        (3e38 * torch.ones(4, 4), 1),
    ],
    ids=["zero", "rank one", "constant", "tiny", "large"],
)
def test_degenerate_matrices_have_finite_answers(tmp_path: Path, weight: torch.Tensor, rank: int) -> None:
    directory = save(tmp_path / "model", {"a.weight": weight})
    (unit,) = units(directory, tmp_path, (0.5,))
    found = json.loads(unit.run(UnitContext(tmp_path)).model_dump_json())
    numbers = [found["frobenius"], found["sigma"], found["bulk_distance"], *found["singular_values"]]
    for decision in found["decisions"].values():
        numbers += [value for value in decision.values() if value is not None]
    assert all(math.isfinite(number) for number in numbers)
    assert found["decisions"]["marchenko_pastur"]["rank"] == rank


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_matrix_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    experts = random(3, 6, 5)
    experts[1, 5, 4] = value
    directory = save(tmp_path / "model", {"layers.0.experts.up": experts})
    whole, broken, _ = units(directory, tmp_path)
    whole.run(UnitContext(tmp_path))
    with pytest.raises(CorruptCheckpoint, match=r"layers\.0\.experts\.up\[1\]") as caught:
        broken.run(UnitContext(tmp_path))
    assert caught.value.value == "layers.0.experts.up[1]"
    assert not broken.kept_at.exists()


def test_a_file_that_was_cut_off_is_named(tmp_path: Path) -> None:
    directory = save(tmp_path / "model", {"a.weight": random(40, 40)})
    (unit,) = units(directory, tmp_path)
    entry = Checkpoint(directory).entries["a.weight"]
    with (directory / "model.safetensors").open("r+b") as file:
        file.truncate(entry.end - 10)
    with pytest.raises(CorruptCheckpoint, match=r"shorter.*a\.weight"):
        scan.compute_values([(entry, unit.matrix)])


def test_values_are_kept_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save(tmp_path / "model", {"a.weight": random(20, 30), "b.weight": random(20, 30, seed=1)})
    first, second = units(directory, tmp_path / "cache")
    assert first.kept_at != second.kept_at
    found = first.run(UnitContext(tmp_path))
    copy = save(tmp_path / "copy", {"a.weight": random(20, 30), "b.weight": random(20, 30, seed=1)})
    other = save(tmp_path / "other", {"a.weight": 2 * random(20, 30), "b.weight": random(20, 30, seed=1)})
    assert units(copy, tmp_path / "cache")[0].kept_at == first.kept_at
    assert units(other, tmp_path / "cache")[0].kept_at != first.kept_at

    def refuse(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(scan, "compute_values", refuse)
    assert units(copy, tmp_path / "cache")[0].run(UnitContext(tmp_path)) == found


@pytest.mark.parametrize("content", ["short", "wrong", "pickle", "torn", "nan", "text"])
def test_what_is_kept_is_checked(tmp_path: Path, content: str) -> None:
    directory = save(tmp_path / "model", {"a.weight": random(20, 30)})
    (unit,) = units(directory, tmp_path)
    expected = unit.run(UnitContext(tmp_path))
    whole = unit.kept_at.read_bytes()
    match content:
        case "short":
            np.save(unit.kept_at, np.ones(19))
        case "wrong":
            np.save(unit.kept_at, np.ones(20, dtype=np.float32))
        case "pickle":
            np.save(unit.kept_at, np.array([{}] * 20), allow_pickle=True)
        case "nan":
            np.save(unit.kept_at, np.full(20, np.nan))
        case "torn":
            unit.kept_at.write_bytes(whole[:-9])
        case "text":
            unit.kept_at.write_text("values")
    assert unit.run(UnitContext(tmp_path)) == expected
    assert unit.kept_at.read_bytes() == whole


def test_longer_ones_weigh_more_and_labels_are_addresses(tmp_path: Path) -> None:
    directory = save(tmp_path / "model", TENSORS)
    by_label = {unit.label: unit.weight for unit in units(directory, tmp_path)}
    assert by_label["layers.0.square.weight"] > by_label["layers.1.experts.up[2]"]


def test_the_number_of_threads_changes_no_bit(tmp_path: Path) -> None:
    directory = save(tmp_path / "model", {"a.weight": random(300, 400)})
    before = torch.get_num_threads()
    kept = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            (unit,) = units(directory, tmp_path / str(threads))
            unit.run(UnitContext(tmp_path, threads=threads))
            kept.append(unit.kept_at.read_bytes())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert kept[0] == kept[1]
