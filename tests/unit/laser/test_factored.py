"""Models that are stored as factors, loaded with transformers."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aidocks.checkpoints.header import TensorEntry
from aidocks.checkpoints.reader import Checkpoint
from aidocks.checkpoints.writer import ShardWriter, plan_shards
from aidocks.errors import CorruptCheckpoint, IncompatibleModels, InvalidSpec
from aidocks.laser.factored import FactoredLinear, linear_weights, load_factored
from aidocks.laser.factors import (
    choose_factored,
    dense_config,
    factor_names,
    factored_config,
    is_factored,
    matrix_name,
    plan_tensors,
    to_dense,
    write_config,
)
from aidocks.laser.matrices import find_matrices
from aidocks.laser.truncation import factors, reduce, weight_basis
from aidocks.models.registry import Registry

TinyLlama = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[3]
RANK = 7

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def make(architecture: str) -> Any:
    """Make a small model with random weights and biases."""
    import transformers as hf

    torch.manual_seed(1)
    if architecture == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, tie_word_embeddings=True))
    elif architecture == "qwen2":
        model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES, tie_word_embeddings=False)).bfloat16()
    elif architecture == "mixtral":
        model = hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_local_experts=3))
    elif architecture == "gpt_neox":
        sizes = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
        model = hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**sizes))
    else:
        special = {"bos_token_id": 0, "eos_token_id": 1}
        model = hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=96, n_embd=48, n_layer=2, n_head=4, n_positions=64, **special)
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)
    return model


def store(source: Path, target: Path, rank: int = RANK) -> dict[str, int]:
    """Store every matrix of a layer as factors that can be; return which those are."""
    checkpoint = Checkpoint(source)
    wanted = {matrix.name: rank for matrix in find_matrices(checkpoint.entries)}
    ranks = choose_factored(checkpoint.entries, wanted, linear_weights(checkpoint.config, list(wanted)))
    (shard,) = plan_shards(plan_tensors(checkpoint.entries, ranks), 10**9)
    with ShardWriter(target, shard) as writer:
        for tensor in shard.tensors:
            if tensor.name in checkpoint.entries:
                writer.copy(tensor.name, checkpoint.entries[tensor.name])
                continue
            name = matrix_name(tensor.name)
            stored = checkpoint.tensor(name)
            pair = factors(stored, weight_basis(stored), rank)
            writer.write(tensor.name, dict(zip(factor_names(name), pair, strict=True))[tensor.name])
    write_config(target, factored_config(checkpoint.config, ranks))
    return ranks


def reduced(model: Any, source: Path, ranks: dict[str, int]) -> Any:
    """Reduce the same matrices in the loaded base."""
    checkpoint = Checkpoint(source)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, rank in ranks.items():
            stored = checkpoint.tensor(name)
            parameters[name].copy_(reduce(stored, weight_basis(stored), rank))
    return model


def parameters_of(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@given(rows=st.integers(2, 4096), columns=st.integers(2, 4096), data=st.data())
def test_factors_are_chosen_exactly_where_they_have_fewer_entries(rows: int, columns: int, data: Any) -> None:
    rank = data.draw(st.integers(0, min(rows, columns)))
    name = "model.layers.0.mlp.up_proj.weight"
    entry = TensorEntry(name, "BF16", (rows, columns), Path("model.safetensors"), 0, 2 * rows * columns)
    assert not choose_factored({name: entry}, {name: rank}, linear=[])
    planned = plan_tensors({name: entry}, {name: rank})
    assert {matrix_name(tensor.name) for tensor in planned} == {name}
    saves = sum(tensor.nbytes for tensor in planned) < entry.nbytes
    assert choose_factored({name: entry}, {name: rank}, linear=[name]) == ({name: rank} if saves else {})


@pytest.mark.parametrize(
    ("architecture", "factored"),
    [("llama", 14), ("qwen2", 14), ("mixtral", 8), ("gpt_neox", 8), ("gpt2", 8)],
)
def test_a_factored_model_is_the_reduced_one_with_fewer_parameters(
    architecture: str, factored: int, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    base = make(architecture)
    base.save_pretrained(tmp_path / "base")
    ranks = store(tmp_path / "base", tmp_path / "factored")
    assert len(ranks) == factored
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "factored", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert isinstance(model, type(base))
    assert model.dtype == base.dtype
    stored = sum(entry.numel for entry in Checkpoint(tmp_path / "factored").entries.values())
    assert parameters_of(model) == stored < parameters_of(base)

    expected = reduced(base, tmp_path / "base", ranks).eval()
    ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    given, wanted = model.eval()(ids).logits, expected(ids).logits
    assert given.dtype == wanted.dtype
    # Of bfloat16, both factors and what is between them are rounded to 8 bits.
    tolerance = 1e-5 if model.dtype == torch.float32 else 2e-2
    assert (given - wanted).abs().max() < tolerance * wanted.abs().max()
    assert model.generation_config.eos_token_id == 1
    mask = torch.ones_like(ids)
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=2)
    assert 12 < tokens.shape[1] <= 16
    if model.dtype == torch.float32:
        same = expected.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=2)
        assert torch.equal(tokens, same)

    model.save_pretrained(tmp_path / "again")
    assert set(Checkpoint(tmp_path / "again").entries) == set(Checkpoint(tmp_path / "factored").entries)
    again = load_factored(tmp_path / "again")
    assert again.config.factor_ranks == ranks
    assert torch.equal(again.eval()(ids).logits, given)


def test_a_layer_of_factors_is_two_linear_layers(tmp_path: Path) -> None:
    base = make("qwen2")
    base.save_pretrained(tmp_path / "base")
    store(tmp_path / "base", tmp_path / "factored")
    layer = load_factored(tmp_path / "factored").model.layers[0].self_attn.k_proj
    assert isinstance(layer, FactoredLinear)
    assert (layer.factor_b.in_features, layer.factor_b.out_features) == (48, RANK)
    assert (layer.factor_a.in_features, layer.factor_a.out_features) == (RANK, 24)
    assert torch.equal(layer.bias, base.model.layers[0].self_attn.k_proj.bias)
    with pytest.raises(AttributeError, match="weight"):
        _ = layer.weight


def test_a_factored_model_learns_and_is_pickled(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "base")
    store(tmp_path / "base", tmp_path / "factored")
    model = load_factored(tmp_path / "factored", dtype=torch.float64)
    ids = torch.randint(3, 96, (2, 12))
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    back = pickle.loads(pickle.dumps(model))
    assert torch.equal(back(ids).logits, model(ids).logits)


@pytest.mark.parametrize("loader", ["AutoModelForCausalLM", "LlamaForCausalLM"])
def test_transformers_alone_refuses_it_and_says_what_to_do(loader: str, tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "base")
    store(tmp_path / "base", tmp_path / "factored")
    code = (
        f"from transformers import {loader}\n"
        "try:\n"
        f"    {loader}.from_pretrained({str(tmp_path / 'factored')!r})\n"
        "except Exception as error:\n"
        "    print('REFUSED', error)\n"
        "else:\n"
        "    print('LOADED')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("REFUSED")
    assert "aidocks.laser.factored" in done.stdout


def test_the_documented_way_to_load_it_in_a_new_process(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "base")
    ranks = store(source, tmp_path / "factored")
    for file in Checkpoint(source).metadata_files():
        (tmp_path / "factored" / file.name).write_bytes(file.read_bytes())
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "import aidocks.laser.factored\n"
        f"path = {str(tmp_path / 'factored')!r}\n"
        "model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False)\n"
        "tokenizer = AutoTokenizer.from_pretrained(path)\n"
        "inputs = tokenizer('Once upon a time', return_tensors='pt')\n"
        "print(len(model.config.factor_ranks), model.generate(**inputs, max_new_tokens=3).shape[0])\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.stdout.split() == [str(len(ranks)), "1"]


def test_a_missing_factor_is_an_error_and_no_random_number(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make("llama").save_pretrained(tmp_path / "base")
    ranks = store(tmp_path / "base", tmp_path / "factored")
    file = tmp_path / "factored" / "model.safetensors"
    tensors = load_file(file)
    lost = factor_names(next(iter(ranks)))[1]
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CorruptCheckpoint, match="factor_b"):
        load_factored(tmp_path / "factored")
    with pytest.raises(CorruptCheckpoint, match="lacks a factor"):
        to_dense(tmp_path / "factored", tmp_path / "dense")


def test_a_config_that_names_what_is_no_linear_layer(tmp_path: Path) -> None:
    make("mixtral").save_pretrained(tmp_path / "base")
    store(tmp_path / "base", tmp_path / "factored")
    path = tmp_path / "factored" / "config.json"
    config = json.loads(path.read_text())
    config["factor_ranks"]["model.layers.0.mlp.gate.weight"] = 2
    path.write_text(json.dumps(config))
    with pytest.raises(IncompatibleModels, match=r"mlp\.gate"):
        load_factored(tmp_path / "factored")
    path.write_text(json.dumps(config | {"factor_ranks": {"model.layers.0.mlp.gate.weight": -1}}))
    with pytest.raises(CorruptCheckpoint, match="factor_ranks"):
        load_factored(tmp_path / "factored")
    path.write_text(json.dumps(config | {"base_model_type": "no-such-model"}))
    with pytest.raises(IncompatibleModels, match="no-such-model"):
        load_factored(tmp_path / "factored")


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_back_to_dense(architecture: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = make(architecture)
    base.save_pretrained(tmp_path / "base")
    ranks = store(tmp_path / "base", tmp_path / "factored")
    written = to_dense(tmp_path / "factored", tmp_path / "dense", max_shard_size="40KB")
    assert {file.path for file in written} == set((tmp_path / "dense").iterdir())
    dense, source = Checkpoint(tmp_path / "dense"), Checkpoint(tmp_path / "base")
    assert dense.config == source.config
    assert list(dense.weight_files) != [tmp_path / "dense" / "model.safetensors"]
    assert {n: (e.dtype, e.shape) for n, e in dense.entries.items()} == {
        n: (e.dtype, e.shape) for n, e in source.entries.items()
    }
    for name in source.entries:
        stored = source.tensor(name)
        if name in ranks:
            expected = reduce(stored, weight_basis(stored), RANK).float()
            error = (dense.tensor(name).float() - expected).norm() / expected.norm()
            assert float(error) < (1e-5 if stored.dtype == torch.float32 else 1e-2)
        else:
            assert torch.equal(dense.tensor(name), stored)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(model) is type(base)


def test_dense_again_is_refused_where_it_makes_no_sense(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "base")
    store(tmp_path / "base", tmp_path / "factored")
    with pytest.raises(IncompatibleModels, match="llama"):
        to_dense(tmp_path / "base", tmp_path / "dense")
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "notes.txt").write_text("mine")
    with pytest.raises(InvalidSpec) as caught:
        to_dense(tmp_path / "factored", tmp_path / "dense")
    assert caught.value.field == "target"
    assert [path.name for path in (tmp_path / "dense").iterdir()] == ["notes.txt"]


def test_a_factored_base_is_factored_further(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "base")
    checkpoint = Checkpoint(tmp_path / "base")
    name, other = (f"model.layers.0.mlp.{kind}_proj.weight" for kind in ("up", "down"))
    stored = checkpoint.tensor(name)
    (shard,) = plan_shards(plan_tensors(checkpoint.entries, {name: 3}), 10**9)
    with ShardWriter(tmp_path / "first", shard) as writer:
        pair = dict(zip(factor_names(name), factors(stored, weight_basis(stored), 3), strict=True))
        for tensor in shard.tensors:
            if tensor.name in pair:
                writer.write(tensor.name, pair[tensor.name])
            else:
                writer.copy(tensor.name, checkpoint.entries[tensor.name])
    first = factored_config(checkpoint.config, {name: 3})
    write_config(tmp_path / "first", first)
    found = [matrix.name for matrix in find_matrices(Checkpoint(tmp_path / "first").entries)]
    assert factor_names(name)[0] in found
    linear = linear_weights(first, found)
    assert other in linear
    assert not {factor for factor in found if matrix_name(factor) != factor} & linear
    second = factored_config(first, {other: 4})
    assert second["factor_ranks"] == {name: 3, other: 4}
    assert dense_config(second) == checkpoint.config
    assert factored_config(first, {}) == first


def test_the_registry_takes_it(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    store(tiny_llama(tmp_path / "base"), tmp_path / "factored")
    registry = Registry(tmp_path / "models")
    info = registry.import_checkpoint("small", tmp_path / "factored")
    assert info.architecture == "FactoredLlamaForCausalLM"
    assert info.dtype == "F32"
    checkpoint = Checkpoint(registry.path("small"))
    assert is_factored(checkpoint.config)
    assert info.parameters == sum(entry.numel for entry in checkpoint.entries.values())
