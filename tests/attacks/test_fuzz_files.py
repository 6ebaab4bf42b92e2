"""Thousands of hostile files through the public doors: refused with an error of ours, or read for what they are.

The full form is ``python -m benchmarks.fuzz_files --cases 100000``.
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from aidocks.checkpoints.layout import module_files, weights_present
from aidocks.checkpoints.reader import Checkpoint
from aidocks.datasets.store import DatasetStore
from aidocks.errors import CorruptCheckpoint, IncompatibleModels, InvalidSpec
from aidocks.merge.adapter import read_adapter
from aidocks.models.gguf_import import import_gguf
from aidocks.models.registry import Registry
from aidocks.models.tokenizer_files import read_template
from aidocks.training.data.examples import check_data
from aidocks.training.data.reading import source_of_path
from tests.support import hostile_files
from tests.support import sound_files as sound
from tests.support.fuzzing import run_cases
from tests.support.hostile_content import gguf_file
from tests.support.hostile_process import run_case

#: Of each kind so many that all of them together take some ten seconds.
COUNTS = {
    "safetensors": 1000, "index": 800, "beside": 60, "links": 150, "manifest": 250, "state": 250, "rows": 200,
    "spec": 15, "gguf": 60,
}  # fmt: skip


def test_no_file_does_anything_but_be_read_or_refused() -> None:
    account = run_cases(COUNTS, processes=2)
    assert not account.faults, "\n".join(account.faults[:20])
    assert account.cases == sum(COUNTS.values())
    for kind, outcomes in account.outcomes.items():
        assert outcomes["accepted"], f"{kind}: nothing is sound any more, so nothing is tested"
        assert outcomes.total() > outcomes["accepted"], f"{kind}: nothing was refused"


def test_a_death_and_a_stray_error_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The net has no hole: another exception, an error that no client can be told, a look outside are faults."""

    def stray(chance: random.Random, place: Path) -> Iterator[hostile_files.Door]:
        yield lambda: (_ for _ in ()).throw(KeyError("x"))
        yield lambda: (_ for _ in ()).throw(InvalidSpec("half \ud800 of a character"))
        yield lambda: (_ for _ in ()).throw(InvalidSpec("x" * 100_000))
        yield lambda: (place.parents[1] / "secret").read_text()
        yield lambda: None

    (tmp_path / "secret").write_text("a secret")
    monkeypatch.setitem(hostile_files.KINDS, "stray", stray)
    outcomes = [outcome for outcome, _ in run_case("stray", 0, tmp_path)]
    assert outcomes == ["untyped error", "unfit refusal", "unfit refusal", "wrong answer", "accepted"]


@pytest.mark.parametrize("shape", [[0, 2**62, 2**62], [2**40, 0, 2**40]])
def test_an_empty_tensor_of_impossible_size(tmp_path: Path, shape: list[int]) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CorruptCheckpoint, match="larger than any memory"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_half_of_a_character_is_refused_in_words_that_can_be_sent(tmp_path: Path, name: str) -> None:
    model = sound.write_model(tmp_path / "model")
    half = b'{"\\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}'
    (model / name).write_bytes(half if name.endswith("json") else struct.pack("<Q", len(half)) + half)
    with pytest.raises(CorruptCheckpoint, match="half of a character") as caught:
        Checkpoint(model)
    str(caught.value).encode()
    whole = b'{"a": "\\ud83d\\ude00"}'
    (model / "model.safetensors").write_bytes(
        (sound.write_model(tmp_path / "b") / "model.safetensors").read_bytes()
    )
    (model / "config.json").write_bytes(whole)
    assert Checkpoint(model).config == {"a": "\U0001f600"}


@pytest.mark.parametrize("named", ["x" * 70_000, ["LlamaForCausalLM"] * 5000, [{"a": "x" * 70_000}]])
def test_kinds_of_models_that_would_fill_a_message(tmp_path: Path, named: object) -> None:
    model = sound.write_model(tmp_path / "model")
    for key in ("architectures", "model_type"):
        (model / "config.json").write_text(json.dumps(sound.CONFIG | {key: named}))
        with pytest.raises(CorruptCheckpoint, match="names no kind of model") as caught:
            Checkpoint(model)
        assert len(str(caught.value)) < 300
    adapter = sound.write_adapter(tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text(json.dumps(sound.ADAPTER_CONFIG | {"peft_type": named}))
    with pytest.raises(IncompatibleModels, match="does not know what to do") as refused:
        read_adapter(adapter)
    assert len(str(refused.value)) < 1000


def test_a_manifest_whose_table_has_no_columns(tmp_path: Path) -> None:
    made = sound.write_model(tmp_path / "models" / "made")
    sections = [{"title": "T", "table": {"header": ["a"], "rows": [["1"], []]}}]
    (made / "aidocks.json").write_text(json.dumps(sound.MANIFEST | {"sections": sections}))
    with pytest.raises(CorruptCheckpoint):
        Registry(tmp_path / "models").manifest("made")


def test_indexes_and_lists_of_things_that_are_no_names(tmp_path: Path) -> None:
    model = sound.write_model(tmp_path / "model")
    (model / "model.safetensors").rename(model / "other.safetensors")
    for shard in ({"a": 1}, "x" * 5000 + ".safetensors", "../other.safetensors", "a\0.safetensors"):
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
        assert not weights_present(model)
    (model / "modules.json").write_text(json.dumps([{"path": {}}, {"path": ["x"]}, 5]))
    assert module_files(model) == []
    settings = {"chat_template": [{"name": {}, "template": "x"}, {"name": "default", "template": "y"}]}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    assert read_template(model) == "y"


def test_descriptions_that_nest_deeply_hide_no_other_data_set(tmp_path: Path) -> None:
    store = DatasetStore(tmp_path / "datasets")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    store.add(tmp_path / "rows.jsonl", "sound")
    broken = tmp_path / "datasets" / "broken"
    broken.mkdir()
    (broken / "dataset.json").write_text("[" * 100_000)
    assert [dataset.name for dataset in store.all()] == ["sound"]


def test_rows_that_their_libraries_cannot_hold(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    late = pa.table({"text": ["a"], "when": pa.array([2**45], pa.timestamp("s"))})
    pq.write_table(late, tmp_path / "late.parquet")
    (tmp_path / "cut.json").write_bytes(b'[{"text": "' + "é".encode()[:1])
    for name in ("late.parquet", "cut.json"):
        with pytest.raises(InvalidSpec, match=name):
            check_data(source_of_path(str(tmp_path / name), (tmp_path,)), "sft")


def test_a_gguf_file_that_divides_by_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    heads = b"llama.attention.head_count" + struct.pack("<I", 4)
    sound_file = gguf_file(random.Random(1))
    path.write_bytes(sound_file.replace(heads + struct.pack("<I", 2), heads + bytes(4)))
    with pytest.raises(CorruptCheckpoint, match="contradicts itself"):
        import_gguf(path, Registry(tmp_path / "models"), "m")
    assert not os.path.exists(tmp_path / "models" / "m")
    path.write_bytes(sound_file)
    assert import_gguf(path, Registry(tmp_path / "models"), "m").dtype == "BF16"
