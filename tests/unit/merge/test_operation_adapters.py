"""Adapters that change more than matrices, names that differ, and what stages hand on: merged, and loaded again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aidocks.jobs.submit import plan_context
from aidocks.merge.extraction.operation import ExtractLora
from aidocks.plan import UnitContext
from aidocks.settings import Settings
from aidocks.specs.extract_lora import ExtractLoraResult, ExtractLoraSpec
from aidocks.specs.read import build_spec
from tests.support.merge_jobs import (
    PREFIX,
    Driver,
    add_models,
    change,
    copy_model,
    make_family,
    tensors,
)

EMBEDDING = "model.embed_tokens.weight"
COPY = "{merge_method: passthrough, models: [{model: '%s'}], name: result}"


@pytest.fixture
def place(settings: Settings, tmp_path: Path) -> Settings:
    """An installation whose registry holds `one` and `two`."""
    make_family(tmp_path / "sources", "one", "two")
    add_models(settings, *(tmp_path / "sources" / name for name in ("one", "two")))
    return settings.model_copy(update={"allowed_roots": (tmp_path,)})


@pytest.fixture
def one(tmp_path: Path, place: Settings) -> Path:
    return tmp_path / "sources" / "one"


def extract(settings: Settings, **fields: Any) -> ExtractLoraResult:
    context = plan_context(settings, "job-00000000000-00000009")
    context.workspace.mkdir(parents=True)
    plan = ExtractLora().plan(build_spec(ExtractLoraSpec, fields), context)
    results: list[Any] | None = None
    try:
        while True:
            stage = next(plan) if results is None else plan.send(results)
            results = [unit.run(UnitContext(context.workspace)) for unit in stage.units]
    except StopIteration as stop:
        result: ExtractLoraResult = stop.value
        return result


def merged(settings: Settings, reference: str) -> Path:
    return Path(str(Driver(settings).run(COPY % reference).path))


def load(model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model)


def test_a_model_with_more_tokens_comes_back_from_its_adapter(place: Settings, one: Path) -> None:
    grown = copy_model(one, one.with_name("grown"))
    more = torch.randn(8, 32, generator=torch.Generator().manual_seed(5))

    def tune(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == EMBEDDING:
            return torch.cat([tensor, more])
        return tensor + 0.01 if "q_proj" in name else tensor

    change(grown, tune, vocab_size=520)
    tokens = json.loads((grown / "tokenizer.json").read_text())
    tokens["added_tokens"].append({**tokens["added_tokens"][-1], "id": 512, "content": "<|new|>"})
    (grown / "tokenizer.json").write_text(json.dumps(tokens))
    add_models(place, grown)
    extract(place, model="grown", base_model="one", rank=4, name="style")
    result = merged(place, "one+style")
    network = load(result)
    assert network.config.vocab_size == 520
    assert torch.equal(network.get_output_embeddings().weight, network.get_input_embeddings().weight)
    for name, wanted in load_file(grown / "model.safetensors").items():
        assert torch.allclose(tensors(result)[name], wanted, atol=1e-5), name
    assert "<|new|>" in (result / "tokenizer.json").read_text()


def test_a_head_that_an_adapter_trained_is_the_results(place: Settings, one: Path, tmp_path: Path) -> None:
    head = torch.randn(512, 32, generator=torch.Generator().manual_seed(5))
    adapter = tmp_path / "headed"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "modules_to_save": ["lm_head"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    save_file({f"{PREFIX}lm_head.weight": head}, adapter / "adapter_model.safetensors")
    result = merged(place, f"one+{adapter}")
    network = load(result)
    assert torch.equal(network.get_output_embeddings().weight, head)
    assert torch.equal(network.get_input_embeddings().weight, load_file(one / "model.safetensors")[EMBEDDING])


@pytest.mark.parametrize("asked", [None, "auto"])
def test_a_stage_hands_on_its_chat_template(place: Settings, asked: str | None) -> None:
    text = """
    stages: [{name: s, merge_method: passthrough, models: [{model: one}], chat_template: chatml}]
    merge_method: linear
    models: [{model: s}, {model: two}]
    parameters: {weight: 1}
    name: result
    """
    result = Driver(place).run(text, chat_template=asked)
    assert "<|im_start|>" in (Path(str(result.path)) / "chat_template.jinja").read_text()


def test_a_vocabulary_can_be_that_of_a_stage(place: Settings) -> None:
    text = """
    stages: [{name: s, merge_method: passthrough, models: [{model: one}]}]
    merge_method: linear
    models: [{model: two}, {model: s}]
    parameters: {weight: 1}
    tokenizer: {source: s}
    name: result
    """
    result = Driver(place).run(text)
    assert load(Path(str(result.path))).config.vocab_size == 512


class TestGPT2:
    """On the model hub it has no first part in its names, and masks."""

    @pytest.fixture
    def models(self, settings: Settings, tmp_path: Path) -> Settings:
        from transformers import GPT2Config, GPT2LMHeadModel

        for seed, name in enumerate(("saved", "tuned")):
            torch.manual_seed(seed)
            shape = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24}
            GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(tmp_path / name)
        hub = copy_model(tmp_path / "saved", tmp_path / "hub")
        stored = load_file(hub / "model.safetensors")
        renamed = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
        masks = {f"h.{n}.attn.bias": torch.ones(24, 24).tril()[None, None] for n in range(2)}
        save_file(renamed | masks, hub / "model.safetensors", {"format": "pt"})
        add_models(settings, *(tmp_path / name for name in ("saved", "tuned", "hub")))
        return settings

    def test_both_forms_are_merged(self, models: Settings) -> None:
        text = (
            "{merge_method: linear, parameters: {weight: 1}, models: [{model: %s}, {model: tuned}], name: %s}"
        )
        one, other = (
            Path(
                str(Driver(models, job_id=f"job-00000000000-0000000{n}").run(text % (name, f"r-{name}")).path)
            )
            for n, name in enumerate(("hub", "saved"))
        )
        found = tensors(one)
        assert found.keys() == tensors(other).keys()
        assert all(torch.equal(tensor, found[name]) for name, tensor in tensors(other).items())
        assert load(one).transformer.wte.weight.equal(found["transformer.wte.weight"])

    @pytest.mark.parametrize(("base", "model"), [("hub", "tuned"), ("tuned", "hub")])
    def test_an_adapter_is_extracted_from_both_forms(self, models: Settings, base: str, model: str) -> None:
        result = extract(models, model=model, base_model=base, rank=16, name="style")
        assert result.lost == ()
        assert all(row.tensor.startswith("transformer.h.") for row in result.matrices)
        stored = tensors(merged(models, f"{base}+style"))
        wanted = tensors(models.models_dir / model)
        for name, tensor in stored.items():
            own = name if name in wanted else name.removeprefix("transformer.")
            own = own if own in wanted else f"transformer.{own}"
            assert torch.allclose(tensor, wanted[own], atol=1e-4), name
