"""One model, or the plain average of several, on several texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from aidocks.errors import IncompatibleModels
from aidocks.evaluate.domains import DomainResults, MeasureDomains
from aidocks.evaluate.perplexity import MeasurePerplexity
from aidocks.evaluate.texts import Domain, TextSource
from aidocks.plan import UnitContext

PROSE = Domain(name="text", text=TextSource(name="prose"), chunks=3)
SAYINGS = Domain(
    name="experts[0]",
    text=TextSource(
        name="sayings", records=tuple(f"Saying {i}: " + "never say never. " * 9 for i in range(30))
    ),
    chunks=2,
)


def measure(tmp_path: Path, *models: Path, **fields: Any) -> DomainResults:
    unit = MeasureDomains(models=models, **({"domains": (PROSE,), "seq_length": 32} | fields))
    assert MeasureDomains.model_validate_json(unit.model_dump_json()).unit_id == unit.unit_id
    result = unit.run(UnitContext(tmp_path))
    assert DomainResults.model_validate_json(result.model_dump_json()) == result
    return result


def save_average(target: Path, paths: list[Path], dtype: torch.dtype) -> Path:
    """Write what the unit only computes."""
    networks = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in paths]
    states = [network.state_dict() for network in networks]
    mean = {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
    networks[0].load_state_dict(mean)
    networks[0].to(dtype).save_pretrained(target)
    for file in paths[0].glob("tokenizer*"):
        (target / file.name).write_bytes(file.read_bytes())
    return target


def tiny(architecture: str, path: Path, seed: int, tokenizer_of: Path, **overrides: Any) -> Path:
    from transformers import AutoConfig

    settings: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 2,
    }
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **(settings | overrides))
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    for file in tokenizer_of.glob("tokenizer*"):
        (path / file.name).write_bytes(file.read_bytes())
    return path


def test_one_model_on_several_texts(tmp_path: Path, tiny_llama: Any) -> None:
    model = tiny_llama(tmp_path / "model")
    prose, sayings = measure(tmp_path, model, domains=(PROSE, SAYINGS)).results
    alone = MeasurePerplexity(model=model, chunks=3, seq_length=32).run(UnitContext(tmp_path))
    assert prose == alone
    assert sayings.total_tokens == 2 * 31
    searched = measure(tmp_path, model, domains=(SAYINGS,), split="search").results[0]
    assert not set(searched.positions) & set(sayings.positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_an_average_is_that_of_the_weights(
    dtype: torch.dtype, tied: bool, tmp_path: Path, tiny_llama: Any
) -> None:
    paths = [
        tiny_llama(tmp_path / f"model-{seed}", seed=seed, dtype=dtype, tie_word_embeddings=tied)
        for seed in range(3)
    ]
    before = [(path / "model.safetensors").read_bytes() for path in paths]
    expected = measure(tmp_path, save_average(tmp_path / "average", paths, dtype))
    assert measure(tmp_path, *paths) == expected
    assert measure(tmp_path, paths[0]) != expected
    assert before == [(path / "model.safetensors").read_bytes() for path in paths]


@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "qwen3", "phi3"])
def test_averages_of_other_dense_models(architecture: str, tmp_path: Path, tiny_llama: Any) -> None:
    tokenizer = tiny_llama(tmp_path / "llama")
    paths = [tiny(architecture, tmp_path / f"model-{seed}", seed, tokenizer) for seed in range(2)]
    expected = measure(tmp_path, save_average(tmp_path / "average", paths, torch.float32))
    assert measure(tmp_path, *paths) == expected


def test_a_model_that_is_named_twice_counts_twice(tmp_path: Path, tiny_llama: Any) -> None:
    one, other = (tiny_llama(tmp_path / f"model-{seed}", seed=seed) for seed in range(2))
    found = measure(tmp_path, one, one, other).results[0].mean_loss
    expected = measure(tmp_path, save_average(tmp_path / "average", [one, one, other], torch.float32))
    assert found == pytest.approx(expected.results[0].mean_loss, rel=1e-6)
    assert measure(tmp_path, one, one, one).results[0].mean_loss == pytest.approx(
        measure(tmp_path, one).results[0].mean_loss, rel=1e-6
    )


def test_the_average_and_its_first_model_do_not_share_weights(tmp_path: Path, tiny_llama: Any) -> None:
    context = UnitContext(tmp_path)
    one, other = (tiny_llama(tmp_path / f"model-{seed}", seed=seed) for seed in range(2))
    alone = MeasureDomains(models=(one,), domains=(PROSE,), seq_length=32)
    before = alone.run(context)
    average = MeasureDomains(models=(one, other), domains=(PROSE,), seq_length=32).run(context)
    assert alone.run(context) == before != average


def test_rows_that_one_vocabulary_lacks_are_those_of_the_others(tmp_path: Path, tiny_llama: Any) -> None:
    small = tiny_llama(tmp_path / "small")
    large = tiny_llama(tmp_path / "large", seed=1, vocab_size=520)
    from aidocks.checkpoints.reader import Checkpoint
    from aidocks.evaluate.domains import load_average

    name = "model.embed_tokens.weight"
    stored = [Checkpoint(path).tensor(name) for path in (large, small)]
    found = load_average([large, small], None, "cpu").network.get_input_embeddings().weight
    assert torch.allclose(found[:512], (stored[0][:512] + stored[1]) / 2)
    assert torch.equal(found[512:], stored[0][512:])


def test_models_of_other_forms_have_no_average(tmp_path: Path, tiny_llama: Any) -> None:
    one = tiny_llama(tmp_path / "one")
    for name, overrides, message in (
        ("shallow", {"num_hidden_layers": 2}, "shallow has no tensor 'model.layers.2"),
        ("wide", {"intermediate_size": 200}, r"\[200, 64\] in wide, but \[176, 64\] in one"),
        ("untied", {"tie_word_embeddings": False}, "untied has an output matrix of its own"),
    ):
        other = tiny_llama(tmp_path / name, seed=1, **overrides)
        with pytest.raises(IncompatibleModels, match=message):
            measure(tmp_path, one, other)


def test_labels_name_what_is_measured(tmp_path: Path) -> None:
    unit = MeasureDomains(models=(tmp_path / "a", tmp_path / "b"), domains=(PROSE, SAYINGS))
    assert unit.label == "a + b on 2 texts (held-out)"
    assert unit.model_copy(update={"subject": "average"}).label.startswith("average on")
    assert unit.weight == 5 * 128
