"""Models that do not fit together are refused before any work, with field, difference and both values."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aidocks.errors import AIDocksError, CorruptCheckpoint, IncompatibleModels, InsufficientDisk, InvalidSpec

Change = Callable[[Path], None]


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


def config(**changes: Any) -> Change:
    return lambda model: edit_json(model / "config.json", **changes)


def rename_token(model: Path) -> None:
    document = json.loads((model / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    vocabulary["zebra"] = vocabulary.pop("Ġthe")
    document["model"]["merges"] = [m for m in document["model"]["merges"] if "".join(m) in vocabulary]
    (model / "tokenizer.json").write_text(json.dumps(document))


def drop_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def drop_tokenizer_and_say(rows: int) -> Change:
    def change(model: Path) -> None:
        drop_tokenizer(model)
        edit_json(model / "config.json", vocab_size=rows)

    return change


def rewrite(model: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def drop_tensor(model: Path) -> None:
    rewrite(model, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))


def add_bias(model: Path) -> None:
    rewrite(model, lambda tensors: tensors.update({"model.layers.1.self_attn.q_proj.bias": torch.zeros(64)}))


def make_integers(model: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    rewrite(model, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (config(model_type="gpt2"), ["'gpt2'", "Llama, Mistral, Phi-3, Qwen2 and Qwen3"]),
        (config(model_type="qwen2", architectures=["Qwen2ForCausalLM"]), ["model_type", "qwen2", "llama"]),
        (
            config(model_type="mistral", architectures=["MistralForCausalLM"]),
            ["model_type", "mistral", "llama"],
        ),
        (config(rms_norm_eps=1e-5), ["rms_norm_eps", "1e-05", "1e-06"]),
        (config(num_attention_heads=4, head_dim=16), ["num_attention_heads", "4", "8"]),
        (config(hidden_act="gelu"), ["hidden_act", "gelu", "silu"]),
        (
            config(rope_parameters={"rope_type": "default", "rope_theta": 77.0}),
            ["rope_parameters", "77.0", "10000.0"],
        ),
        (config(attention_bias=True), ["attention_bias", "true", "false"]),
        (config(mlp_bias=True), ["mlp_bias", "true", "false"]),
        (config(quantization_config={"bits": 4}), ["quantised"]),
        (config(hidden_size="many"), ["config.json"]),
        (rename_token, ["different tokenizers", "'Ġthe'", "unknown"]),
        (drop_tensor, ["model.layers.2.mlp.up_proj.weight", "no tensor"]),
        (add_bias, ["model.layers.1.self_attn.q_proj.bias"]),
        (drop_tokenizer_and_say(520), ["vocab_size", "520", "512"]),
        (make_integers, ["model.layers.0.mlp.down_proj.weight", "I8"]),
    ],
)
def test_an_expert_that_does_not_fit(
    change: Change, words: list[str], tmp_path: Path, tiny_llama: Any, plan: Any
) -> None:
    base, other = tiny_llama(tmp_path / "base"), tiny_llama(tmp_path / "other", seed=1)
    change(other)
    with pytest.raises(IncompatibleModels) as caught:
        plan(base, [base, other])
    assert caught.value.field == "experts[1].source_model"
    assert caught.value.value == str(other)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "name", "values"),
    [
        ({"intermediate_size": 160}, "intermediate_size", ["160", "176"]),
        ({"num_hidden_layers": 3}, "num_hidden_layers", ["3", "4"]),
        ({"hidden_size": 32}, "hidden_size", ["32", "64"]),
    ],
)
def test_an_expert_of_another_shape(
    overrides: dict[str, int],
    name: str,
    values: list[str],
    tmp_path: Path,
    tiny_llama: Any,
    plan: Any,
) -> None:
    base, other = tiny_llama(tmp_path / "base"), tiny_llama(tmp_path / "other", **overrides)
    with pytest.raises(IncompatibleModels) as caught:
        plan(base, [other, base])
    assert caught.value.field == "experts[0].source_model"
    with pytest.raises(IncompatibleModels) as shared:
        plan(base, [base, base], architecture="qwen_moe", shared_experts=[other])
    assert shared.value.field == "shared_experts[0].source_model"
    for word in [name, *values]:
        assert word in str(caught.value)
        assert word in str(shared.value)


@pytest.mark.parametrize(
    ("change", "word"), [(drop_tokenizer, "tokenizer"), (drop_tensor, "up_proj"), (add_bias, "bias")]
)
def test_a_base_that_cannot_be_one(
    change: Change, word: str, tmp_path: Path, tiny_llama: Any, plan: Any
) -> None:
    base, other = tiny_llama(tmp_path / "base"), tiny_llama(tmp_path / "other", seed=1)
    change(base)
    with pytest.raises(IncompatibleModels) as caught:
        plan(base, [base, other])
    assert word in str(caught.value)


def test_a_missing_shard_is_a_damaged_checkpoint(tmp_path: Path, tiny_llama: Any, plan: Any) -> None:
    base, other = tiny_llama(tmp_path / "base"), tiny_llama(tmp_path / "other", max_shard_size="200KB")
    next(iter(sorted(other.glob("model-*.safetensors")))).unlink()
    with pytest.raises(CorruptCheckpoint, match="missing"):
        plan(base, [base, other])


def test_decimals_of_float32_are_no_difference(tmp_path: Path, tiny_llama: Any, plan: Any) -> None:
    base, other = tiny_llama(tmp_path / "base", rms_norm_eps=1e-5), tiny_llama(tmp_path / "other", seed=1)
    edit_json(other / "config.json", rms_norm_eps=9.999999747378752e-06)
    assert plan(base, [base, other]).num_experts == 2


def test_rows_that_fill_an_expert_s_embedding_up_are_no_difference(
    tmp_path: Path, tiny_llama: Any, plan: Any
) -> None:
    base, other = tiny_llama(tmp_path / "base"), tiny_llama(tmp_path / "other", vocab_size=520)
    assert plan(base, [base, other]).config["vocab_size"] == 512


def test_an_output_that_does_not_fit_on_the_disk(
    tmp_path: Path, tiny_llama: Any, build: Any, experts_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_llama(tmp_path / "base")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(InsufficientDisk, match=r"1\.0 MB are free"):
        build(base, experts_of(base, base))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"chunks": 90_000, "evaluate": True}, "chunks"),
        ({"seqlen": 1024}, "seqlen"),
        ({"text": "novel"}, "text"),
        ({"max_shard_size": "5 apples"}, "max_shard_size"),
    ],
)
def test_a_field_that_this_base_cannot_serve(
    fields: dict[str, Any], field: str, tmp_path: Path, tiny_llama: Any, build: Any, experts_of: Any
) -> None:
    base = tiny_llama(tmp_path / "base")
    with pytest.raises(InvalidSpec) as caught:
        build(base, experts_of(base, base), **fields)
    assert caught.value.field == field


def test_states_that_are_not_finite_are_refused(
    tmp_path: Path, tiny_llama: Any, build: Any, experts_of: Any
) -> None:
    base = tiny_llama(tmp_path / "base")
    rewrite(base, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].fill_(float("nan")))
    with pytest.raises(AIDocksError, match="not finite"):
        build(base, experts_of(base, base))


def test_checking_needs_no_torch(tmp_path: Path, tiny_llama: Any) -> None:
    base = tiny_llama(tmp_path / "base")
    code = f"""
