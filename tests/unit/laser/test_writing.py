from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aidocks.checkpoints.reader import Checkpoint
from aidocks.errors import CorruptCheckpoint
from aidocks.laser.factors import MODEL_TYPE, factor_names
from aidocks.laser.matrices import Reduction
from aidocks.laser.truncation import factors, load_basis, reduce, save_basis, weight_basis
from aidocks.laser.writing import ChooseFactors, CopyBesideWeights, WriteShard, writing_units
from aidocks.plan import Unit, UnitContext

TinyLlama = Callable[..., Path]

Q = "model.layers.1.self_attn.q_proj.weight"
UP = "model.layers.2.mlp.up_proj.weight"


def reduction(checkpoint: Checkpoint, address: str, rank: int, bases: Path, **fields: Any) -> Reduction:
    """Decompose a stored matrix as the search does, and say that so much of it is kept."""
    name, _, expert = address.partition("[")
    tensor = checkpoint.tensor(name)
    matrix = tensor[int(expert[:-1])] if expert else tensor
    file = save_basis(bases / f"{address}.safetensors", weight_basis(matrix))
    return Reduction(address=address, rank=rank, basis=file.path, sha256=file.sha256, **fields)


def run(unit: Unit[Any], workspace: Path) -> Any:
    """Run a unit as a worker does: from JSON to JSON."""
    carried = type(unit).model_validate_json(unit.model_dump_json())
    result = carried.run(UnitContext(workspace))
    return unit.result_type.model_validate_json(result.model_dump_json())


def write(
    source: Path, target: Path, reductions: list[Reduction], *, factored: bool, max_shard_bytes: int = 10**9
) -> Checkpoint:
    checkpoint = Checkpoint(source)
    ranks: dict[str, int] = {}
    if factored:
        chosen = run(ChooseFactors(checkpoint=source, reductions=tuple(reductions)), target.parent)
        ranks = chosen.ranks
    units = writing_units(checkpoint, target, reductions, ranks, max_shard_bytes)
    written = [file for unit in reversed(units) for file in run(unit, target.parent).files]
    assert {file.path for file in written} == set(target.iterdir())
    return Checkpoint(target)


