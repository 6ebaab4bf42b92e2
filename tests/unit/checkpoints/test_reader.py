"""Opening checkpoints: every layout of transformers, every contradiction named, nothing unsafe."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aidocks.checkpoints.layout import weights_present
from aidocks.checkpoints.reader import Checkpoint
from aidocks.errors import CorruptCheckpoint, NotFound, UnknownModel, UnsafeCheckpoint

INDEX = "model.safetensors.index.json"


@pytest.fixture
def single(tiny_llama: Callable[..., Path], tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "single")


@pytest.fixture
def sharded(tiny_llama: Callable[..., Path], tmp_path: Path) -> Path:
    directory = tiny_llama(tmp_path / "sharded", max_shard_size="300KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    return directory


def edit_index(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index)
    (directory / INDEX).write_text(json.dumps(index))


def edit_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_reads_every_tensor_as_the_library_does(layout: str, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(layout)
    checkpoint = Checkpoint(directory)
    expected: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        expected |= load_file(file)
    assert set(checkpoint.entries) == set(expected)
    for name, tensor in expected.items():
        found = checkpoint.tensor(name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
    assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in expected.values())
    assert checkpoint.config["model_type"] == "llama"


def test_opening_loads_no_torch(single: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from aidocks.checkpoints.reader import Checkpoint;"
        "Checkpoint(Path(sys.argv[1])); assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, single], check=True)


def test_tensors_can_be_read_from_many_threads(sharded: Path) -> None:
    expected = {name: Checkpoint(sharded).tensor(name).clone() for name in Checkpoint(sharded).entries}
    checkpoint, wrong = Checkpoint(sharded), []
    gate = threading.Barrier(8)

    def read() -> None:
        gate.wait()
        wrong.extend(name for name in expected if not torch.equal(checkpoint.tensor(name), expected[name]))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_changing_a_tensor_never_changes_the_file(single: Path) -> None:
    before = (single / "model.safetensors").read_bytes()
    name = next(iter(Checkpoint(single).entries))
    Checkpoint(single).tensor(name).zero_()
    assert (single / "model.safetensors").read_bytes() == before
    assert Checkpoint(single).tensor(name).any()


def test_tensors_outlive_their_checkpoint_and_their_file(single: Path) -> None:
    name = next(iter(Checkpoint(single).entries))
    expected = Checkpoint(single).tensor(name).clone()
    tensor = Checkpoint(single).tensor(name)
    shutil.rmtree(single)
    assert torch.equal(tensor, expected)


def test_unaligned_data_scalars_and_empty_tensors(single: Path) -> None:
    from aidocks.checkpoints.header import build_header

    header = build_header({"odd": ("U8", (3,), 0, 3), "w": ("F32", (2,), 3, 11), "one": ("I64", (), 11, 19),
                           "none": ("F32", (0, 4), 19, 19)}, {})  # fmt: skip
    data = bytes([1, 2, 3]) + torch.tensor([1.5, -2.0]).numpy().tobytes() + (7).to_bytes(8, "little")
    (single / "model.safetensors").write_bytes(header + data)
    checkpoint = Checkpoint(single)
    assert checkpoint.tensor("w").tolist() == [1.5, -2.0]
    assert checkpoint.tensor("one").item() == 7
    assert checkpoint.tensor("none").shape == (0, 4)
    assert checkpoint.tensor("odd").tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.bool, torch.int64]
)
def test_stored_types_are_kept(single: Path, dtype: torch.dtype) -> None:
    stored = torch.tensor([0.0, 1.0, -1.0]).to(dtype)
    save_file({"w": stored}, single / "model.safetensors")
    found = Checkpoint(single).tensor("w")
    assert found.dtype == dtype
    assert torch.equal(found.float(), stored.float())


def test_asking_for_a_tensor_that_is_not_there(single: Path) -> None:
    with pytest.raises(NotFound, match=r"has no tensor 'model\.none'"):
        Checkpoint(single).tensor("model.none")


def test_metadata_files_are_what_belongs_beside_new_weights(single: Path) -> None:
    travels = {"chat_template.jinja", "LICENSE", "merges.txt", "tokenizer.model"}
    stays = {"README.md", "pytorch_model.bin", "modeling_x.py", "trainer_state.json", ".gitattributes", INDEX}
    for name in travels | stays | {"aidocks.json", "model.gguf"}:
        (single / name).write_text("x")
    (single / "original").mkdir()
    found = {path.name for path in Checkpoint(single).metadata_files()}
    assert found == travels | {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}


@pytest.mark.parametrize(
    ("change", "flaw"),
    [
        (lambda index: index["weight_map"].update(ghost=next(iter(index["weight_map"].values()))),
         "does not hold the tensor ghost"),
        (lambda index: index["weight_map"].update(ghost="model-9.safetensors"),
         "model-9.safetensors that it names is missing"),
        (lambda index: index["weight_map"].pop("model.norm.weight"), "holds the tensor model.norm.weight, w"),
        (lambda index: index.pop("weight_map"), "it has no weight_map"),
        (lambda index: index.update(weight_map={}), "it has no weight_map"),
        (lambda index: index.update(weight_map=["a"]), "it has no weight_map"),
        (lambda index: index["weight_map"].update(ghost=5), "'5' is not the name of a weight file"),
    ],
)  # fmt: skip
def test_an_index_that_contradicts_its_shards(sharded: Path, change: Any, flaw: str) -> None:
    edit_index(sharded, change)
    with pytest.raises(CorruptCheckpoint) as caught:
        Checkpoint(sharded)
    assert flaw in caught.value.message
    assert "sharded" in caught.value.message


def test_a_missing_shard_is_named(sharded: Path) -> None:
    lost = sorted(sharded.glob("model-*.safetensors"))[1]
    assert weights_present(sharded)
    lost.unlink()
    assert not weights_present(sharded)
    with pytest.raises(CorruptCheckpoint, match=lost.name):
        Checkpoint(sharded)


def test_a_shard_that_was_cut_off_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(CorruptCheckpoint, match=shard.name):
        Checkpoint(sharded)


@pytest.mark.parametrize("content", ["{", "[]", "null", "\udcff"])
def test_a_broken_configuration_is_named(single: Path, content: str) -> None:
    (single / "config.json").write_text(content, errors="surrogateescape")
    with pytest.raises(CorruptCheckpoint, match=r"config\.json"):
        Checkpoint(single)


def test_weights_without_configuration(single: Path) -> None:
    (single / "config.json").unlink()
    assert not weights_present(single)
    with pytest.raises(CorruptCheckpoint, match=r"no config\.json"):
        Checkpoint(single)


def test_there_is_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match="no model directory"):
        Checkpoint(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UnknownModel, match="no model directory"):
        Checkpoint(tmp_path / "file")


@pytest.mark.parametrize(
    ("files", "kind", "says"),
    [
        ([], UnknownModel, "holds no weights"),
        (["config.json", "model.gguf"], UnknownModel, "only as model.gguf"),
        (["adapter_config.json", "adapter_model.safetensors"], UnknownModel, "is an adapter"),
        (["config.json", "pytorch_model.bin"], UnsafeCheckpoint, "only as pytorch_model.bin"),
        (["config.json", "model.pt"], UnsafeCheckpoint, "only as model.pt"),
        (["config.json", "model.pth"], UnsafeCheckpoint, "only as model.pth"),
        (["config.json", "last.ckpt"], UnsafeCheckpoint, "only as last.ckpt"),
        (["config.json", "weights.pkl"], UnsafeCheckpoint, "only as weights.pkl"),
    ],
)
def test_directories_without_safetensors(tmp_path: Path, files: list[str], kind: type, says: str) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(kind, match=says) as caught:
        Checkpoint(tmp_path)
    assert caught.value.hint


def test_code_of_its_own_is_refused_unless_transformers_has_the_model(single: Path) -> None:
    auto_map = {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    edit_config(single, auto_map=auto_map)
    assert Checkpoint(single).config["auto_map"] == auto_map
    for model_type in ["brand_new", None, 5, "../llama", "llama/../llama", ""]:
        edit_config(single, model_type=model_type)
        with pytest.raises(UnsafeCheckpoint, match="auto_map"):
            Checkpoint(single)


def test_content_hash_tells_contents_apart(single: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = Checkpoint(single).content_hash(cache)
    moved = shutil.copytree(single, tmp_path / "moved")
    assert Checkpoint(moved).content_hash(cache) == first
    (moved / "README.md").write_text("not part of it")
    assert Checkpoint(moved).content_hash(cache) == first
    content = bytearray((moved / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (moved / "model.safetensors").write_bytes(content)
    assert Checkpoint(moved).content_hash(cache) != first
    edit_config(single, rope_theta=1.0)
    assert Checkpoint(single).content_hash(cache) != first


def test_content_hash_goes_to_the_installation_s_cache(single: Path, home: Path) -> None:
    import os

    for path in single.iterdir():
        os.utime(path, (1, 1))
    Checkpoint(single).content_hash()
    assert str(single) in (home / "cache" / "file-hashes.json").read_text()
