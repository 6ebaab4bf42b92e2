"""Whether a training fits its workers, and how: the least that DeepSpeed has to divide, or what would fit instead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from aidocks.checkpoints.space import format_bytes
from aidocks.errors import InvalidSpec
from aidocks.specs.train_llm_result import TrainEstimate
from aidocks.specs.train_settings import DeepSpeed
from aidocks.training.device import TrainingDevice
from aidocks.training.estimate import (
    USABLE,
    Memory,
    Setup,
    Stage,
    calls_per_step,
    flops_per_token,
    largest_batch,
    longest_length,
    memory_of,
)

#: Share of the speed of a large matrix product that trainings of the kind come to: what is measured of small models
#: on a core, and what is common on GPUs (arXiv 2205.05198, table 5: 42 to 57 % of the peak, with larger products).
EFFICIENCY_CPU, EFFICIENCY_GPU = 0.5, 0.4
#: Time of a call of a layer, forward, of whatever size; orders of magnitude: of steps of a model of five layers on a
#: busy machine, and assumed of GPUs.
CALL_S_CPU, CALL_S_GPU = 2e-3, 5e-4


@dataclass(frozen=True)
class Fit:
    """How a training runs on its workers.

    Attributes:
        setup: With the stage that was chosen.
        memory: Of one process.
        available: Bytes that one process may plan with.
    """

    setup: Setup
    memory: Memory
    available: int

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.available

    def estimate(
        self, device: TrainingDevice, cores: float, steps: int, tokens_per_epoch: int, tokens_per_step: float
    ) -> TrainEstimate:
        """Return the figures for people.

        Args:
            device: That the workers train on.
            cores: Of one process, on a CPU.
            steps: Of the optimiser.
            tokens_per_epoch: Of all examples, as far as they are not cut.
            tokens_per_step: What one step of all processes sees, on average.
        """
        speed = self._flops(device, cores)
        computing = tokens_per_step * flops_per_token(self.setup) / (speed * self.setup.members)
        # Small models take as long as their operations take to be called, whatever these compute.
        seconds = computing + calls_per_step(self.setup) * (CALL_S_GPU if device.cuda else CALL_S_CPU)
        return TrainEstimate(
            parameters=self.setup.shape.parameters,
            trainable=self.setup.trained,
            weights_bytes=self.memory.weights,
            gradients_bytes=self.memory.gradients,
            optimizer_bytes=self.memory.optimizer,
            activations_bytes=self.memory.activations,
            total_bytes=self.memory.total,
            available_bytes=self.available,
            fits=self.fits,
            deepspeed_stage=self.setup.stage,
            offload=self.setup.offload,
            workers=self.setup.members,
            steps=steps,
            tokens_per_epoch=tokens_per_epoch,
            tokens_per_s=tokens_per_step / seconds,
            seconds=steps * seconds,
        )

    def _flops(self, device: TrainingDevice, cores: float) -> float:
        if device.cuda:
            return EFFICIENCY_GPU * device.flops
        return EFFICIENCY_CPU * device.flops * cores / device.cores


def available_bytes(device: TrainingDevice, members: int, reserved: int | None, spread: bool) -> int:
    """Return the bytes that one process may plan with.

    Args:
        device: That the workers train on.
        members: Processes.
        reserved: What the request reserves for each; None where it says nothing.
        spread: Whether they are on different machines; else, without GPUs, they share the memory of one.
    """
    if device.cuda:
        return int(USABLE * device.memory)
    shared = device.memory // (1 if spread else max(1, members))
    return int(USABLE * min(reserved or shared, shared))


def choose(setup: Setup, asked: DeepSpeed, available: int) -> Fit:
    """Return how a training runs: as asked for, or with the least that DeepSpeed has to divide.

    Without DeepSpeed first, then one stage after another, offload last: what is divided has to be sent.

    Raises:
        InvalidSpec: It cannot fit; says what it needs, what there is, and what would fit.
    """
    tried = [Fit(option, memory_of(option), available) for option in _options(setup, asked)]
    found = next((fit for fit in tried if fit.fits), None)
    if found is not None:
        return found
    raise refusal(tried[-1], asked)


def _options(setup: Setup, asked: DeepSpeed) -> Iterator[Setup]:
    if asked.is_off:
        yield setup
        return
    if asked.fixed_stage is not None:
        yield replace(setup, stage=stage_of(asked.fixed_stage), offload=asked.offload and setup.cuda)
        return
    if not setup.cuda:
        yield setup  # of one machine's memory nothing is gained by dividing it
        return
    if not asked.offload:
        yield setup
    if setup.members > 1 and not asked.offload:
        yield from (replace(setup, stage=stage) for stage in setup.stages)
    yield from (replace(setup, stage=stage, offload=True) for stage in setup.stages if stage > 1)


def stage_of(number: int) -> Stage:
    """Return a number that a request has given as a stage of ZeRO."""
    found: dict[int, Stage] = {0: 0, 1: 1, 2: 2, 3: 3}
    return found[number]


def deepspeed_config(setup: Setup, asked: DeepSpeed) -> dict[str, Any] | None:
    """Return DeepSpeed's configuration for what was chosen, or the request's own; None without DeepSpeed."""
    if asked.config is not None:
        return dict(asked.config)
    if setup.stage is None:
        return None
    zero: dict[str, Any] = {"stage": setup.stage}
    if setup.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if setup.stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {"zero_optimization": zero}


def refusal(fit: Fit, asked: DeepSpeed) -> InvalidSpec:
    """Return the error for a training that needs more memory than a worker has."""
    setup, memory = fit.setup, fit.memory
    asked_batch, asked_length = setup.hyper.per_device_train_batch_size, setup.hyper.max_length
    message = (
        f"A batch of {asked_batch} examples of {asked_length} tokens needs {format_bytes(memory.total)} a worker "
        f"({_parts(memory)}), and {format_bytes(fit.available)} are there."
    )
    batch = largest_batch(setup, fit.available)
    if batch:
        more = "" if setup.hyper.gradient_checkpointing else ", or turn on `gradient_checkpointing`"
        return InvalidSpec(
            message,
            field="per_device_train_batch_size",
            value=asked_batch,
            hint=f"A batch of {batch} fits ({setup.instead}){more}.",
        )
    length = longest_length(setup, fit.available)
    if length:
        return InvalidSpec(
            message,
            field="max_length",
            value=asked_length,
            hint=f"Examples of {length} tokens fit, one at a time.",
        )
    further = f", or {setup.smaller}" if setup.smaller else ""
    stage = "" if asked.is_off else ", or more `workers`"
    return InvalidSpec(
        message,
        field="base_model",
        hint=f"Not even one short example fits. Use workers with more memory{stage}{further}, or a smaller model.",
    )


def _parts(memory: Memory) -> str:
    named = (
        ("weights", memory.weights),
        ("gradients", memory.gradients),
        ("optimiser", memory.optimizer),
        ("activations", memory.activations),
    )
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in named if size)


def sentence(estimate: TrainEstimate) -> str:
    """Return an estimate in one line."""
    parts = (
        f"{estimate.trainable:,} of {estimate.parameters:,} parameters are trained",
        f"about {format_bytes(estimate.total_bytes)} a worker of {format_bytes(estimate.available_bytes or 0)}",
        f"{estimate.steps:,} step{'' if estimate.steps == 1 else 's'}",
    )
    told = ", ".join(parts)
    if estimate.seconds is None:
        return f"{told}."
    return f"{told}, about {_duration(estimate.seconds)} ({estimate.tokens_per_s or 0:,.0f} tokens/s)."


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
