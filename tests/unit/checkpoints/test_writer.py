"""Shards are what was planned, byte for byte what the library reads back, and there whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from aidocks.checkpoints import files
from aidocks.checkpoints.dtypes import from_torch
from aidocks.checkpoints.header import read_header
from aidocks.checkpoints.reader import Checkpoint
from aidocks.checkpoints.space import format_bytes, require_space
from aidocks.checkpoints.writer import (
    ShardPlan,
    ShardWriter,
    TensorPlan,
    parse_size,
    plan_shards,
    write_index,
)
from aidocks.errors import CorruptCheckpoint, InsufficientDisk, InvalidSpec


def plan_of(tensors: dict[str, torch.Tensor], file_name: str = "model.safetensors") -> ShardPlan:
    planned = [
        TensorPlan(name=n, dtype=from_torch(t.dtype), shape=tuple(t.shape)) for n, t in tensors.items()
    ]
    return ShardPlan(file_name=file_name, tensors=tuple(planned))


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "flags": torch.tensor([True, False, True]),
        "w": torch.randn(5, 7).to(torch.bfloat16),
        "eight": torch.randn(3, 3).to(torch.float8_e4m3fn),
        "ids": torch.arange(4),
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 3),
        "turned": torch.randn(4, 6).t(),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    as_bytes = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)


def test_the_library_reads_back_what_was_written_in_any_order(tmp_path: Path) -> None:
    tensors = some_tensors()
    with ShardWriter(tmp_path / "new", plan_of(tensors)) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    path = tmp_path / "new" / "model.safetensors"
    found = load_file(path)
    assert set(found) == set(tensors)
    assert all(same(found[name], tensors[name]) for name in tensors)
    assert writer.output.path == path
    assert writer.output.bytes == path.stat().st_size
    assert writer.output.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]
    entries, metadata = read_header(path)
    assert metadata == {"format": "pt"}
    assert all(entry.begin % 8 == 0 or entry.dtype not in ("I64", "F64") for entry in entries.values())


def test_the_order_of_writing_does_not_show(tmp_path: Path) -> None:
    tensors = some_tensors()
    contents = []
    for order in (list(tensors), sorted(tensors), list(reversed(tensors))):
        with ShardWriter(tmp_path, plan_of(tensors)) as writer:
            for name in order:
                writer.write(name, tensors[name])
        contents.append((tmp_path / "model.safetensors").read_bytes())
    assert len(set(contents)) == 1


@pytest.mark.parametrize("reverse", [False, True])
def test_copies_are_the_same_bytes(tmp_path: Path, reverse: bool, tiny_llama: Callable[..., Path]) -> None:
    source = Checkpoint(tiny_llama(tmp_path / "source", dtype=torch.bfloat16))
    plan = ShardPlan(
        file_name="model.safetensors",
        tensors=tuple(TensorPlan(name=e.name, dtype=e.dtype, shape=e.shape) for e in source.entries.values()),
    )
    with ShardWriter(tmp_path / "copy", plan) as writer:
        for name, entry in sorted(source.entries.items(), reverse=reverse):
            writer.copy(name, entry)
    expected = load_file(tmp_path / "source" / "model.safetensors")
    found = load_file(tmp_path / "copy" / "model.safetensors")
    assert all(same(found[name], expected[name]) for name in expected)
    content = (tmp_path / "copy" / "model.safetensors").read_bytes()
    assert writer.output.sha256 == hashlib.sha256(content).hexdigest()


def test_a_source_that_shrinks_is_named_and_nothing_remains(
    tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    source = Checkpoint(tiny_llama(tmp_path / "source"))
    entry = max(source.entries.values(), key=lambda entry: entry.end)
    os.truncate(entry.file, entry.end - 3)
    plan = ShardPlan(
        file_name="m.safetensors", tensors=(TensorPlan(name="w", dtype=entry.dtype, shape=entry.shape),)
    )
    with (
        pytest.raises(CorruptCheckpoint, match=r"model\.safetensors ended"),
        ShardWriter(tmp_path / "out", plan) as writer,
    ):
        writer.copy("w", entry)
    assert not list((tmp_path / "out").iterdir())


def test_sizes_that_cannot_be_reserved_are_still_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no such thing here")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    tensors = some_tensors()
    with ShardWriter(tmp_path, plan_of(tensors)) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    assert set(load_file(tmp_path / "model.safetensors")) == set(tensors)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_a_full_disk_is_explained_and_nothing_remains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuse)
    tensors = some_tensors()
    with (
        pytest.raises(InsufficientDisk, match=r"model\.safetensors needs") as caught,
        ShardWriter(tmp_path, plan_of(tensors)) as writer,
    ):
        writer.write("w", tensors["w"])
    assert caught.value.hint
    assert not list(tmp_path.iterdir())


def test_a_forgotten_tensor_is_our_mistake_and_nothing_remains(tmp_path: Path) -> None:
    tensors = some_tensors()
    flags = tensors.pop("flags")
    writer = ShardWriter(tmp_path, plan_of({"flags": flags, "w": tensors["w"]}))
    with pytest.raises(AssertionError, match="never written: flags"), writer:
        writer.write("w", tensors["w"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("other", torch.ones(2), "was not planned"),
        ("w", torch.ones(5, 7), "w is F32"),
        ("w", torch.ones(7, 5, dtype=torch.bfloat16), "planned as BF16"),
    ],
)
def test_what_was_not_planned_cannot_be_written(
    tmp_path: Path, name: str, tensor: torch.Tensor, says: str
) -> None:
    with pytest.raises(AssertionError, match=says), ShardWriter(tmp_path, plan_of(some_tensors())) as writer:
        writer.write(name, tensor)
    assert not list(tmp_path.iterdir())


def test_an_error_leaves_the_file_of_before(tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    target.write_bytes(b"the one before")
    with pytest.raises(RuntimeError, match="boom"), ShardWriter(tmp_path, plan_of(some_tensors())):
        raise RuntimeError("boom")
    assert target.read_bytes() == b"the one before"
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_kill_in_the_middle_leaves_no_file_under_the_final_name(tmp_path: Path) -> None:
    code = """