def raw(checkpoint: Checkpoint, name: str) -> bytes:
    entry = checkpoint.entries[name]
    with entry.file.open("rb") as file:
        file.seek(entry.begin)
        return file.read(entry.nbytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_results_hold_what_the_search_measured_and_the_bytes_of_the_base(
    tiny_llama: TinyLlama, tmp_path: Path, dtype: torch.dtype
) -> None:
    source = tiny_llama(tmp_path / "base", dtype=dtype, max_shard_size="400KB")
    base = Checkpoint(source)
    kept = [reduction(base, Q, 5, tmp_path), reduction(base, UP, 60, tmp_path, shrink=True)]
    result = write(source, tmp_path / "result", kept, factored=False, max_shard_bytes=300_000)
    assert len(result.weight_files) > 1
    assert set(result.entries) == set(base.entries)
    for name, entry in base.entries.items():
        assert (result.entries[name].dtype, result.entries[name].shape) == (entry.dtype, entry.shape)
        same = raw(result, name) == raw(base, name)
        assert same == (name not in (Q, UP)), name
    for r in kept:
        expected = reduce(base.tensor(r.address), load_basis(r.basis), r.rank, shrink=r.shrink)
        assert torch.equal(result.tensor(r.address), expected)
    assert (result.path / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert (result.path / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_without_reductions_the_result_is_the_base(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "base")
    base = Checkpoint(source)
    units = writing_units(base, tmp_path / "result", [], {}, 10**9)
    assert not any(unit.computes for unit in units), "copies need no worker with a device"
    result = write(source, tmp_path / "result", [], factored=False)
    assert all(raw(result, name) == raw(base, name) for name in base.entries)


def test_factors_are_stored_where_they_save_room_and_nowhere_else(
    tiny_llama: TinyLlama, tmp_path: Path
) -> None:
    source = tiny_llama(tmp_path / "base", dtype=torch.bfloat16)
    base = Checkpoint(source)
    # The first is square, 64 x 64: 31 directions are the most that two factors store in less room.
    square = "model.layers.0.self_attn.q_proj.weight"
    kept = [
        reduction(base, square, 31, tmp_path),
        reduction(base, Q, 32, tmp_path),
        reduction(base, UP, 9, tmp_path),
    ]
    result = write(source, tmp_path / "result", kept, factored=True)
    config = json.loads((result.path / "config.json").read_text())
    assert config["model_type"] == MODEL_TYPE
    assert config["factor_ranks"] == {square: 31, UP: 9}
    assert torch.equal(result.tensor(Q), reduce(base.tensor(Q), load_basis(kept[1].basis), 32))
    for r in (kept[0], kept[2]):
        assert r.address not in result.entries
        pair = factors(base.tensor(r.address), load_basis(r.basis), r.rank)
        for name, expected in zip(factor_names(r.address), pair, strict=True):
            assert torch.equal(result.tensor(name), expected)
            assert result.entries[name].dtype == "BF16"
    untouched = set(base.entries) - {square, Q, UP}
    assert all(raw(result, name) == raw(base, name) for name in untouched)
    assert result.total_bytes < base.total_bytes


def test_a_factor_in_each_of_two_files(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "base", num_hidden_layers=2)
    kept = [reduction(Checkpoint(source), Q, 20, tmp_path)]
    whole = write(source, tmp_path / "whole", kept, factored=True)
    split = write(source, tmp_path / "split", kept, factored=True, max_shard_bytes=4096)
    a, b = (split.entries[name].file for name in factor_names(Q))
    assert a != b
    assert all(raw(whole, name) == raw(split, name) for name in whole.entries)


def test_several_experts_of_one_fused_tensor(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {name: torch.randn(4, 12, 20).half(), "model.norm.weight": torch.ones(8).half()}
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "mixtral"}')
    base = Checkpoint(tmp_path / "base")
    kept = [reduction(base, f"{name}[{expert}]", rank, tmp_path) for expert, rank in ((1, 3), (3, 7))]
    result = write(base.path, tmp_path / "result", kept, factored=False)
    stored = result.tensor(name)
    for r, expert in zip(kept, (1, 3), strict=True):
        assert torch.equal(stored[expert], reduce(tensors[name][expert], load_basis(r.basis), r.rank))
    assert torch.equal(stored[0], tensors[name][0])
    assert torch.equal(stored[2], tensors[name][2])
    assert raw(result, "model.norm.weight") == raw(base, "model.norm.weight")


def test_other_directions_than_those_measured_are_refused(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "base")
    base = Checkpoint(source)
    kept = reduction(base, Q, 5, tmp_path)
    save_basis(kept.basis, weight_basis(torch.randn(64, 64)))
    with pytest.raises(CorruptCheckpoint, match="q_proj"):
        write(source, tmp_path / "result", [kept], factored=False)
    assert not list((tmp_path / "result").glob("*.safetensors*"))


def test_units_are_equal_for_equal_work_and_hold_only_what_they_need(
    tiny_llama: TinyLlama, tmp_path: Path
) -> None:
    source = tiny_llama(tmp_path / "base")
    base = Checkpoint(source)
    kept = [reduction(base, Q, 5, tmp_path), reduction(base, UP, 6, tmp_path)]
    units = writing_units(base, tmp_path / "result", kept, {}, 300_000)
    again = writing_units(base, tmp_path / "result", kept, {}, 300_000)
    assert [u.unit_id for u in units] == [u.unit_id for u in again]
    shards = [unit for unit in units if isinstance(unit, WriteShard)]
    assert sorted(r.address for shard in shards for r in shard.reductions) == sorted(r.address for r in kept)
    assert all(r.address in {t.name for t in s.shard.tensors} for s in shards for r in s.reductions)
    assert isinstance(units[-1], CopyBesideWeights)
