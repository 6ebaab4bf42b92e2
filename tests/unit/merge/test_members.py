"""Opening the models of a merge: by name, with adapters, of earlier stages; and what is no model to merge."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest

from aidocks.checkpoints.header import build_header
from aidocks.errors import AIDocksError, IncompatibleModels
from aidocks.merge.members import Member, open_members
from aidocks.merge.target import plan_target
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
    write_config(directory, config)


def save_shapes(directory: Path, shapes: Mapping[str, tuple[int, ...]], **config: Any) -> str:
    """Save a model of zeros."""
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(_zeros(shapes))
    write_config(directory, config)
    return str(directory)


def save_adapter(directory: Path, shapes: Mapping[str, tuple[int, ...]], **config: Any) -> str:
    """Save an adapter that stores tensors whole."""
    directory.mkdir()
    data = _zeros({f"base_model.model.{name}": shape for name, shape in shapes.items()})
    (directory / "adapter_model.safetensors").write_bytes(data)
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return str(directory)


def _zeros(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = ("F32", shape, end, end + 4 * prod(shape))
        end += 4 * prod(shape)
    return build_header(header, {}) + bytes(end)


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
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


class TestAdaptedModels:
    EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

    def base(self, models: Path, tied: bool = True, **config: Any) -> str:
        shapes = {self.EMBEDDING: (6, 4)} | ({} if tied else {self.HEAD: (6, 4)})
        settings = {"vocab_size": 6, "tie_word_embeddings": tied}
        return save_shapes(models / "base", shapes, **(config or settings))

    def adapted(
        self, models: Path, base: str, shapes: Mapping[str, tuple[int, ...]], **config: Any
    ) -> Member:
        reference = f"{base}+{save_adapter(models / 'style', shapes, **config)}"
        return opened(models, reference)[reference]

    def test_a_larger_embedding_makes_a_larger_vocabulary(self, models: Path) -> None:
        member = self.adapted(models, self.base(models), {self.EMBEDDING: (8, 4), self.HEAD: (8, 4)})
        assert (member.vocab_size, member.config["tie_word_embeddings"]) == (8, True)
        assert member.tokenizer == models / "base"
        (models / "style" / "tokenizer.json").write_text("{}")
        reference = f"{models}/base+{models}/style"
        assert opened(models, reference)[reference].tokenizer == models / "style"

    def test_of_a_composite_model(self, models: Path) -> None:
        base = self.base(models, text_config={"vocab_size": 6, "tie_word_embeddings": True})
        member = self.adapted(
            models,
            base,
            {self.EMBEDDING: (8, 4), self.HEAD: (8, 4)},
            modules_to_save=["embed_tokens", "lm_head"],
        )
        assert member.config["text_config"] == {"vocab_size": 8, "tie_word_embeddings": False}

    def test_a_head_that_was_trained_is_no_embedding(self, models: Path) -> None:
        base = self.base(models)
        member = self.adapted(models, base, {self.HEAD: (6, 4)}, modules_to_save=["lm_head"])
        assert member.config["tie_word_embeddings"] is False
        assert self.HEAD in member.tensors

    def test_a_head_of_another_size_than_the_embedding_is_refused(self, models: Path) -> None:
        base = self.base(models, tied=False)
        with pytest.raises(IncompatibleModels, match="8 rows with it, but its head 6") as refused:
            self.adapted(models, base, {self.EMBEDDING: (8, 4)})
        assert refused.value.field == "stages[1].models[0].model.lora"


GPT2 = {
    "wte.weight": (6, 4),
    "wpe.weight": (9, 4),
    "h.0.attn.c_attn.bias": (12,),
    "h.1.attn.c_attn.bias": (12,),
    "ln_f.weight": (4,),
}


class TestNames:
    def hub_and_saved(self, models: Path, **head: tuple[int, ...]) -> tuple[Member, Member]:
        masks = {f"h.{n}.attn.bias": (1, 1, 9, 9) for n in range(2)}
        config = {"n_layer": 2, "vocab_size": 6}
        hub = save_shapes(models / "hub", GPT2 | masks, **config)
        prefixed = {f"transformer.{name}": shape for name, shape in GPT2.items()}
        saved = save_shapes(
            models / "saved", prefixed | {f"{k}.weight": v for k, v in head.items()}, **config
        )
        members = opened(models, hub, saved)
        return members[hub], members[saved]

    @pytest.mark.parametrize("head", [{}, {"lm_head": (6, 4)}])
    def test_what_a_model_leaves_out_of_all_names_is_no_difference(
        self, models: Path, head: dict[str, tuple[int, ...]]
    ) -> None:
        hub, saved = self.hub_and_saved(models, **head)
        assert list(hub.named) == [f"transformer.{name}" for name in GPT2]
        assert list(hub.tensors) == list(GPT2)  # as they are stored, and without masks
        assert hub.own_name("transformer.wte.weight") == "wte.weight"
        assert (dict(saved.spelled), saved.own_name("transformer.wte.weight")) == (
            {},
            "transformer.wte.weight",
        )
        spec = build_spec(
            MergeSpec,
            {
                "merge_method": "linear",
                "parameters": {"weight": 1},
                "models": [{"model": hub.reference}, {"model": saved.reference}],
            },
        )
        target = plan_target(spec, {member.reference: member for member in (hub, saved)})
        first = target.tensors[0]
        assert first.name == "transformer.wte.weight"
        assert [operand.tensor for operand in first.operands] == ["wte.weight", "transformer.wte.weight"]
        assert len(target.tensors) == len(GPT2) + len(head)

    def test_alone_it_keeps_its_names(self, models: Path) -> None:
        hub = save_shapes(models / "hub", GPT2, n_layer=2)
        assert list(opened(models, hub)[hub].named) == list(GPT2)

    def test_other_tensors_are_not_made_equal(self, models: Path) -> None:
        hub = save_shapes(models / "hub", GPT2)
        other = {f"transformer.{name}": shape for name, shape in GPT2.items() if name != "ln_f.weight"}
        saved = save_shapes(models / "saved", other)
        assert list(opened(models, hub, saved)[hub].named) == list(GPT2)

    def test_what_is_computed_is_left_out(self, models: Path) -> None:
        buffers = {
            "model.layers.0.self_attn.rotary_emb.inv_freq": (4,),
            "gpt_neox.layers.0.attention.bias": (1, 1, 8, 8),
            "h.0.attn.masked_bias": (),
        }
        biases: dict[str, tuple[int, ...]] = {"h.0.attn.bias": (8,)}
        name = save_shapes(models / "m", buffers | biases)
        assert list(opened(models, name)[name].tensors) == list(biases)
