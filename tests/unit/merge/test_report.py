"""What is told of a merge: tensors in groups, the card, the report's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aidocks.merge.recipe import Operand, TensorMerge
from aidocks.merge.report import WriteMergeReport, card_sections, parts_of
from aidocks.plan import UnitContext
from aidocks.specs.merge_result import MergeResult, MergeStep


def tensor(name: str, method: str | None = "linear", inputs: int = 2, **values: Any) -> TensorMerge:
    operands = tuple(Operand(source=number, tensor=name) for number in range(inputs))
    return TensorMerge(name=name, dtype="F32", shape=(4,), operands=operands, method=method, values=values)


def result(*tensors: TensorMerge, models: tuple[str, ...] = ("one", "two"), **fields: Any) -> MergeResult:
    step = MergeStep(
        name="made",
        method="linear",
        models=models,
        layers=4,
        tensors=len(tensors),
        files=1,
        read_bytes=32,
        written_bytes=16,
        memory_bytes=1,
    )
    given: dict[str, Any] = {
        "model": "made",
        "merge_method": "linear",
        "architecture": "LlamaForCausalLM",
        "dtype": "float32",
        "parameters": 4,
        "bytes": 16,
        "steps": (step,),
        "parts": parts_of(tensors),
    }
    return MergeResult.model_validate(given | fields)


def test_tensors_that_are_made_alike_are_told_of_together() -> None:
    layers = [
        tensor(f"model.layers.{n}.{rest}.weight", weight=(n / 3, 1.0))
        for n in range(4)
        for rest in ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj")
    ]
    ends = [
        tensor("model.embed_tokens.weight", weight=(0.5, 0.5)),
        tensor("model.norm.weight", weight=(0, 1)),
    ]
    buffers = [tensor("model.layers.2.attn.bias", None, 1)]
    parts = parts_of([ends[0], *layers, *buffers, ends[1]])
    told = [(part.tensors, part.layers, part.method, part.values) for part in parts]
    assert told == [
        ("model.embed_tokens", "", "linear", "weight 0.5"),
        ("mlp.{up_proj, down_proj}, self_attn.q_proj", "0-3", "linear", "weight (0, 1) … 1"),
        ("attn.bias", "2", "copy", ""),
        ("model.norm", "", "linear", "weight (0, 1)"),
    ]
    assert [part.inputs for part in parts] == [2, 2, 1, 2]


def test_values_that_change_on_the_way_and_come_back_are_told() -> None:
    tensors = [tensor(f"h.{n}.w", t=value, flag=True) for n, value in enumerate((0.5, 0.1, 0.5))]
    (part,) = parts_of(tensors)
    assert part.values == "t 0.5 … 0.5, flag true"


def test_a_long_list_of_parts_is_cut_on_the_card() -> None:
    made = result(*(tensor(f"part{n}", weight=(float(n),)) for n in range(40)))
    (section,) = card_sections(made)
    assert section.table is not None
    assert len(section.table.rows) == 24
    assert any("16 more kinds" in line for line in section.text)


def test_no_directory_is_told(tmp_path: Path) -> None:
    models = (
        "/home/me/models/one",
        "org/two+/home/me/style",
        "/home/me/models/one+/home/me/style",
        "./here/three",
    )
    notes = tuple(f"rope_theta is 5 in {model!r}." for model in models)
    made = result(tensor("w", weight=(1.0,)), models=models, notes=notes)
    (section,) = card_sections(made)
    assert section.text[0] == "made: linear of one, org/two+style, one+style, three."
    unit = WriteMergeReport(directory=tmp_path, config="merge_method: linear\n", result=made)
    files = {file.path.name: file.path.read_text() for file in unit.run(UnitContext(tmp_path)).files}
    assert set(files) == {"mergekit_config.yml", "report.json"}
    assert files["mergekit_config.yml"] == "merge_method: linear\n"
    report = json.loads(files["report.json"])
    assert report["steps"][0]["models"] == ["one", "org/two+style", "one+style", "three"]
    for text in (*section.notes, *section.text, files["report.json"]):
        assert "/home/me" not in text
        assert "./here" not in text
    assert report["notes"][0] == "rope_theta is 5 in 'one'."
