"""PyTorch files: tensors are read, and nothing that they say is done."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aidocks.checkpoints.pickles import is_pickled, pickle_files, read_pickle
from aidocks.checkpoints.reader import Checkpoint
from aidocks.errors import CorruptCheckpoint, InsufficientDisk, UnsafeCheckpoint
from aidocks.models.converting import ConvertPickles, conversions
from aidocks.models.resolve import ModelResolver
from aidocks.plan import UnitContext


class Malicious:
    """An object that, unpickled, runs a command."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._marker}",)


def convert(source: Path, tmp_path: Path) -> Checkpoint:
    unit = ConvertPickles(source=source, directory=tmp_path / "converted", field="models[0].model")
    unit = ConvertPickles.model_validate_json(unit.model_dump_json())
    written = unit.run(UnitContext(tmp_path))
    assert {file.path for file in written.files} == set((tmp_path / "converted").iterdir())
    return Checkpoint(tmp_path / "converted")


def save(directory: Path, tensors: dict[str, Any], config: dict[str, Any] | None = None) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    (directory / "tokenizer.json").write_text("{}")
    torch.save(tensors, directory / "pytorch_model.bin")
    return directory


def test_a_file_becomes_safetensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = torch.randn(6, 4)
    tensors = {
        "a.weight": torch.randn(3, 4, dtype=torch.bfloat16),
        "b.weight": torch.nn.Parameter(whole[::2]),  # a part of a larger memory, with strides of its own
        "c.weight": whole.mT,
        "position_ids": torch.arange(5),
        "scale": torch.tensor(2.5, dtype=torch.float64),
    }
    source = save(tmp_path / "source", tensors)
    assert is_pickled(source)
    checkpoint = convert(source, tmp_path)
    assert set(checkpoint.entries) == set(tensors)
    for name, value in tensors.items():
        assert checkpoint.tensor(name).dtype == value.dtype
        assert torch.equal(checkpoint.tensor(name), value)
    assert (tmp_path / "converted" / "tokenizer.json").read_text() == "{}"
    assert not is_pickled(tmp_path / "converted")


@pytest.mark.parametrize("tied", [True, False])
def test_tensors_that_are_the_same_memory_are_stored_once_where_the_model_shares_them(
    tmp_path: Path, tied: bool
) -> None:
    embedding = torch.randn(8, 4)
    tensors = {"lm_head.weight": embedding, "model.embed_tokens.weight": embedding}
    source = save(tmp_path / "source", tensors, {"tie_word_embeddings": tied})
    names = set(convert(source, tmp_path).entries)
    assert names == ({"model.embed_tokens.weight"} if tied else set(tensors))


def test_several_files_with_their_index(tmp_path: Path) -> None:
    source = save(tmp_path / "source", {})
    (source / "pytorch_model.bin").unlink()
    parts = [{"a.weight": torch.randn(2, 3)}, {"b.weight": torch.randn(3), "left.over": torch.zeros(1)}]
    for number, part in enumerate(parts, 1):
        torch.save(part, source / f"pytorch_model-0000{number}-of-00002.bin")
    places = {
        "a.weight": "pytorch_model-00001-of-00002.bin",
        "b.weight": "pytorch_model-00002-of-00002.bin",
    }
    index = source / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    checkpoint = convert(source, tmp_path)
    assert set(checkpoint.entries) == {"a.weight", "b.weight"}
    assert len(checkpoint.weight_files) == 2
    assert torch.equal(checkpoint.tensor("b.weight"), parts[1]["b.weight"])
    index.write_text(json.dumps({"weight_map": places | {"c.weight": "pytorch_model-00001-of-00002.bin"}}))
    with pytest.raises(CorruptCheckpoint, match=r"does not hold the tensor c\.weight") as caught:
        convert(source, tmp_path)
    assert caught.value.field == "models[0].model"


@pytest.mark.parametrize(
    "name", ["../pytorch_model.bin", "/etc/passwd.bin", "a/b.bin", ".hidden.bin", 7, "x.pt"]
)
def test_an_index_leads_nowhere_else(tmp_path: Path, name: Any) -> None:
    source = save(tmp_path / "source", {})
    (source / "pytorch_model.bin").unlink()
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CorruptCheckpoint, match="not the name of a weight file"):
        pickle_files(source)