import os, signal, sys, torch
from pathlib import Path
from aidocks.checkpoints.writer import *
plan = ShardPlan(file_name="model.safetensors", tensors=(TensorPlan(name="w", dtype="F32", shape=(9,)),))
with ShardWriter(Path(sys.argv[1]), plan) as writer:
    writer.write("w", torch.ones(9))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    assert done.returncode == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    assert files.UNFINISHED in leftover.name


sizes = st.lists(st.integers(0, 50), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(sizes=sizes, limit=st.integers(1, 120))
def test_plans_hold_every_tensor_once_in_order_within_the_limit(sizes: list[int], limit: int) -> None:
    tensors = [TensorPlan(name=f"t{i}", dtype="U8", shape=(size,)) for i, size in enumerate(sizes)]
    shards = plan_shards(tensors, limit)
    assert [tensor for shard in shards for tensor in shard.tensors] == tensors
    for number, shard in enumerate(shards, 1):
        assert shard.nbytes <= limit or len([t for t in shard.tensors if t.nbytes]) == 1
        if len(shards) > 1:
            assert shard.file_name == f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    if len(shards) == 1:
        assert shards[0].file_name == "model.safetensors"
    assert ShardPlan.model_validate_json(shards[0].model_dump_json()) == shards[0]


def test_files_are_about_equally_large(tmp_path: Path) -> None:
    tensors = [TensorPlan(name=f"t{i}", dtype="U8", shape=(100,)) for i in range(64)]
    assert [shard.nbytes for shard in plan_shards(tensors, 5000)] == [3200, 3200]
    # One that must stand alone leaves the others as they would be.
    large = TensorPlan(name="large", dtype="U8", shape=(9000,))
    assert [shard.nbytes for shard in plan_shards([large, *tensors], 5000)] == [9000, 3200, 3200]


@settings(max_examples=200, deadline=None)
@given(sizes=sizes, limit=st.integers(1, 120))
def test_there_are_no_more_files_than_needed(sizes: list[int], limit: int) -> None:
    filled = [[sizes[0]]]
    for size in sizes[1:]:
        if sum(filled[-1]) + size > limit:
            filled.append([])
        filled[-1].append(size)
    tensors = [TensorPlan(name=f"t{i}", dtype="U8", shape=(size,)) for i, size in enumerate(sizes)]
    assert len(plan_shards(tensors, limit)) == len(filled)


def write_sharded(directory: Path, tensors: dict[str, torch.Tensor], limit: int) -> Sequence[ShardPlan]:
    shards = plan_shards(plan_of(tensors).tensors, limit)
    for shard in shards:
        with ShardWriter(directory, shard) as writer:
            for planned in shard.tensors:
                writer.write(planned.name, tensors[planned.name])
    write_index(directory, shards)
    return shards


def test_transformers_loads_what_was_sharded(tmp_path: Path, tiny_llama: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    source = Checkpoint(tiny_llama(tmp_path / "source"))
    tensors = {name: source.tensor(name) for name in source.entries}
    shards = write_sharded(tmp_path / "out", tensors, 200_000)
    assert len(shards) > 1
    files.copy_file(source.path / "config.json", tmp_path / "out" / "config.json")
    copy = Checkpoint(tmp_path / "out")
    assert all(same(copy.tensor(name), tensor) for name, tensor in tensors.items())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == source.total_bytes
    inputs = torch.arange(8)[None]
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(path, use_safetensors=True)(inputs).logits
            for path in (source.path, tmp_path / "out")
        ]
    assert torch.equal(*logits)


def test_one_file_has_no_index(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"w": torch.ones(3)}, 100)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_small_files_appear_whole(tmp_path: Path, content: bytes) -> None:
    files.write_bytes(tmp_path / "small", content)
    assert (tmp_path / "small").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("200MB", 2 * 10**8), ("1.5 gb", 1_500_000_000), ("64MiB", 64 << 20), ("7kB", 7000),
     (123, 123), ("123", 123), ("1TB", 10**12), ("10B", 10)],
)  # fmt: skip
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "0", "0GB", "-5GB", "5XB", "5 5GB", "1e9", "NaN", -3, "5GBs", "٥GB"]
)
def test_what_is_no_size_is_named(text: str | int) -> None:
    with pytest.raises(InvalidSpec) as caught:
        parse_size(text)
    assert repr(text) in caught.value.message
    assert caught.value.field == "max_shard_size"


def test_space_is_asked_of_a_directory_that_is_not_there_yet(tmp_path: Path) -> None:
    require_space(tmp_path / "a" / "b", 1)
    with pytest.raises(InsufficientDisk) as caught:
        require_space(tmp_path / "a" / "b", 10**18)
    assert "1000000.0 TB are needed" in caught.value.message
    assert "are free" in caught.value.message


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (999_960, "1.0 MB"), (1_500_000_000, "1.5 GB"),
     (2 * 10**12, "2.0 TB")],
)  # fmt: skip
def test_bytes_for_people(count: int, text: str) -> None:
    assert format_bytes(count) == text
