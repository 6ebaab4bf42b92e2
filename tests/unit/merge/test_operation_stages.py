"""Merges of merges, of adapted models and of models stored as PyTorch files, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from aidocks.checkpoints.hashes import FileHashes, combine_hashes
from aidocks.errors import InvalidSpec
from aidocks.jobs.runner import run_locally
from aidocks.models.registry import Registry
from aidocks.settings import Settings
from aidocks.specs.read import parse_yaml
from tests.support.merge_jobs import (
    ADAPTED,
    PREFIX,
    Driver,
    Killed,
    add_adapter,
    add_models,
    change,
    copy_model,
    left_behind,
    make_family,
    request,
    tensors,
    weights,
)


@pytest.fixture
def place(settings: Settings, tmp_path: Path) -> Settings:
    """An installation whose registry holds `one`, `two` and `three`."""
    make_family(tmp_path / "sources", "one", "two", "three")
    add_models(settings, *(tmp_path / "sources" / name for name in ("one", "two", "three")))
    return settings.model_copy(update={"allowed_roots": (tmp_path,)})


def made(result: Any) -> dict[str, torch.Tensor]:
    return tensors(Path(str(result.path)))


def another(place: Settings, number: int = 1) -> Driver:
    return Driver(place, job_id=f"job-00000000000-0000000{number}")


DOCUMENTS = """
merge_method: slerp
base_model: inner
models: [{model: three}]
parameters: {t: 0.25}
name: null
---
name: pair
merge_method: linear
models: [{model: one}, {model: two}]
parameters: {weight: [0.2, 0.8]}
---
name: inner
merge_method: task_arithmetic
base_model: one
models: [{model: pair}, {model: two}]
parameters: {weight: 0.5}
"""


def test_documents_are_merges_that_use_one_another(place: Settings) -> None:
    driver = another(place)
    result = driver.run(DOCUMENTS, name="result")
    assert [(step.name, step.method) for step in result.steps] == [
        ("pair", "linear"),
        ("inner", "task_arithmetic"),
        ("result", "slerp"),
    ]
    assert [stage for stage in driver.stages if stage.startswith("merge")] == [
        "merge pair",
        "merge inner",
        "merge",
    ]
    # One after another, each result a model of the registry, gives the same bytes.
    (outer, pair, inner) = parse_yaml(DOCUMENTS)["documents"]
    for number, document in enumerate((pair, inner, outer | {"name": "alone"}), 2):
        alone = another(place, number).run(json.dumps(document))
    assert weights(Path(str(alone.path))) == weights(Path(str(result.path)))
    parents = Registry(place.models_dir).manifest("result").parents
    assert [(parent.field, parent.reference) for parent in parents] == [
        ("stages[0].models[0].model", "one"),
        ("stages[0].models[1].model", "two"),
        ("models[0].model", "three"),
    ]
    # Stages are not kept.
    assert sorted(
        path.name for path in place.models_dir.iterdir() if path.is_dir() and path.name[0] != "."
    ) == [
        "alone",
        "inner",
        "one",
        "pair",
        "result",
        "three",
        "two",
    ]


def test_an_adapter_is_added_before_anything_is_merged(place: Settings, tmp_path: Path) -> None:
    adapter = add_adapter(tmp_path / "style")
    factors = tensors(adapter)
    registry = Registry(place.models_dir)
    dense = copy_model(tmp_path / "sources" / "one", tmp_path / "dense")

    def add(name: str, tensor: torch.Tensor) -> torch.Tensor:
        module = name.removesuffix(".weight")
        if module not in ADAPTED:
            return tensor
        a, b = (factors[f"{PREFIX}{module}.lora_{part}.weight"] for part in "AB")
        return tensor + 2.0 * b @ a

    change(dense, add)
    add_models(place, dense)
    text = """
    merge_method: ties
    base_model: two
    models:
      - {model: MODEL, parameters: {weight: 0.7, density: 1}}
      - {model: three, parameters: {weight: 0.3, density: 1}}
    """
    added = another(place).run(text.replace("MODEL", f"one+{adapter}"), name="added")
    whole = another(place, 2).run(text.replace("MODEL", "dense"), name="whole")
    for name, tensor in made(whole).items():
        assert torch.allclose(made(added)[name], tensor, atol=1e-6), name
    alone = another(place, 3).run(
        f"{{merge_method: passthrough, models: [{{model: one+{adapter}}}]}}", name="alone"
    )
    for name, tensor in tensors(dense).items():
        assert torch.allclose(made(alone)[name], tensor, atol=1e-6), name
    parents = registry.manifest("added").parents
    assert [(parent.field, parent.reference) for parent in parents] == [
        ("base_model", "two"),
        ("models[0].model", "one"),
        ("models[0].model.lora", str(adapter)),
        ("models[1].model", "three"),
    ]
    files = [adapter / "adapter_config.json", adapter / "adapter_model.safetensors"]
    assert parents[2].content_hash == combine_hashes(FileHashes(tmp_path / "cache").compute(files))


def test_an_adapter_on_the_result_of_a_stage(place: Settings, tmp_path: Path) -> None:
    adapter = add_adapter(tmp_path / "style")
    text = f"""
    stages:
      - name: pair
        merge_method: linear
        models: [{{model: one}}, {{model: two}}]
        parameters: {{weight: 0.5}}
    merge_method: linear
    models: [{{model: pair+{adapter}}}, {{model: pair}}]
    parameters: {{weight: 0.5}}
    """
    found = made(another(place).run(text, name="result", evaluate=True, chunks=2, seqlen=16))
    one, two = (tensors(tmp_path / "sources" / name) for name in ("one", "two"))
    factors = tensors(adapter)
    for name, tensor in found.items():
        module = name.removesuffix(".weight")
        added = torch.zeros_like(tensor)
        if module in ADAPTED:
            a, b = (factors[f"{PREFIX}{module}.lora_{part}.weight"] for part in "AB")
            added = b @ a  # alpha / r is 2, and half of it comes in
        assert torch.allclose(tensor, (one[name] + two[name]) / 2 + added, atol=1e-6), name


def test_tokens_of_a_stage_are_those_of_later_ones(place: Settings, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    speaker = copy_model(tmp_path / "sources" / "two", tmp_path / "speaker")
    reader = AutoTokenizer.from_pretrained(speaker)
    reader.add_tokens(["<|user|>"], special_tokens=True)
    reader.save_pretrained(speaker)
    own = torch.arange(32.0)[None]
    change(
        speaker,
        lambda name, tensor: torch.cat([tensor, own]) if "embed_tokens" in name else tensor,
        vocab_size=513,
        eos_token_id=512,
    )
    text = f"""
    stages:
      - name: chat
        merge_method: linear
        models: [{{model: {speaker}}}, {{model: one}}]
        parameters: {{weight: 0.5}}
        tokenizer: {{source: union}}
    merge_method: linear
    models: [{{model: three}}, {{model: chat}}]
    parameters: {{weight: 0.5}}
    tokenizer_source: chat
    """
    ran = []
    for resumed in (False, True):
        driver, name = another(place, int(resumed)), f"result-{resumed}"
        if resumed:
            # The stage's files are there when the plan is made again; they must not change it.
            with pytest.raises(Killed):
                driver.run(text, name=name, kill_after=5)
        result = driver.run(text, name=name)
        path = Path(str(result.path))
        rows = tensors(path)["model.embed_tokens.weight"]
        assert torch.equal(rows[512], own[0])
        network, reader = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        assert reader("<|user|>")["input_ids"] == [512]
        assert network.config.vocab_size == len(reader) == 513
        config = json.loads((path / "config.json").read_text())
        # What the stage's tokenizer ends texts with, and not what the first model does.
        assert config["eos_token_id"] == 512
        ran.append([unit.unit_id for unit in driver.units])
    # Neither is anything done that was not done at once.
    assert len(ran[0]) == len(ran[1])
    first, second = (place.models_dir / f"result-{resumed}" for resumed in (False, True))
    assert weights(first) == weights(second)


def test_weights_in_pytorch_files(place: Settings, tmp_path: Path) -> None:
    text = """
    merge_method: linear
    models: [{model: one}, {model: OTHER}]
    parameters: {weight: [0.1, 0.9]}
    """
    pickled = copy_model(tmp_path / "sources" / "two", tmp_path / "pickled")
    torch.save(tensors(pickled), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    driver = another(place)
    result = driver.run(
        text.replace("OTHER", str(pickled)), name="result", evaluate=True, chunks=2, seqlen=16
    )
    assert driver.stages[0] == "convert"
    expected = another(place, 2).run(text.replace("OTHER", "two"), name="expected")
    assert weights(Path(str(result.path))) == weights(Path(str(expected.path)))
    parents = Registry(place.models_dir).manifest("result").parents
    assert [parent.path_name for parent in parents] == ["one", "pickled"]
    assert [model.model for model in result.perplexities] == ["models[0]", "models[1]", "average", "merge"]
    known = set(left_behind(place.home))
    planned = another(place, 3).run(text.replace("OTHER", str(pickled)), dry_run=True)
    assert planned.steps[0].read_bytes == expected.steps[0].read_bytes
    # What needs no model is refused before one is converted.
    for right, wrong, field in (
        ("linear", "liner", "merge_method"),
        ("{weight", "{wieght", "parameters.wieght"),
    ):
        with pytest.raises(InvalidSpec) as refused:
            run_locally("merge", request(text.replace("OTHER", str(pickled)).replace(right, wrong)), place)
        assert refused.value.field == field
    added = set(left_behind(place.home)) - known
    assert not any(place.startswith("models") for place in added)
