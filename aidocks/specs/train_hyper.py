"""The hyper-parameters that a training request leaves open."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from aidocks.training.run import LOW_RANK, ONLINE_METHODS, AdapterKind, LLMHyperparameters, Method

if TYPE_CHECKING:
    from aidocks.specs.train_llm import LLMTrainSpec

#: Examples of one optimiser step, on all workers together, when the request does not say.
GLOBAL_BATCH = 16
_FORWARD_BATCH = 4

# Method -> highest learning rate of all weights, and of low-rank factors.
_RATES: dict[Method, tuple[float, float]] = {
    "sft": (2e-5, 2e-4),
    "pretrain": (1e-5, 1e-4),
    "dpo": (1e-6, 5e-5),
    "orpo": (8e-6, 8e-5),
    "kto": (1e-6, 1e-5),
    "reward": (1e-5, 1e-4),
    "grpo": (1e-6, 1e-5),
    "rloo": (1e-6, 1e-5),
}
# Of trained prompts and prefixes.
_SOFT_RATES: dict[AdapterKind, float] = {"prompt_tuning": 3e-2, "prefix_tuning": 1e-2}

_BETAS: dict[Method, float] = {"dpo": 0.1, "orpo": 0.1, "kto": 0.1, "grpo": 0.0, "rloo": 0.05}


def learning_rate(method: Method, adapter: AdapterKind) -> float:
    """Return the highest learning rate of a training that names none.

    All weights: the defaults of TRL's configurations (SFT 2e-5; DPO, KTO, GRPO and RLOO 1e-6), the ORPO paper's 8e-6,
    half of SFT's for plain text, which is the rest of a pretraining, and for reward models. Low-rank factors start at
    zero and want about ten times the rate of the weights, whatever their rank (Schulman et al., *LoRA Without Regret*,
    2025; TRL's guide to it). DPO gets fifty times: its weights' rate is meant for tens of thousands of pairs, and here
    a few thousand are usual. Prompts and prefixes start from noise: PEFT's examples train them at 3e-2 and 1e-2.
    """
    full, factors = _RATES[method]
    if adapter in _SOFT_RATES:
        return _SOFT_RATES[adapter]
    return factors if adapter in LOW_RANK else full


def batches(spec: LLMTrainSpec) -> tuple[int, int]:
    """Return examples of a forward pass of one worker, and forward passes of a step.

    What the request leaves open is chosen so that a step sees 16 examples however many workers there are. Online
    methods count answers, and compare all answers to a prompt within a step, so that ``num_generations`` divides the
    step's (TRL: ``generation_batch_size % num_generations == 0``).
    """
    per_device, accumulated = spec.per_device_train_batch_size, spec.gradient_accumulation_steps
    group = spec.num_generations if spec.method in ONLINE_METHODS else 1
    if per_device is None and accumulated is None:
        least = 2 if spec.method == "kto" else 1  # its estimate of the KL needs others of the batch
        per_device = max(least, min(_FORWARD_BATCH, GLOBAL_BATCH // spec.workers))
    if accumulated is None:
        assert per_device is not None
        accumulated = _completed(per_device * spec.workers, group, GLOBAL_BATCH)
    elif per_device is None:
        per_device = _completed(
            accumulated * spec.workers, group, min(GLOBAL_BATCH, _FORWARD_BATCH * accumulated * spec.workers)
        )
        if spec.method == "kto":
            per_device = max(per_device, 2)
    return per_device, accumulated


def fewer_workers(spec: LLMTrainSpec) -> tuple[int, ...]:
    """Return the numbers of workers, below all, on which a training may go on; the most first.

    They do the same steps: each makes up for those that are missing by more forward passes, so the number must divide
    those of a step.
    """
    passes = batches(spec)[1] * spec.workers
    least = spec.min_workers or spec.workers
    return tuple(count for count in range(spec.workers - 1, least - 1, -1) if passes % count == 0)


def _completed(factor: int, group: int, aim: int) -> int:
    """Return the least number that makes of ``factor`` a multiple of ``group`` that is not below ``aim``."""
    unit = group // math.gcd(group, factor)
    return unit * max(1, math.ceil(aim / (factor * unit)))


def steps(spec: LLMTrainSpec, rows: int) -> int:
    """Return the optimiser steps of a training on so many rows."""
    if spec.max_steps is not None:
        return spec.max_steps
    per_device, accumulated = batches(spec)
    examples = rows * (spec.num_generations if spec.method in ONLINE_METHODS else 1)
    a_step = per_device * accumulated * spec.workers
    # Prompts that do not fill a step are left out by the trainers of online methods.
    an_epoch = max(1, examples // a_step if spec.method in ONLINE_METHODS else math.ceil(examples / a_step))
    return max(1, math.ceil(spec.num_train_epochs * an_epoch))


def hyperparameters(spec: LLMTrainSpec, rows: int, *, gpus: bool, longest: int | None) -> LLMHyperparameters:
    """See :meth:`aidocks.specs.train_llm.LLMTrainSpec.hyperparameters`."""
    per_device, accumulated = batches(spec)
    saved = spec.save_steps or min(max(steps(spec, rows) // 10, 20), 500)
    length = min(spec.max_length, longest) if longest else spec.max_length
    checkpointing = spec.gradient_checkpointing
    if checkpointing is None:  # a prefix is a cache of keys and values, which checkpointing does without
        checkpointing = gpus and spec.adapter != "prefix_tuning"
    return LLMHyperparameters(
        max_steps=spec.max_steps,
        num_train_epochs=spec.num_train_epochs,
        per_device_train_batch_size=per_device,
        per_device_eval_batch_size=per_device,
        gradient_accumulation_steps=accumulated,
        learning_rate=spec.learning_rate or learning_rate(spec.method, spec.adapter),
        lr_scheduler_type=spec.lr_scheduler_type,
        warmup_ratio=spec.warmup_ratio,
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        optim=spec.optim,
        max_length=length,
        max_prompt_length=spec.max_prompt_length,
        max_completion_length=spec.max_completion_length,
        packing=spec.packing,
        neftune_noise_alpha=spec.neftune_noise_alpha,
        gradient_checkpointing=checkpointing,
        beta=_BETAS.get(spec.method) if spec.beta is None else spec.beta,
        loss_type=spec.loss_type,
        label_smoothing=spec.label_smoothing,
        desirable_weight=spec.desirable_weight,
        undesirable_weight=spec.undesirable_weight,
        num_generations=spec.num_generations,
        temperature=spec.temperature,
        save_steps=saved,
        eval_steps=spec.eval_steps or saved,
        logging_steps=spec.logging_steps,
        save_total_limit=spec.save_total_limit,
        seed=spec.seed,
    )
