"""Checkpoints that try to run code, to read other files, or to exhaust the reader."""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from aidocks.checkpoints.header import MAX_HEADER_BYTES, read_header
from aidocks.checkpoints.reader import Checkpoint
from aidocks.errors import AIDocksError, CorruptCheckpoint, UnsafeCheckpoint
from aidocks.models.registry import Registry

INDEX = "model.safetensors.index.json"


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def model(tiny_llama: Callable[..., Path], tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "model")


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "model.pt",
        "model.pth",
        "model.ckpt",
        "weights.pkl",
        "pytorch_model-00001-of-00002.bin",
    ],
)
def test_pickles_are_refused_and_never_loaded(model: Path, tmp_path: Path, name: str) -> None:
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(UnsafeCheckpoint, match=name):
        Checkpoint(model)
    with pytest.raises(UnsafeCheckpoint, match=name):
        Registry(tmp_path / "models").import_checkpoint("m", model)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_under_a_safe_name_is_only_damaged(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors"):
        Checkpoint(model)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_beside_sound_weights_is_ignored_and_left_behind(model: Path, tmp_path: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    (model / "training_args.bin").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    info = Registry(tmp_path / "models").import_checkpoint("m", model)
    assert not list(info.path.glob("*.bin"))
    assert not (tmp_path / "ran").exists()


def test_code_in_the_checkpoint_is_neither_run_nor_copied(model: Path, tmp_path: Path) -> None:
    (model / "modeling_evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "modeling_evil.Evil"}}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsafeCheckpoint, match="auto_map"):
        Checkpoint(model)
    config["model_type"] = "llama"
    (model / "config.json").write_text(json.dumps(config))
    info = Registry(tmp_path / "models").import_checkpoint("m", model)
    assert not (info.path / "modeling_evil.py").exists()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "shard",
    ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "./x.safetensors",
     "a\\b.safetensors",
     ".hidden.safetensors", "x.safetensors\0", "x.bin", "config.json", "x" * 300 + ".safetensors",
     "file:///x.safetensors", None, 5, ["x.safetensors"], {"a": 1}],
)  # fmt: skip
def test_an_index_cannot_name_files_elsewhere(model: Path, tmp_path: Path, shard: object) -> None:
    (tmp_path / "secret.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    (model / "model.safetensors").unlink()
    (model / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    with pytest.raises(CorruptCheckpoint, match=r"index\.json") as caught:
        Checkpoint(model)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES, MAX_HEADER_BYTES + 1, 1 << 40, (1 << 64) - 1])
def test_a_length_alone_allocates_nothing(tmp_path: Path, length: int) -> None:
    path = tmp_path / "bomb.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorruptCheckpoint):
        read_header(path)
    assert time.perf_counter() - begin < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000


@pytest.mark.parametrize("filling", [b"\0", b"["])
def test_a_header_of_the_full_size_that_is_no_object(tmp_path: Path, filling: bytes) -> None:
    path = tmp_path / "bomb.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", MAX_HEADER_BYTES) + filling * 1000)
        stream.truncate(8 + MAX_HEADER_BYTES)
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorruptCheckpoint, match="does not begin"):
        read_header(path)
    assert time.perf_counter() - begin < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}",
        b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
        b'{"a":{"dtype":"U8","shape":[' + b"1," * 500_000 + b'1],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[' + b"9223372036854775807," * 2_000 + b'1],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"F64","shape":[],"data_offsets":[0,' + b"9" * 100_000 + b"]}}",
        b'{"' + b"n" * 2_000_000 + b'":1}',
        b'{"a":{"dtype":"' + b"D" * 2_000_000 + b'","shape":[],"data_offsets":[0,0]}}',
    ],
    ids=[
        "nested lists",
        "nested objects",
        "many axes",
        "huge product",
        "huge offset",
        "long name",
        "long dtype",
    ],
)
def test_headers_that_exhaust_a_naive_reader(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "bomb.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    begin = time.perf_counter()
    with pytest.raises(CorruptCheckpoint) as caught:
        read_header(path)
    assert time.perf_counter() - begin < 10
    assert len(str(caught.value)) < 1000


def test_a_tensor_that_claims_more_than_the_file(model: Path) -> None:
    header = b'{"w":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(CorruptCheckpoint, match="tensor w"):
        Checkpoint(model)


def test_a_file_that_shrinks_after_it_was_checked(model: Path) -> None:
    checkpoint = Checkpoint(model)
    last = max(checkpoint.entries.values(), key=lambda entry: entry.end)
    os.truncate(model / "model.safetensors", last.end - 1)
    with pytest.raises(CorruptCheckpoint, match="has become shorter"):
        checkpoint.tensor(last.name)


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_bombs_beside_the_weights(model: Path, name: str) -> None:
    if name == INDEX:
        (model / "model.safetensors").unlink()
    (model / name).write_bytes(b'{"a":' + b"[" * 1_000_000)
    with pytest.raises(CorruptCheckpoint, match=name):
        Checkpoint(model)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_files_that_never_answer_are_not_waited_for(model: Path, tmp_path: Path, name: str) -> None:
    """A named pipe in place of a file would block its reader forever."""
    (model / name).unlink()
    os.mkfifo(model / name)
    code = (
        "import sys; from pathlib import Path; from aidocks.errors import AIDocksError;"
        "from aidocks.models.registry import Registry\n"
        "try: Registry(Path(sys.argv[2])).import_checkpoint('m', Path(sys.argv[1]))\n"
        "except AIDocksError as error: print(error)"
    )
    subprocess.run([sys.executable, "-c", code, model, tmp_path / "models"], check=True, timeout=60)


def test_errors_name_no_other_directory(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").write_bytes(b"short")
    with pytest.raises(AIDocksError) as caught:
        Checkpoint(model)
    assert str(tmp_path) not in str(caught.value)
