"""Router rows against a plain computation of the same definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from aidocks.checkpoints.reader import Checkpoint
from aidocks.moe import gates


def rows(path: Path) -> torch.Tensor:
    """Return the router rows of a built model, [layers, experts, hidden]."""
    stored = Checkpoint(path)
    names = sorted(name for name in stored.entries if name.endswith("block_sparse_moe.gate.weight"))
    assert len(names) == stored.config["num_hidden_layers"]
    return torch.stack([stored.tensor(name) for name in names]).double()


def last_hidden_states(prompts: list[str], path: Path) -> torch.Tensor:
    """Return the mean over prompts of what enters each layer at the last token, padded on the left."""
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    texts = [f"{tokenizer.bos_token}{prompt}" for prompt in prompts]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    with torch.inference_mode():
        states = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            position_ids=positions,
            output_hidden_states=True,
        ).hidden_states
    return torch.stack([state[:, -1].double().mean(0) for state in states[:-1]])


def test_hidden_rows_are_mean_difference_of_last_states(tmp_path: Path, tiny_llama: Any, build: Any) -> None:
    base = tiny_llama(tmp_path / "base")
    positive, negative = (
        ["def f(x):", "import os", "a much longer prompt than the others"],
        ["Once upon", "time"],
    )
    built = build(
        base,
        [
            {"source_model": str(base), "positive_prompts": positive, "negative_prompts": negative},
            {"source_model": str(base), "positive_prompts": negative},
        ],
    )
    wanted = torch.stack(
        [
            last_hidden_states(positive, base) - last_hidden_states(negative, base),
            last_hidden_states(negative, base),
        ],
        dim=1,
    )
    found = rows(built.path)
    assert torch.nn.functional.cosine_similarity(found, wanted, dim=-1).min() > 0.9999
    assert torch.allclose(found.norm(dim=-1), torch.ones(4, 2, dtype=torch.float64), atol=1e-5)


def test_cheap_rows_are_sums_of_token_embeddings(tmp_path: Path, tiny_llama: Any, build: Any) -> None:
    base = tiny_llama(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    embedding = Checkpoint(base).tensor("model.embed_tokens.weight").double()
    prompts = [["def f(x):", "import os"], ["Once upon a time"]]
    built = build(
        base, [{"source_model": str(base), "positive_prompts": p} for p in prompts], gate_mode="cheap_embed"
    )
    found = rows(built.path)
    for number, texts in enumerate(prompts):
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        wanted = torch.stack([embedding[row].sum(0) for row in ids]).mean(0)
        for layer in range(4):
            assert torch.nn.functional.cosine_similarity(found[layer, number], wanted, dim=0) > 0.999999


def test_random_rows_follow_the_seed(tmp_path: Path, tiny_llama: Any, build: Any) -> None:
    base = tiny_llama(tmp_path / "base")
    experts = [{"source_model": str(base)}] * 3
    one, same, other = (build(base, experts, gate_mode="random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(rows(one.path), rows(same.path))
    assert not torch.equal(rows(one.path), rows(other.path))
    assert rows(one.path).norm(dim=-1) == pytest.approx(1.0, abs=1e-6)


def test_averaged_rows_are_those_of_all_tokens(tmp_path: Path, tiny_llama: Any, build: Any) -> None:
    base = tiny_llama(tmp_path / "base")
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base).eval()
    prompts = [["def f(x):", "import os, sys"], ["Once upon a time"]]
    built = build(
        base, [{"source_model": str(base), "positive_prompts": p} for p in prompts], gate_mode="hidden_avg"
    )
    found = rows(built.path)
    for number, texts in enumerate(prompts):
        wanted = []
        for text in texts:
            ids = tokenizer(f"{tokenizer.bos_token}{text}", add_special_tokens=False, return_tensors="pt")[
                "input_ids"
            ]
            with torch.inference_mode():
                states = model(input_ids=ids, output_hidden_states=True).hidden_states
            wanted.append(torch.stack([state[0].double().mean(0) for state in states[:-1]]))
        mean = torch.stack(wanted).mean(0)
        assert torch.nn.functional.cosine_similarity(found[:, number], mean, dim=-1).min() > 0.999999


def test_uniform_rows_are_those_of_a_new_linear_layer(tmp_path: Path, tiny_llama: Any, build: Any) -> None:
    base = tiny_llama(tmp_path / "base")
    experts = [{"source_model": str(base)}] * 3
    one, other = (build(base, experts, gate_mode="uniform_random", seed=seed) for seed in (1, 2))
    found = rows(one.path)
    bound = 64**-0.5
    assert float(found.abs().max()) <= bound
    assert float(found.std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not torch.equal(found, rows(other.path))


def test_condition_number_tells_parallel_rows() -> None:
    orthogonal = np.eye(3, 8)[None]
    nearly = np.array([[[1.0, 0.0], [1.0, 0.01]]])
    parallel = np.array([[[1.0, 0.0], [1.0, 0.0]]])
    assert gates.condition_numbers(orthogonal) == [1.0]
    (value,) = gates.condition_numbers(nearly)
    assert value is not None
    assert value > 100
    assert gates.condition_numbers(parallel) == [None]


def test_a_prompt_longer_than_the_context_counts_by_its_end(
    tmp_path: Path, tiny_llama: Any, build: Any
) -> None:
    base = tiny_llama(tmp_path / "base", max_position_embeddings=64)
    tail = " and so on" * 200
    built = build(
        base,
        [
            {"source_model": str(base), "positive_prompts": [f"beginning {tail}"]},
            {"source_model": str(base), "positive_prompts": [f"another start {tail}"]},
            {"source_model": str(base), "positive_prompts": ["short"]},
        ],
    )
    assert any("2 prompts are longer" in line for line in built.said)
    found = rows(built.path)
    assert torch.equal(found[:, 0], found[:, 1])


def test_people_are_told_of_rows_that_tell_nothing_apart(tmp_path: Path, tiny_llama: Any, build: Any) -> None:
    base = tiny_llama(tmp_path / "base")
    built = build(
        base,
        [
            {"source_model": str(base), "positive_prompts": ["same", "words"]},
            {"source_model": str(base), "positive_prompts": ["words", "same"]},
            {"source_model": str(base), "positive_prompts": ["other"]},
        ],
    )
    assert any("experts[0] and experts[1] have the same prompts" in line for line in built.said)
    assert any("nearly parallel" in line and "infinite" in line for line in built.said)
    assert built.result.gate_condition is None
