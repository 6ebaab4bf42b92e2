"""Opening the models of a merge: by name, with adapters, of earlier stages; and what is no model to merge."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from aidocks.checkpoints.header import build_header
from aidocks.errors import AIDocksError, IncompatibleModels
from aidocks.merge.members import Member, open_members
from aidocks.models.resolve import ModelResolver
from aidocks.specs.merge import MergeSpec
from aidocks.specs.read import build_spec
from tests.support.merging import llama


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for name in ("one", "two"):
        save(tmp_path / name)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    # One that changes nothing fits every model.
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": []}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    (adapter / "adapter_model.safetensors").write_bytes(build_header({}, {}))
    return tmp_path


def save(directory: Path, dtype: str = "F32", **config: Any) -> None:
    directory.mkdir()
    size = 8 if dtype == "F32" else 2
    data = build_header({"lm_head.weight": (dtype, (2,), 0, size)}, {}) + bytes(size)
    (directory / "model.safetensors").write_bytes(data)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 2, **config}))


def opened(
    models: Path, *references: str, made: Mapping[str, Member] | None = None, **more: Any
) -> dict[str, Member]:
    spec = build_spec(
        MergeSpec, {"merge_method": "linear", "models": [{"model": r} for r in references], **more}
    )
    resolver = ModelResolver(models / "registry", [models])
    return open_members(spec, resolver, path="stages[1].", made=made)


def test_models_are_opened_once_the_base_first(models: Path) -> None:
    one, two = str(models / "one"), str(models / "two")
    members = opened(models, one, two, base_model=two)
    assert list(members) == [two, one]
    assert members[two].field == "stages[1].base_model"
    assert members[one].field == "stages[1].models[0].model"
    assert (members[one].directory, members[one].vocab_size) == (models / "one", 2)
    assert members[one].tensors["lm_head.weight"].dtype == "F32"


def test_adapters_belong_to_the_model(models: Path) -> None:
    reference = f"{models}/one+{models}/adapter"
    member = opened(models, reference)[reference]
    assert member.source.checkpoint == models / "one"
    assert member.source.adapter == models / "adapter"
    with pytest.raises(AIDocksError) as refused:
        opened(models, f"{models}/one+{models}/nothing")
    assert refused.value.field == "stages[1].models[0].model.lora"


def test_results_of_earlier_stages_need_not_be_there(models: Path) -> None:
    made = {"both": llama("both")}
    members = opened(models, "both", f"both+{models}/adapter", made=made)
    assert members["both"].tensors == made["both"].tensors
    assert members["both"].field == "stages[1].models[0].model"
    assert members[f"both+{models}/adapter"].source.adapter == models / "adapter"


@pytest.mark.parametrize(
    ("dtype", "config", "told"),
    [
        ("F8_E4M3", {}, "F8_E4M3"),
        ("F32", {"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    ],
)
def test_quantised_models_are_refused(models: Path, dtype: str, config: dict[str, Any], told: str) -> None:
    save(models / "small", dtype, **config)
    with pytest.raises(IncompatibleModels) as refused:
        opened(models, str(models / "small"))
    assert (refused.value.field, refused.value.value) == ("stages[1].models[0].model", str(models / "small"))
    assert told in refused.value.message


def test_a_model_that_is_not_there(models: Path) -> None:
    with pytest.raises(AIDocksError) as refused:
        opened(models, str(models / "none"))
    assert refused.value.field == "stages[1].models[0].model"
