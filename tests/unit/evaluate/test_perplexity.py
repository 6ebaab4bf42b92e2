from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aidocks.errors import CorruptCheckpoint, IncompatibleModels, InvalidSpec
from aidocks.evaluate.perplexity import Comparison, MeasurePerplexity, PerplexityResult, compare
from aidocks.plan import UnitContext

losses = st.lists(st.floats(0.1, 20), min_size=2, max_size=20)


def result(nll: list[float | None], tokens: int = 10) -> PerplexityResult:
    count = len(nll)
    return PerplexityResult(
        nll=tuple(nll), tokens=(tokens,) * count, positions=tuple(range(count)), dtype="float32"
    )


def test_perplexity_is_weighted_by_tokens() -> None:
    measured = PerplexityResult(nll=(10.0, 60.0), tokens=(10, 20), positions=(0, 1), dtype="float32")
    assert measured.mean_loss == pytest.approx(70 / 30)
    assert measured.perplexity == pytest.approx(math.exp(70 / 30))
    # Chunk losses 1 and 3: standard deviation sqrt(2), standard error 1.
    assert measured.standard_error == pytest.approx(math.exp(70 / 30))


def test_the_paired_error_ignores_the_spread_between_chunks() -> None:
    before = result([10.0, 50.0, 200.0, 30.0])
    after = result([9.0, 49.5, 199.0, 29.5])
    comparison = compare(before, after)
    assert comparison.delta == pytest.approx(-0.075)
    assert comparison.standard_error == pytest.approx(0.05 / math.sqrt(3) / 2)
    assert comparison.z is not None
    assert comparison.z == pytest.approx(-0.075 / (0.05 / math.sqrt(3) / 2))
    assert comparison.improved(5)
    assert not comparison.improved(6)
    assert compare(after, before).worsened(5)


@given(before=losses, data=st.data())
def test_no_loss_that_is_not_finite_ever_counts_as_better(before: list[float], data: st.DataObject) -> None:
    after: list[float | None] = list(before)
    after[data.draw(st.integers(0, len(before) - 1))] = None
    for one, other in ((result(list(before)), result(after)), (result(after), result(list(before)))):
        comparison = compare(one, other)
        assert not comparison.improved(1e-9)
        assert comparison.worsened(1e-9)
    assert result(after).perplexity is None
    assert result(after).standard_error is None


@given(before=losses)
def test_no_change_is_neither_better_nor_worse(before: list[float]) -> None:
    comparison = compare(result(list(before)), result(list(before)))
    assert comparison == Comparison(delta=0.0, standard_error=0.0, z=None)
    assert not comparison.improved(1e-9)
    assert not comparison.worsened(1e-9)


@given(before=losses, shift=st.floats(0.01, 5))
def test_results_survive_json(before: list[float], shift: float) -> None:
    comparison = compare(result(list(before)), result([loss + shift for loss in before]))
    assert comparison.z is not None
    assert comparison.z > 0
    assert Comparison.model_validate_json(comparison.model_dump_json()) == comparison


def measure(model: Path, context: UnitContext, **fields: Any) -> PerplexityResult:
    unit = MeasurePerplexity(model=model, **({"text": "prose", "seq_length": 64, "chunks": 6} | fields))
    assert MeasurePerplexity.model_validate_json(unit.model_dump_json()).unit_id == unit.unit_id
    return unit.run(context)


def test_losses_are_those_of_transformers(stories260k: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from aidocks.evaluate.texts import TextSource, read_text

    context = UnitContext(tmp_path)
    measured = measure(stories260k, context)
    network = AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    ids = tokenizer(read_text(TextSource(name="prose")), add_special_tokens=False)["input_ids"]
    for position, nll, tokens in zip(measured.positions, measured.nll, measured.tokens, strict=True):
        chunk = torch.tensor([ids[64 * position : 64 * position + 64]])
        with torch.no_grad():
            expected = network(input_ids=chunk, labels=chunk).loss.item()
        assert tokens == 63
        assert nll == pytest.approx(63 * expected, rel=1e-5)


def test_the_same_measurement_gives_the_same_bits(stories260k: Path, tmp_path: Path) -> None:
    first = measure(stories260k, UnitContext(tmp_path))
    assert measure(stories260k, UnitContext(tmp_path)) == first
    assert first.dtype == "float32"


def test_splits_are_different_chunks(stories260k: Path, tmp_path: Path) -> None:
    context = UnitContext(tmp_path)
    search = measure(stories260k, context, split="search")
    held_out = measure(stories260k, context, split="held_out")
    assert not set(search.positions) & set(held_out.positions)


def test_infinite_weights_give_a_loss_that_is_not_finite(tiny_llama: Any, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    path = tiny_llama(tmp_path / "model")
    network = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        network.model.norm.weight[0] = math.nan
    network.save_pretrained(path)
    measured = measure(path, UnitContext(tmp_path))
    assert set(measured.nll) == {None}
    assert measured.perplexity is None
    assert PerplexityResult.model_validate_json(measured.model_dump_json()) == measured


def test_chunks_longer_than_the_context_are_refused(stories260k: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match="context of 512"):
        measure(stories260k, UnitContext(tmp_path), seq_length=513)


def test_what_is_no_language_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(IncompatibleModels, match="does not load"):
        measure(tmp_path, UnitContext(tmp_path))


def test_missing_weights_are_not_filled_with_random_ones(tiny_llama: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = tiny_llama(tmp_path / "model") / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(CorruptCheckpoint, match=r"lacks 1 .* model\.layers\.1\.mlp\.up_proj\.weight"):
        measure(tmp_path / "model", UnitContext(tmp_path))