def test_a_malicious_file_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    source = save(tmp_path / "source", {"a.weight": torch.zeros(2), "b": Malicious(marker)})
    with pytest.raises(
        UnsafeCheckpoint, match=r"pytorch_model\.bin of source holds more than tensors"
    ) as caught:
        convert(source, tmp_path)
    assert caught.value.field == "models[0].model"
    assert not marker.exists()
    # It is what it claims to be: a plain load of the same bytes runs the command.
    torch.load(source / "pytorch_model.bin", weights_only=False)
    assert marker.exists()


def test_files_of_the_old_form_are_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    old, plain = tmp_path / "old.bin", tmp_path / "plain.bin"
    torch.save({"a": torch.zeros(1)}, old, _use_new_zipfile_serialization=False)
    plain.write_bytes(pickle.dumps(Malicious(marker)))
    for path in (old, plain):
        with pytest.raises(UnsafeCheckpoint, match=r"before version 1\.6") as caught:
            read_pickle(path)
        assert caught.value.hint
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [{"model": {"a": torch.zeros(1)}}, [torch.zeros(1)], {"step": 3}, {1: torch.zeros(1)}, {}],
    ids=["training", "list", "number", "no-name", "nothing"],
)
def test_what_is_no_weights_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsafeCheckpoint, match="no file of weights"):
        read_pickle(tmp_path / "pytorch_model.bin")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(CorruptCheckpoint, match=r"pytorch_model\.bin of .* cannot be read"):
        read_pickle(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "world")
    with pytest.raises(CorruptCheckpoint, match=r"pytorch_model\.bin of .* cannot be read"):
        read_pickle(path)


def test_only_models_that_need_it_are_converted_and_each_once(tmp_path: Path) -> None:
    source = save(tmp_path / "source", {"a.weight": torch.ones(2, 2)})
    plain = convert(source, tmp_path).path
    resolver = ModelResolver(tmp_path / "models", [tmp_path])
    references = {"base_model": str(source), "models[0].model": str(plain), "models[1].model": str(source)}
    places, units = conversions(references, resolver, tmp_path / "workspace")
    assert set(places) == {str(source)}
    assert places[str(source)].name == "source"
    (unit,) = units
    assert unit.directory == places[str(source)]
    with pytest.raises(UnsafeCheckpoint):
        resolver.open(str(source), field="base_model")


def test_a_small_file_does_not_become_a_large_one(tmp_path: Path) -> None:
    source = save(tmp_path / "source", {"a.weight": torch.zeros(1).expand(1000, 1000)})
    with pytest.raises(CorruptCheckpoint, match=r"'a\.weight' has 4000000 bytes, and holds 4 of them"):
        convert(source, tmp_path)
    free = shutil.disk_usage(tmp_path).free
    whole = torch.zeros(1 << 20)
    many = {f"{number}": whole for number in range(20)}
    source = save(tmp_path / "many", many)
    (unit,) = conversions({"a": str(source)}, ModelResolver(tmp_path, [tmp_path]), tmp_path)[1]
    assert whole.nbytes < unit.nbytes < 2 * whole.nbytes
    with pytest.MonkeyPatch.context() as patch:
        usage = SimpleNamespace(free=min(free, 10 * whole.nbytes))
        patch.setattr("aidocks.checkpoints.space.shutil.disk_usage", lambda _: usage)
        with pytest.raises(InsufficientDisk):
            convert(source, tmp_path)


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(tR.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x01K\x01K\x01tR.",
        b"\x80\x02K\x01Q.",
        b"\x80\x02}q\x00(",
        b"\x80\x02\xff",
        b"",
        b"\x80\x020.",
        b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b".",
    ],
    ids=["nothing", "numbers", "place", "cut-off", "unknown", "empty", "pop", "deep"],
)
def test_programs_that_nobody_meant_are_refused(tmp_path: Path, program: bytes) -> None:
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    with pytest.raises((CorruptCheckpoint, UnsafeCheckpoint), match=r"pytorch_model\.bin of"):
        read_pickle(path)


@pytest.mark.parametrize("name", ["", "__metadata__", "a\n", "a\ud800"])
def test_names_that_no_file_can_have_are_refused(tmp_path: Path, name: str) -> None:
    torch.save({name: torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsafeCheckpoint, match="a tensor called"):
        read_pickle(tmp_path / "pytorch_model.bin")
