"""The header parser agrees with the safetensors library, and no file makes it fail in any way but one."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from aidocks.checkpoints.dtypes import DTYPE_BITS, from_torch, to_torch
from aidocks.checkpoints.header import MAX_HEADER_BYTES, TensorEntry, build_header, read_header
from aidocks.errors import CorruptCheckpoint

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.int16, torch.float16,
    torch.bfloat16, torch.int32, torch.float32, torch.int64, torch.float64,
]  # fmt: skip

names = st.text(min_size=1, max_size=30).filter(lambda name: name != "__metadata__" and _encodable(name))
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
tensor_maps = st.dictionaries(names, st.tuples(st.sampled_from(DTYPES), shapes), max_size=6)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def write_file(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=tensor_maps, metadata=st.dictionaries(names, names, max_size=3))
def test_reads_what_the_library_wrote(
    tmp_path: Path, tensors: dict[str, Any], metadata: dict[str, str]
) -> None:
    path = tmp_path / "model.safetensors"
    written = {name: torch.zeros(shape).to(dtype) for name, (dtype, shape) in tensors.items()}
    save_file(written, path, metadata or None)
    entries, found_metadata = read_header(path)
    assert found_metadata == metadata
    assert set(entries) == set(written)
    for name, tensor in written.items():
        found = entries[name]
        assert to_torch(found.dtype) == tensor.dtype
        assert from_torch(tensor.dtype) == found.dtype
        assert found.shape == tuple(tensor.shape)
        assert found.nbytes == tensor.numel() * tensor.element_size()
        assert found.numel == tensor.numel()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=tensor_maps, metadata=st.dictionaries(names, names, max_size=3))
def test_the_library_reads_what_we_wrote(
    tmp_path: Path, tensors: dict[str, Any], metadata: dict[str, str]
) -> None:
    path, position, layout = tmp_path / "ours.safetensors", 0, {}
    for name, (dtype, shape) in tensors.items():
        size = torch.zeros(shape).to(dtype).nbytes
        layout[name] = (from_torch(dtype), shape, position, position + size)
        position += size
    header = build_header(layout, metadata)
    path.write_bytes(header + bytes(position))
    assert len(header) % 8 == 0
    with safe_open(path, "pt") as weights:
        assert set(weights.keys()) == set(tensors)
        assert (weights.metadata() or {}) == metadata
        for name, (dtype, shape) in tensors.items():
            assert weights.get_tensor(name).dtype == dtype
            assert tuple(weights.get_tensor(name).shape) == shape
    assert list(read_header(path)[0].values()) == [
        TensorEntry(name, dtype, shape, path, len(header) + begin, len(header) + end)
        for name, (dtype, shape, begin, end) in sorted(layout.items(), key=lambda item: item[1][2:])
    ]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 1 << 70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
near_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPE_BITS, "F33", ""]) | json_values,
        "shape": st.lists(st.integers(-1, 5), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | json_values,
    }
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.dictionaries(
        st.text(max_size=8) | st.just("__metadata__"), near_entries | json_values, max_size=3
    ),
    data=st.binary(max_size=40),
)
def test_whatever_is_accepted_the_library_accepts_too(
    tmp_path: Path, header: dict[str, Any], data: bytes
) -> None:
    check_against_library(write_file(tmp_path / "odd.safetensors", header, data))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 500), st.binary(min_size=1, max_size=3)), min_size=1, max_size=4),
    cut=st.none() | st.integers(0, 500),
)
def test_damaged_files_are_refused_or_read_as_the_library_reads_them(
    tmp_path: Path, edits: list[tuple[int, bytes]], cut: int | None
) -> None:
    sound = tmp_path / "sound.safetensors"
    if not sound.exists():
        save_file({"a": torch.ones(3), "b.weight": torch.ones(2, 4, dtype=torch.bfloat16)}, sound, {"k": "v"})
    content = bytearray(sound.read_bytes())
    for position, replacement in edits:
        position %= len(content)
        content[position : position + len(replacement)] = replacement
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(bytes(content[:cut]))
    check_against_library(damaged)


def check_against_library(path: Path) -> None:
    """Ours may refuse more than the library (duplicate keys, for one), never less, and only in one way."""
    try:
        entries, _ = read_header(path)
    except CorruptCheckpoint:
        return
    with safe_open(path, "np") as weights:
        assert set(weights.keys()) == set(entries)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=64))
def test_arbitrary_bytes_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "noise.safetensors"
    path.write_bytes(content)
    check_against_library(path)


@pytest.mark.parametrize(
    ("header", "data", "flaw"),
    [
        ({"w": entry("F31")}, bytes(8), "tensor w in bad.safetensors: its dtype 'F31' is unknown"),
        ({"w": entry(shape=(3,))}, bytes(8), "needs 12 bytes, but spans 8"),
        ({"w": entry(shape=(-2,))}, bytes(8), "is not a list of sizes"),
        ({"w": entry(shape=(True, 2))}, bytes(8), "is not a list of sizes"),
        ({"w": entry(shape=(2.0,))}, bytes(8), "is not a list of sizes"),
        ({"w": entry(offsets=(8, 0))}, bytes(8), "are not [begin, end]"),
        ({"w": entry(offsets=(0, 8, 16))}, bytes(8), "are not [begin, end]"),
        ({"w": {"dtype": "F32", "shape": [2]}}, bytes(8), "is described by something other"),
        ({"w": entry() | {"extra": 1}}, bytes(8), "is described by something other"),
        ({"w": 5}, b"", "is described by something other"),
        ({"v": entry(), "w": entry(offsets=(4, 12))}, bytes(12), "tensor w in bad.safetensors: its data ov"),
        ({"v": entry(), "w": entry(offsets=(12, 20))}, bytes(20), "tensor w in bad.safetensors: its data l"),
        ({"w": entry(offsets=(4, 12))}, bytes(12), "leaves a hole"),
        ({"w": entry()}, bytes(7), "ends at byte"),
        ({"w": entry()}, bytes(9), "1 bytes at its end belong to no tensor"),
        ({"w": entry("F4", (3,), (0, 1))}, bytes(1), "needs 3/2 bytes"),
        ({"w": entry(shape=(1 << 62, 1 << 62), offsets=(0, 0))}, b"", "bytes, but spans 0"),
        ({"w": entry(shape=(1 << 64,))}, bytes(8), "is not a list of sizes"),
        ({"__metadata__": {"format": 1}}, b"", "__metadata__ is not a map of strings"),
        ({"__metadata__": ["pt"]}, b"", "__metadata__ is not a map of strings"),
        (b"[1]", b"", "does not begin with '{'"),
        (b" {}", b"", "does not begin with '{'"),
        (b"", b"", "does not begin with '{'"),
        (b'{"a": 1', b"", "is not JSON"),
        (b'{"\xff": 1}', b"", "is not JSON"),
        (b'{"w": NaN}', b"", "NaN"),
        (b"{" + b'"a":[' * 100_000, b"", "is not JSON"),
        (b'{"w": ' + b"9" * 10_000 + b"}", b"", "is not JSON"),
        (
            b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
            b'"w":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}',
            b"0",
            "the key w occurs twice",
        ),
    ],
)  # fmt: skip
def test_every_broken_invariant_is_named(tmp_path: Path, header: Any, data: bytes, flaw: str) -> None:
    with pytest.raises(CorruptCheckpoint) as caught:
        read_header(write_file(tmp_path / "bad.safetensors", header, data))
    assert flaw in caught.value.message
    assert "bad.safetensors" in caught.value.message


def test_lengths_are_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "bomb.safetensors"
    path.write_bytes(b"123")
    with pytest.raises(CorruptCheckpoint, match="it has 3 bytes"):
        read_header(path)
    path.write_bytes(struct.pack("<Q", 1 << 63) + b"{}")
    with pytest.raises(CorruptCheckpoint, match=f"above the limit of {MAX_HEADER_BYTES}"):
        read_header(path)
    path.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES) + b"{}")
    with pytest.raises(CorruptCheckpoint, match="but the file has only 10"):
        read_header(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match=r"gone\.safetensors: it cannot be read"):
        read_header(tmp_path / "gone.safetensors")


def test_an_empty_file_of_tensors_is_sound(tmp_path: Path) -> None:
    assert read_header(write_file(tmp_path / "empty.safetensors", {})) == ({}, {})


def test_empty_tensors_and_scalars_have_their_place(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"none": torch.empty(0, 5), "one": torch.tensor(3.0)}, path)
    entries, _ = read_header(path)
    assert (entries["none"].numel, entries["none"].nbytes) == (0, 0)
    assert (entries["one"].numel, entries["one"].nbytes) == (1, 4)


def test_names_that_nobody_needs_are_refused(tmp_path: Path) -> None:
    longest = write_file(tmp_path / "longest.safetensors", {"n" * 512: entry()}, bytes(8))
    assert list(read_header(longest)[0]) == ["n" * 512]
    longer = write_file(tmp_path / "longer.safetensors", {"n" * 513: entry()}, bytes(8))
    with pytest.raises(CorruptCheckpoint, match="513 characters, more than 512"):
        read_header(longer)
