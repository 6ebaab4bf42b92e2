"""A loaded model whose tensors are overwritten: what is measured is what a file would hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aidocks.checkpoints.reader import Checkpoint
from aidocks.errors import IncompatibleModels
from aidocks.evaluate.causal_lm import load
from aidocks.merge.evolve.measuring import MeasureMerge
from aidocks.merge.evolve.workbench import MergeBench
from aidocks.merge.recipe import Operand, Source, TensorMerge
from aidocks.merge.shard import OpenedSources, merge_tensor
from aidocks.plan import UnitContext
from tests.support.merge_jobs import add_adapter
from tests.unit.merge.test_evolution import OBJECTIVE

SHAPE = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48}
Pair = tuple[Path, Path]


@pytest.fixture
def llamas(tiny_llama: Any, tmp_path: Path) -> Pair:
    one, other = (tiny_llama(tmp_path / f"llama-{seed}", seed=seed, **SHAPE) for seed in (1, 2))
    return one, other


@pytest.fixture
def mixtrals(llamas: Pair, tmp_path: Path) -> Pair:
    """Mixtures whose experts transformers keeps as slices of larger tensors."""
    from transformers import MixtralConfig, MixtralForCausalLM

    made: list[Path] = []
    for seed, llama in enumerate(llamas):
        torch.manual_seed(seed)
        config = MixtralConfig(
            vocab_size=512,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=3,
            tie_word_embeddings=False,
            **SHAPE,
        )
        path = tmp_path / f"mixtral-{seed}"
        MixtralForCausalLM(config).save_pretrained(path)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (path / name).write_bytes((llama / name).read_bytes())
        made.append(path)
    return made[0], made[1]


def halves(
    pair: Pair, weight: float = 0.5, dtype: str = "F32"
) -> tuple[tuple[Source, ...], list[TensorMerge]]:
    """Return the recipes of the weighted sum of two models."""
    sources = tuple(Source(reference=path.name, checkpoint=path) for path in pair)
    tensors = [
        TensorMerge(
            name=name,
            dtype=dtype,
            shape=entry.shape,
            operands=tuple(Operand(source=number, tensor=name) for number in range(2)),
            method="linear",
            values={"weight": [1 - weight, weight], "normalize": False},
        )
        for name, entry in Checkpoint(pair[0]).entries.items()
    ]
    return sources, tensors


def bench(path: Path) -> MergeBench:
    return MergeBench(load(path, None, "cpu"), Checkpoint(path))


def state(model: MergeBench) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.model.network.state_dict().items()}


@pytest.mark.parametrize("kind", ["llamas", "mixtrals"])
def test_every_parameter_becomes_the_merged_one_and_itself_again(
    kind: str, request: pytest.FixtureRequest
) -> None:
    pair: Pair = request.getfixturevalue(kind)
    first, second = (bench(path) for path in pair)
    before, other = state(first), state(second)
    sources, tensors = halves(pair, 0.25)
    first.apply(tensors, sources)
    for name, value in state(first).items():
        torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * other[name], rtol=1e-6, atol=1e-7)
    first.apply(tensors[:1], sources)
    first.apply([], sources)
    assert all(torch.equal(value, before[name]) for name, value in state(first).items())


def test_values_are_rounded_as_a_file_would_hold_them(llamas: Pair) -> None:
    made = bench(llamas[0])
    sources, tensors = halves(llamas, dtype="BF16")
    made.apply(tensors, sources)
    assert all(torch.equal(value, value.bfloat16().float()) for value in state(made).values())


def test_only_what_differs_is_computed(llamas: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from aidocks.merge.evolve import workbench as module

    made: list[str] = []
    plain: Callable[..., Any] = module.merge_tensor

    def counted(tensor: TensorMerge, *args: Any, **more: Any) -> Any:
        made.append(tensor.name)
        return plain(tensor, *args, **more)

    monkeypatch.setattr(module, "merge_tensor", counted)
    worker = bench(llamas[0])
    sources, tensors = halves(llamas)
    worker.apply(tensors, sources)
    assert len(made) == len(tensors)
    worker.apply(tensors, sources)
    assert len(made) == len(tensors)
    worker.apply(
        [tensors[0].model_copy(update={"values": {"weight": [1, 0], "normalize": False}}), *tensors[1:]],
        sources,
    )
    assert made[len(tensors) :] == [tensors[0].name]
    worker.apply(tensors, sources, seed=1)
    assert len(made) == 2 * len(tensors) + 1


@pytest.mark.parametrize("compute_dtype", ["float32", "float64"])
def test_what_is_measured_is_what_is_written_with_adapters_too(
    compute_dtype: str, llamas: Pair, tmp_path: Path
) -> None:
    adapter = add_adapter(tmp_path / "adapter", modules=("model.layers.0.self_attn.q_proj",))
    (_, other), tensors = halves(llamas, 0.3)
    sources = (Source(reference="adapted", checkpoint=llamas[0], adapter=adapter), other)
    worker = bench(llamas[0])
    # In another type first: nothing of it may stay.
    for dtype in ("float32", "float64", compute_dtype):
        worker.apply(tensors, sources, compute_dtype=dtype)
    opened = OpenedSources(sources, compute_dtype)
    for tensor in tensors:
        written = torch.cat(list(merge_tensor(tensor, opened, compute_dtype=compute_dtype)))
        assert torch.equal(worker.model.network.state_dict()[tensor.name].view(written.shape), written)


def test_values_too_large_for_the_type_are_a_fault_of_the_candidate(llamas: Pair, tmp_path: Path) -> None:
    sources, tensors = halves(llamas, 1e9, "F16")

    def unit(chosen: list[TensorMerge]) -> MeasureMerge:
        sized = OBJECTIVE.model_copy(update={"seq_length": 16})
        return MeasureMerge(
            host=llamas[0],
            sources=sources,
            tensors=tuple(chosen),
            objectives=(sized,),
            part="search",
            subject="x",
        )

    worker = UnitContext(tmp_path)
    before = unit([]).run(worker)
    failed = unit(tensors).run(worker)
    assert not failed.losses
    assert "too large for float16" in str(failed.fault)
    # What was interrupted leaves nothing behind.
    assert unit([]).run(worker) == before


def test_a_tensor_without_a_counterpart_is_refused(llamas: Pair) -> None:
    sources, tensors = halves(llamas)
    made = bench(llamas[0])
    with torch.no_grad():
        made.model.network.model.norm.weight.mul_(2)
    with pytest.raises(IncompatibleModels, match=r"norm\.weight") as caught:
        made.apply(tensors, sources)
    assert caught.value.value == "model.norm.weight"


def test_tensors_that_no_model_reads_are_passed_over(llamas: Pair) -> None:
    from safetensors.torch import load_file, save_file

    for path in llamas:
        weights = load_file(path / "model.safetensors")
        weights["model.unread.weight"] = torch.ones(4)
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    sources, tensors = halves(llamas)
    assert any("unread" in tensor.name for tensor in tensors)
    bench(llamas[0]).apply(tensors, sources)
