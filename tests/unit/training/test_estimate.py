"""Memory and operations of a training, and the choice of what DeepSpeed divides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aidocks.checkpoints.reader import Checkpoint
from aidocks.errors import InvalidSpec
from aidocks.specs.train_settings import DeepSpeed
from aidocks.training.device import TrainingDevice
from aidocks.training.estimate import (
    LLMSetup,
    Setup,
    activation_bytes,
    flops_per_token,
    largest_batch,
    longest_length,
    memory_of,
)
from aidocks.training.fitting import CALL_S_CPU, available_bytes, choose, deepspeed_config, sentence
from aidocks.training.run import AdapterSettings, LLMHyperparameters
from aidocks.training.shapes import ModelShape, shape_of

BILLION = ModelShape(
    entries={},
    parameters=1_000_000_000,
    embedding=50_000_000,
    linear=(),
    hidden=2048,
    keys=512,
    heads=16,
    mlp=8192,
    layers=16,
    vocabulary=32_000,
    context=4096,
)
HYPER = LLMHyperparameters(learning_rate=1e-4, per_device_train_batch_size=4, max_length=512)
FULL = LLMSetup(
    shape=BILLION,
    method="sft",
    adapter=AdapterSettings(kind="full"),
    hyper=HYPER,
    precision="bfloat16",
    members=4,
    cuda=True,
)


def with_hyper(setup: Setup, **changes: Any) -> Setup:
    return replace(setup, hyper=setup.hyper.model_copy(update=changes))


@pytest.fixture(scope="module")
def shape(stories260k: Path) -> ModelShape:
    model = Checkpoint(stories260k)
    return shape_of(model.config, model.entries)


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_trained_parameters_are_those_of_peft(shape: ModelShape, stories260k: Path, adapter: Any) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(stories260k)
    config = LoraConfig(r=8, target_modules="all-linear", use_dora=adapter == "dora", task_type="CAUSAL_LM")
    wanted, _ = get_peft_model(model, config).get_nb_trainable_parameters()
    assert shape.trained(AdapterSettings(kind=adapter, rank=8)) == wanted


def test_trained_tensors_of_layers_are_counted_by_their_patterns(shape: ModelShape) -> None:
    chosen = shape.trained(AdapterSettings(kind="layers", layers=(r"layers\.0\.mlp",)))
    assert 0 < chosen < shape.trained(AdapterSettings(kind="full")) == shape.parameters


def test_states_are_divided_as_zero_says() -> None:
    by_stage = {stage: memory_of(replace(FULL, stage=stage)) for stage in (0, 1, 2, 3)}
    # bfloat16 weights and gradients, float32 copies and two moments.
    assert by_stage[0].weights + by_stage[0].gradients + by_stage[0].optimizer == 16 * BILLION.parameters
    assert by_stage[1].optimizer == by_stage[0].optimizer // 4
    assert by_stage[2].gradients == by_stage[0].gradients // 4
    assert by_stage[3].weights < by_stage[0].weights / 2
    totals = [by_stage[stage].total for stage in (0, 1, 2, 3)]
    assert totals == sorted(totals, reverse=True)


def test_offload_takes_states_off_the_device() -> None:
    kept = memory_of(replace(FULL, stage=2, offload=True))
    assert (kept.optimizer, kept.gradients) == (0, 0)


def test_checkpointing_keeps_less_and_computes_more() -> None:
    checkpointed = with_hyper(FULL, gradient_checkpointing=True)
    assert activation_bytes(checkpointed) < activation_bytes(FULL) / 4
    assert flops_per_token(checkpointed) == pytest.approx(flops_per_token(FULL) * 4 / 3)


def test_an_adapter_costs_two_thirds_of_all_weights() -> None:
    adapter = replace(FULL, adapter=AdapterSettings(kind="prompt_tuning"))
    assert flops_per_token(adapter) == pytest.approx(flops_per_token(FULL) * 2 / 3)


def test_a_reference_is_held_where_no_adapter_can_be_taken_off() -> None:
    pairs = replace(FULL, method="dpo")
    assert memory_of(pairs).weights - memory_of(FULL).weights == 4 * BILLION.parameters
    assert memory_of(replace(pairs, method="orpo")).weights == memory_of(FULL).weights
    lora = replace(FULL, adapter=AdapterSettings())
    assert memory_of(replace(lora, method="kto")).weights == memory_of(lora).weights
    # An online method has one only where something pulls to it.
    assert memory_of(with_hyper(replace(FULL, method="grpo"), beta=0.0)).weights == memory_of(FULL).weights
    assert memory_of(with_hyper(replace(FULL, method="grpo"), beta=0.1)).weights == memory_of(pairs).weights


def test_pairs_are_two_sequences() -> None:
    assert activation_bytes(replace(FULL, method="dpo")) == 2 * activation_bytes(FULL)


def test_data_of_short_rows_need_no_room_for_long_ones() -> None:
    assert memory_of(replace(FULL, longest=100)).total < memory_of(FULL).total
    packed = with_hyper(replace(FULL, longest=100), packing=True)
    assert memory_of(packed).total == memory_of(FULL).total


@settings(deadline=None)
@given(batch=st.integers(1, 64), length=st.integers(64, 4096), share=st.floats(0.01, 2))
def test_what_would_fit_fits_and_one_more_does_not(batch: int, length: int, share: float) -> None:
    setup = with_hyper(FULL, per_device_train_batch_size=batch, max_length=length)
    available = int(memory_of(setup).total * share)
    fitting = largest_batch(setup, available)
    if fitting:
        assert memory_of(with_hyper(setup, per_device_train_batch_size=fitting)).total <= available
    if fitting < batch:
        more = with_hyper(setup, per_device_train_batch_size=fitting + 1)
        assert memory_of(more).total > available
    tokens = longest_length(setup, available)
    assert tokens % 64 == 0
    if tokens:
        short = with_hyper(setup, per_device_train_batch_size=1, max_length=tokens)
        assert memory_of(short).total <= available


def test_the_least_stage_that_fits_is_chosen() -> None:
    ways = [(1, False), (2, False), (3, False), (3, True)]
    needs = [memory_of(replace(FULL, stage=stage, offload=offload)).total for stage, offload in ways]
    assert needs == sorted(needs, reverse=True)
    for way, needed in zip(ways, needs, strict=True):
        found = choose(FULL, DeepSpeed(), needed).setup
        # Offload comes last, whether or not a lower stage with it would need less.
        assert (found.stage, found.offload) in (way, (2, True))
    assert choose(FULL, DeepSpeed(), memory_of(FULL).total).setup.stage is None
    quantised = replace(FULL, adapter=AdapterSettings(kind="qlora"))
    with pytest.raises(InvalidSpec):
        choose(quantised, DeepSpeed(), 2 * 10**9)


def test_without_gpus_nothing_is_divided() -> None:
    alone = replace(FULL, cuda=False, precision="float32")
    with pytest.raises(InvalidSpec):
        choose(alone, DeepSpeed(), int(14e9))
    for asked in (DeepSpeed(), DeepSpeed(offload=True)):
        assert choose(alone, asked, int(1e12)).setup.stage is None


def test_small_models_take_as_long_as_their_calls() -> None:
    device = cpu(flops=1e15)
    fit = choose(replace(FULL, cuda=False, members=1), DeepSpeed(), int(1e12))
    told = fit.estimate(device, 1, steps=10, tokens_per_epoch=1000, tokens_per_step=100)
    assert told.seconds == pytest.approx(10 * 3 * BILLION.layers * CALL_S_CPU, rel=0.1)
    assert told.tokens_per_s == pytest.approx(10 * 100 / told.seconds)


def test_what_cannot_fit_is_refused_with_what_would() -> None:
    off = DeepSpeed.model_validate("off")
    small = replace(FULL, adapter=AdapterSettings(kind="prompt_tuning"))
    available = memory_of(with_hyper(small, per_device_train_batch_size=2)).total
    with pytest.raises(InvalidSpec) as refused:
        choose(small, off, available)
    assert refused.value.field == "per_device_train_batch_size"
    assert "A batch of 2 fits" in str(refused.value)
    with pytest.raises(InvalidSpec) as refused:
        choose(small, off, memory_of(with_hyper(small, per_device_train_batch_size=1)).total - 1)
    assert refused.value.field == "max_length"
    with pytest.raises(InvalidSpec) as refused:
        choose(FULL, off, int(4e9))
    assert refused.value.field == "base_model"
    assert "adapter: lora" in str(refused.value)


def test_a_stage_that_is_asked_for_is_taken() -> None:
    fit = choose(FULL, DeepSpeed.model_validate("3-offload"), int(80e9))
    assert deepspeed_config(fit.setup, DeepSpeed.model_validate("3-offload")) == {
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "cpu", "pin_memory": True},
        }
    }
    assert deepspeed_config(choose(FULL, DeepSpeed(), int(80e9)).setup, DeepSpeed()) is None


def cpu(flops: float) -> TrainingDevice:
    return TrainingDevice(
        name="CPU",
        cuda=False,
        memory=10_000,
        cores=2,
        machine_cores=2,
        machine_memory=10_000,
        precision="float32",
        flops=flops,
    )


def test_members_on_one_machine_share_its_memory() -> None:
    device = cpu(flops=1e9)
    assert available_bytes(device, 2, None, spread=False) == 4500
    assert available_bytes(device, 2, None, spread=True) == 9000
    assert available_bytes(device, 1, 2000, spread=False) == 1800
    fit = choose(replace(FULL, cuda=False), DeepSpeed(), int(1e12))
    told = sentence(fit.estimate(device, 1, steps=10, tokens_per_epoch=1000, tokens_per_step=100))
    assert "1,000,000,000 of 1,000,000,000 parameters" in told
    assert "10 steps" in told
