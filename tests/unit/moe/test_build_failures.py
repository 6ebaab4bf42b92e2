"""Builds that cannot succeed: what is said, and that nothing of them is left."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from aidocks.errors import CorruptCheckpoint, InsufficientDisk
from aidocks.jobs.model import Status
from aidocks.jobs.runner import run_locally
from aidocks.settings import Settings
from aidocks.specs.moe import MoESpec
from aidocks.specs.read import build_spec

PROMPTS = [["licence and copyright", "a patent grant"], ["seven and eleven", "ninety times forty"]]


def lose_a_shard(model: Path) -> None:
    sorted(model.glob("model-*.safetensors"))[1].unlink()


def corrupt_a_header(model: Path) -> None:
    shard = sorted(model.glob("model-*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[8:40] = b"x" * 32
    shard.write_bytes(content)


def cut_a_shard_off(model: Path) -> None:
    shard = sorted(model.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [lose_a_shard, corrupt_a_header, cut_a_shard_off])
@pytest.mark.parametrize("gate_mode", ["random", "fitted"])
def test_a_damaged_expert_is_refused_by_field(
    damage: Any, gate_mode: str, tmp_path: Path, tiny_llama: Any, home: Path
) -> None:
    base = tiny_llama(tmp_path / "base")
    other = tiny_llama(tmp_path / "other", seed=1, max_shard_size="200KB")
    damage(other)
    with pytest.raises(CorruptCheckpoint) as caught:
        run_locally("byo-moe", request(base, other, gate_mode=gate_mode), within(home, tmp_path))
    assert caught.value.field == "experts[1].source_model"
    assert left_behind(home) == []


def test_a_failed_job_leaves_nothing_behind(tmp_path: Path, tiny_llama: Any, home: Path) -> None:
    base, other = tiny_llama(tmp_path / "base"), tiny_llama(tmp_path / "other", seed=1)
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].fill_(float("nan"))
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    for mode in ("hidden", "fitted", "random"):
        spec = request(base, other, gate_mode=mode, name="half", evaluate=True)
        job = run_locally("byo-moe", spec, within(home, tmp_path))
        assert job.status is Status.FAILED, mode
        assert job.error is not None
        assert job.error["code"] == "corrupt_checkpoint"
        assert "not finite" in job.error["detail"]
        assert left_behind(home) == []


def test_a_disk_that_is_too_small_is_seen_before_any_work(
    tmp_path: Path, tiny_llama: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_llama(tmp_path / "base")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(InsufficientDisk, match=r"1\.0 MB are free"):
        run_locally("byo-moe", request(base, base, gate_mode="fitted"), within(home, tmp_path))
    assert left_behind(home) == []


def request(base: Path, other: Path, **fields: Any) -> MoESpec:
    experts = [{"source_model": str(p), "positive_prompts": PROMPTS[i]} for i, p in enumerate((base, other))]
    defaults = {"chunks": 2, "seqlen": 16, "evaluate": False}
    return build_spec(MoESpec, {"base_model": str(base), "experts": experts, **defaults, **fields})


def within(home: Path, root: Path) -> Settings:
    return Settings(home=home, allowed_roots=(root,))


def left_behind(home: Path) -> list[str]:
    """Return what is in the registry and in workspaces, hidden files included."""
    places = (home / "models", home / "workspaces")
    # The registry's lock says nothing of a model.
    return [
        str(path.relative_to(home))
        for place in places
        if place.is_dir()
        for path in place.rglob("*")
        if path.name not in (".lock",) and path.suffix != ".lock"
    ]