import sys
from pathlib import Path
from aidocks.jobs.submit import plan_context
from aidocks.moe.operation import BuildMoE
from aidocks.settings import Settings
from aidocks.specs.moe import MoESpec
settings = Settings(home=Path({str(tmp_path / "home")!r}), allowed_roots=(Path({str(tmp_path)!r}),))
experts = [{{"source_model": {str(base)!r}, "positive_prompts": [text]}} for text in ("x", "y")]
fields = {{"chat_template": "chatml", "tokenizer_source": "union", "chunks": 2, "seqlen": 16}}
spec = MoESpec(base_model={str(base)!r}, experts=experts, **fields)
BuildMoE().preflight(spec, plan_context(settings, "job-0"))
assert not {{"torch", "transformers", "matplotlib"}} & set(sys.modules)
"""
    root = Path(__file__).resolve().parents[3]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2", "qwen3"])
def test_planning_needs_no_torch(family: str, tmp_path: Path, tiny_model: Any) -> None:
    base = tiny_model(tmp_path / "base", family)
    code = f"""
import sys
from pathlib import Path
from aidocks.checkpoints.reader import Checkpoint
from aidocks.moe.assemble import assembly_units
from aidocks.moe.dense import Member
from aidocks.moe.target import plan_target
from aidocks.specs.moe import MoESpec
spec = MoESpec(base_model="m", gate_mode="random", experts=[{{"source_model": "m"}}] * 2, tokenizer_source="union")
member = Member("base_model", "m", Checkpoint(Path({str(base)!r})))
target = plan_target(spec, member, [member, member])
assembly_units(target, target.plan_files(1 << 30), Path("out"))
assert not {{"torch", "transformers", "numpy"}} & set(sys.modules)
"""
    root = Path(__file__).resolve().parents[3]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
