"""A training with every choice made: what fits, which hyper-parameters, what the processes are told."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from aidocks.checkpoints.writer import parse_size
from aidocks.errors import InvalidSpec
from aidocks.evaluate.comparison import shown
from aidocks.specs.train_hyper import batches, fewer_workers, steps
from aidocks.specs.train_llm import LLMTrainSpec
from aidocks.specs.train_llm_result import TrainEstimate
from aidocks.training.device import TrainingDevice, require_optimizer
from aidocks.training.estimate import USABLE, WIDTHS, LLMSetup
from aidocks.training.fitting import Fit, choose, deepspeed_config
from aidocks.training.request import Found, Request
from aidocks.training.resuming import Identity, require_same, require_steps_left
from aidocks.training.run import (
    ONLINE_METHODS,
    WHOLE,
    LLMHyperparameters,
    LLMTraining,
    Precision,
)
from aidocks.training.subject import Subject
from aidocks.training.unit import TrainModel
from aidocks.training.workers import Workers


class TrainingBuild:
    """A training with every choice made.

    Args:
        request: Resolved.
        found: Its data and workers.

    Raises:
        InvalidSpec: It does not fit its workers, or goes on from a checkpoint of another training.
    """

    def __init__(self, request: Request, found: Found) -> None:
        self.request, self.found = request, found
        spec = request.spec
        _require_device(spec, found.device)
        self._rows = found.data.train.count
        if spec.packing:
            self._rows = max(1, -(-found.data.summary.tokens // request.max_length))
        self.hyper: LLMHyperparameters = spec.hyperparameters(
            self._rows, gpus=found.device.cuda, longest=request.longest
        )
        self.fit: Fit = choose(self._setup(), spec.deepspeed, self.workers.available)
        _require_whole_state(spec, self.fit)
        if request.resumed is not None:
            require_same(request.resumed, self.identity)
            require_steps_left(request.resumed, self.hyper.max_steps)
        _require_whole_step(spec, self.hyper, found.data.train.count)

    @property
    def precision(self) -> Precision:
        """Type of frozen weights and of the computation, as the workers are going to choose it."""
        if self.request.spec.precision != "auto":
            return self.request.spec.precision
        # transformers refuses bfloat16 where DeepSpeed runs without a GPU.
        on_cpu = not self.found.device.cuda and self.request.spec.deepspeed.fixed_stage is not None
        return "float32" if on_cpu else self.found.device.precision

    @property
    def notes(self) -> tuple[str, ...]:
        """What one should know of it beside what the request alone says."""
        notes = list(self.request.notes)
        if self.request.spec.deepspeed.offload and not self.found.device.cuda:
            notes.append("`offload` has no effect: without GPUs all memory is main memory.")
        return tuple(notes)

    def can_measure(self, precision: Precision) -> bool:
        """Return whether one worker alone can hold the model in a type, as what measures it has to."""
        return WIDTHS[precision] * self.request.shape.parameters <= USABLE * self.found.device.memory

    @cached_property
    def identity(self) -> Identity:
        """What its checkpoints are of."""
        stage = self.fit.setup.stage
        return Identity(
            base_model=self.found.parents[0].content_hash,
            method=self.request.spec.method,
            dataset=self.found.data.train.sha256,
            adapter=self.request.adapter,
            optim=self.hyper.optim,
            deepspeed="off" if stage is None else f"stage {stage} of {self.fit.setup.members} workers",
        )

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return steps(self.request.spec, self._rows)

    @property
    def epochs(self) -> float:
        """How often each row is seen."""
        if self.hyper.max_steps is None:
            return self.hyper.num_train_epochs
        an_epoch = steps(
            self.request.spec.model_copy(update={"max_steps": None, "num_train_epochs": 1}), self._rows
        )
        return self.hyper.max_steps / an_epoch

    @cached_property
    def estimate(self) -> TrainEstimate:
        """What it will need."""
        summary, spec = self.found.data.summary, self.request.spec
        per_device, accumulated = batches(spec)
        examples = per_device * accumulated * spec.workers
        a_row = summary.tokens / max(1, summary.train)
        if spec.method in ONLINE_METHODS:
            a_row += self.hyper.max_completion_length
        return self.fit.estimate(
            self.found.device, self.workers.cpus, self.steps, summary.tokens, examples * a_row
        )

    @cached_property
    def workers(self) -> Workers:
        """Who trains."""
        return Workers(self.request.spec, self.found.device)

    @property
    def output(self) -> Path:
        """Where the training writes: the staged result itself, unless the adapter is still to be merged."""
        spec, workspace = self.request.spec, self.request.context.workspace
        whole = spec.adapter in WHOLE or spec.makes_adapter
        return workspace / ("model" if whole else "trained")

    @property
    def unit(self) -> TrainModel:
        """The unit that trains."""
        return self.workers.unit(self._training(), fewer_workers(self.request.spec))

    def subject(self, moment: str) -> Subject:
        """Return the model that is measured before or after the training."""
        spec, base = self.request.spec, self.request.base.path
        common = {"tokenizer": self.request.tokenizer, "scores": spec.method == "reward", "seed": spec.seed}
        if moment == "before":
            return Subject(name="base", model=base, **common)
        if spec.makes_adapter:
            return Subject(name="result", model=base, adapter=self.output, **common)
        return Subject(name="result", model=self.request.context.workspace / "model", **common)

    def _training(self) -> LLMTraining:
        request, spec, context = self.request, self.request.spec, self.request.context
        workspace = context.workspace / "training"
        resumed = request.resumed
        return LLMTraining(
            job_id=context.job_id,
            method=spec.method,
            base=request.base.path,
            base_name=shown(spec.base_model),
            tokenizer=request.tokenizer,
            train=self.found.data.train,
            held_out=self.found.data.held_out if spec.evaluate else None,
            adapter=request.adapter,
            hyper=self.hyper,
            loss_on=spec.loss_on,
            rewards=request.rewards,
            precision=None if spec.precision == "auto" else spec.precision,
            backend=spec.backend,
            deepspeed=deepspeed_config(self.fit.setup, spec.deepspeed),
            max_shard_bytes=parse_size(spec.max_shard_size),
            report_to=tuple(name for name in spec.report_to if name != "tensorboard"),
            workers=spec.workers if fewer_workers(spec) else None,
            max_failures=spec.max_failures,
            resume=resumed.path if resumed else None,
            checkpoints=context.checkpoints_dir,
            output=self.output,
            tensorboard=workspace / "tensorboard",
            story=workspace / "story.jsonl",
            history=workspace / "history.json",
        )

    def _setup(self) -> LLMSetup:
        return LLMSetup(
            shape=self.request.shape,
            method=self.request.spec.method,
            adapter=self.request.adapter,
            hyper=self.hyper,
            precision=self.precision,
            members=self.request.spec.workers,
            cuda=self.found.device.cuda,
            longest=self.found.data.summary.lengths.longest,
        )


def _require_whole_state(spec: LLMTrainSpec, fit: Fit) -> None:
    """Refuse fewer workers where DeepSpeed has to divide the training's state among all of them."""
    if fit.setup.stage is not None and fewer_workers(spec):
        raise InvalidSpec(
            "It fits its workers only with DeepSpeed, whose checkpoints as many workers alone can go on from.",
            field="min_workers",
            value=spec.min_workers,
            hint="Leave `min_workers` out, or use workers with more memory and `deepspeed: off`.",
        )


def _require_whole_step(spec: LLMTrainSpec, hyper: LLMHyperparameters, prompts: int) -> None:
    """Refuse too few prompts: an online method leaves those out that do not fill a step."""
    if spec.method not in ONLINE_METHODS:
        return
    answers = hyper.per_device_train_batch_size * hyper.gradient_accumulation_steps * spec.workers
    needed = answers // spec.num_generations
    if prompts < needed:
        raise InvalidSpec(
            f"A step takes {answers} answers to {needed} prompts, and {prompts} are there to train on.",
            field="dataset",
            hint="Give more prompts, or lower per_device_train_batch_size, gradient_accumulation_steps or "
            "num_generations.",
        )


def _require_device(spec: LLMTrainSpec, device: TrainingDevice) -> None:
    """Refuse what needs a GPU where there is none, before anything is measured."""
    gpus = spec.resources.gpus if spec.resources is not None else None
    if device.cuda and gpus != 0:
        return
    if spec.adapter == "qlora":
        raise InvalidSpec(
            "The adapter 'qlora' needs a CUDA GPU, and the workers have none.",
            field="adapter",
            value="qlora",
            hint="Use 'lora', which keeps the base as it is.",
        )
    require_optimizer(spec.optim, device, gpus)
