"""Requests of merges that cannot succeed: what is said, of which field, and that nothing of them is left."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aidocks.errors import AIDocksError, IncompatibleModels, InvalidSpec, NameTaken, UnknownModel
from aidocks.jobs.model import Status
from aidocks.jobs.runner import run_locally
from aidocks.settings import Settings
from tests.support.merge_jobs import (
    PREFIX,
    add_adapter,
    add_models,
    change,
    copy_model,
    left_behind,
    make_family,
    request,
)

KNOWN = ("one", "two", "deep", "wide", "large")
LINEAR = """
merge_method: linear
models: [{model: one}, {model: two}]
parameters: {weight: 0.5}
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one` and `two` fit together; `deep` has more layers, `wide` other shapes, `large` more tokens."""
    directory = tmp_path_factory.mktemp("sources")
    make_family(directory, "one", "two")
    make_family(directory, "deep", num_hidden_layers=6)
    make_family(directory, "wide", intermediate_size=64)
    make_family(directory, "large", vocab_size=520)
    return directory


@pytest.fixture
def place(settings: Settings, sources: Path, tmp_path: Path) -> Settings:
    add_models(settings, *(sources / name for name in KNOWN))
    return settings.model_copy(update={"allowed_roots": (tmp_path,)})


Case = tuple[str, type[AIDocksError], str, Any, str]
CASES: dict[str, Case] = {
    "unknown method": (
        LINEAR.replace("linear", "liner"),
        InvalidSpec,
        "merge_method",
        "liner",
        "Did you mean 'linear'? Methods: arcee_fusion",
    ),
    "unknown key": (
        LINEAR.replace("parameters", "paramters"),
        InvalidSpec,
        "paramters",
        {"weight": 0.5},
        "Did you mean 'parameters'?",
    ),
    "values that do not go together": (
        LINEAR.replace("linear", "della\nbase_model: one").replace(
            "weight: 0.5", "weight: 0.5, density: 0.9"
        ),
        InvalidSpec,
        "parameters.epsilon",
        0.15,
        "Choose an epsilon below 0.1.",
    ),
    "unknown parameter": (
        LINEAR.replace("weight", "wieght"),
        InvalidSpec,
        "parameters.wieght",
        0.5,
        "Did you mean 'weight'? The method 'linear' has weight, normalize.",
    ),
    "missing parameter": (
        LINEAR.replace("{weight: 0.5}", "{}"),
        InvalidSpec,
        "models[0].parameters.weight",
        None,
        "parameters.weight",
    ),
    "value out of range": (
        "{merge_method: ties, base_model: one, models: [{model: two, parameters: {weight: 1, density: [0.5, 1.5]}}]}",
        InvalidSpec,
        "models[0].parameters.density[1]",
        1.5,
        "Share of the difference's values",
    ),
    "other depth": (
        LINEAR.replace("two", "deep"),
        IncompatibleModels,
        "models[1].model",
        "deep",
        "slices",
    ),
    "other shapes": (
        LINEAR.replace("two", "wide"),
        IncompatibleModels,
        "models[1].model",
        "wide",
        "the same shape",
    ),
    "other vocabulary": (
        LINEAR.replace("two", "large"),
        IncompatibleModels,
        "models[1].model",
        "large",
        "tokenizer: {source: union}",
    ),
    "layers that are not there": (
        "{merge_method: passthrough, slices: [{sources: [{model: one, layer_range: [2, 5]}]}]}",
        InvalidSpec,
        "slices[0].sources[0].layer_range",
        [2, 5],
        "At most [0, 4]",
    ),
    "no base": (
        LINEAR.replace("linear", "slerp").replace("weight", "t"),
        InvalidSpec,
        "base_model",
        None,
        "'one'",
    ),
    "a model too many": (
        "{merge_method: slerp, base_model: one, models: [{model: two}, {model: deep}], parameters: {t: 1}}",
        IncompatibleModels,
        "models[1].model",
        "deep",
        "slices",
    ),
    "unknown model": (LINEAR.replace("two", "tow"), UnknownModel, "models[1].model", "tow", "two"),
    "in a stage": (
        "{stages: [{name: pair, merge_method: linear, models: [{model: one}, {model: tow}], parameters: {weight: 1}}],"
        " merge_method: linear, models: [{model: pair}], parameters: {weight: 1}}",
        UnknownModel,
        "stages[0].models[1].model",
        "tow",
        "two",
    ),
    "template in a stage": (
        "{stages: [{name: pair, merge_method: linear, models: [{model: one}], parameters: {weight: 1},"
        " chat_template: chatlm}], merge_method: linear, models: [{model: pair}], parameters: {weight: 1}}",
        InvalidSpec,
        "stages[0].chat_template",
        "chatlm",
        "Known: alpaca, chatml",
    ),
    "unknown text": (
        LINEAR + "text: [prose, proze]\n",
        InvalidSpec,
        "text[1]",
        "proze",
        "",
    ),
    "chunks beyond the context": (
        LINEAR + "evaluate: true\nseqlen: 4096\n",
        InvalidSpec,
        "seqlen",
        4096,
        "At most 512",
    ),
    "name taken": (LINEAR + "name: two\n", NameTaken, "name", "two", "aidocks models delete two"),
    "size of files": (
        LINEAR + "max_shard_size: 3 parsecs\n",
        InvalidSpec,
        "max_shard_size",
        "3 parsecs",
        "500MB",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_headers_tell_is_refused_at_once(case: str, place: Settings) -> None:
    text, kind, field, value, hint = CASES[case]
    for more in ({}, {"dry_run": True}) if case != "name taken" else ({},):
        with pytest.raises(kind) as caught:
            run_locally("merge", request(text, **more), place)
        error = first_of(caught.value)
        assert (error["field"], error["value"]) == (field, value)
        assert hint in str(error["hint"])
        assert left_behind(place.home, *KNOWN) == []


def first_of(error: AIDocksError) -> dict[str, Any]:
    (problem,) = error.problem()["errors"]
    return dict(problem)


def failed(place: Settings, text: str, **fields: Any) -> dict[str, Any]:
    """Return the error of a job that was accepted, and could not succeed."""
    job = run_locally("merge", request(text, **fields), place)
    assert job.status is Status.FAILED
    assert job.error is not None
    assert [name for name in left_behind(place.home, *KNOWN) if "spoilt" not in name] == []
    return job.error


def spoil(model: Path, name: str, value: float) -> None:
    def of(found: str, tensor: torch.Tensor) -> torch.Tensor:
        if found == name:
            tensor[1] = value
        return tensor

    change(model, of)


def test_an_input_that_is_not_finite_is_told_by_model_and_tensor(
    place: Settings, sources: Path, tmp_path: Path
) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    spoilt = copy_model(sources / "two", tmp_path / "spoilt")
    spoil(spoilt, name, torch.nan)
    add_models(place, spoilt)
    error = failed(place, LINEAR.replace("two", "spoilt"))
    assert error["code"] == "corrupt_checkpoint"
    assert f"{name} of spoilt" in error["detail"]
    assert error["hint"]


def test_values_that_float16_cannot_hold(place: Settings) -> None:
    for dtypes in ({"dtype": "float16"}, {"dtype": "bfloat16", "out_dtype": "float16"}):
        error = failed(place, LINEAR, parameters={"weight": 9e6, "normalize": False}, **dtypes)
        assert error["code"] == "value_too_large"
        assert "too large for float16" in error["detail"]
        (blamed,) = error["errors"]
        assert (blamed["field"], blamed["value"]) == ("out_dtype", "float16")
        assert "bfloat16" in blamed["hint"]


def test_what_cannot_be_merged_has_to_be_the_same_in_all(
    place: Settings, sources: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    for number, name in enumerate(("one", "two")):
        file = copy_model(sources / name, tmp_path / f"spoilt-{name}") / "model.safetensors"
        counts = {"model.layers.0.counts": torch.arange(4) + number}
        save_file(load_file(file) | counts, file, {"format": "pt"})
        add_models(place, file.parent)
    error = failed(place, LINEAR.replace("one", "spoilt-one").replace("two", "spoilt-two"))
    assert "model.layers.0.counts of spoilt-two differs from" in error["detail"]


def wider(adapter: Path) -> None:
    add_adapter(adapter, modules=("model.layers.0.mlp.gate_proj",))


def beyond(adapter: Path) -> None:
    add_adapter(adapter, modules=("model.layers.9.self_attn.q_proj",))


def strange(adapter: Path) -> None:
    add_adapter(adapter)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_type": "LOHA"}))


def a_model(adapter: Path) -> None:
    make_family(adapter.parent, adapter.name)


@pytest.mark.parametrize(
    ("make", "kind", "told"),
    [
        (wider, IncompatibleModels, "model.layers.0.mlp.gate_proj"),
        (beyond, IncompatibleModels, "model.layers.9.self_attn.q_proj"),
        (strange, IncompatibleModels, "LOHA"),
        (a_model, UnknownModel, "adapter_config.json"),
    ],
)
def test_an_adapter_that_does_not_fit(
    make: Callable[[Path], None],
    kind: type[AIDocksError],
    told: str,
    place: Settings,
    tmp_path: Path,
) -> None:
    adapter = tmp_path / "adapter"
    make(adapter)
    text = LINEAR.replace("two", f"two+{adapter}")
    for given in (text, f"{{stages: [{{name: a, {flow(text)}}}], {flow(LINEAR.replace('two', 'a'))}}}"):
        with pytest.raises(kind, match=told.replace(".", r"\.")) as caught:
            run_locally("merge", request(given), place)
        field = "models[1].model.lora"
        assert caught.value.field == (f"stages[0].{field}" if "stages" in given else field)
        assert str(caught.value.value) in (str(adapter), adapter.name)
        assert PREFIX not in str(caught.value)
        assert left_behind(place.home, *KNOWN) == []


def flow(text: str) -> str:
    """Return a YAML mapping of one-line entries as the inside of braces."""
    return ", ".join(text.strip().splitlines())


def test_only_causal_language_models_are_measured(place: Settings) -> None:
    for name in ("one", "two"):
        file = place.models_dir / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["LlamaModel"]}))
    with pytest.raises(IncompatibleModels, match="not a causal language model, but: LlamaModel") as caught:
        run_locally("merge", request(LINEAR, evaluate=True), place)
    assert (caught.value.field, caught.value.value) == ("evaluate", True)
    assert left_behind(place.home, *KNOWN) == []
    assert run_locally("merge", request(LINEAR), place).status is Status.SUCCEEDED
