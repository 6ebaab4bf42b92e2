"""The training of an embedding model or a reranker with every choice made: what fits, what the processes are told."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from aidocks.checkpoints.writer import parse_size
from aidocks.evaluate.comparison import shown
from aidocks.retrieval.checks import kind_of, notes_of_loss, require_loss, seen_in
from aidocks.retrieval.estimate import QUERY_TOKENS, RetrieverSetup, fitted, head_of, tokens_of
from aidocks.retrieval.hyper import (
    Loss,
    batches,
    choose_loss,
    epochs,
    examples,
    hyperparameters,
    passes,
    steps,
    with_intervals,
)
from aidocks.retrieval.request import Found, RetrievalRequest
from aidocks.specs.train_llm_result import TrainEstimate
from aidocks.specs.train_retrieval_result import RankingData
from aidocks.training.device import require_optimizer
from aidocks.training.estimate import USABLE, WIDTHS
from aidocks.training.fitting import Fit, choose, deepspeed_config, stage_of
from aidocks.training.resuming import Identity, require_same, require_steps_left
from aidocks.training.retriever import (
    EmbeddingTraining,
    RerankerTraining,
    Retriever,
    RetrieverHyperparameters,
)
from aidocks.training.run import Precision, Rows
from aidocks.training.unit import TrainModel
from aidocks.training.workers import Workers


class RetrievalBuild:
    """A training with every choice made.

    Args:
        request: Resolved.
        found: Its data and workers.

    Raises:
        InvalidSpec: Loss and rows do not go together, it does not fit its workers, or it goes on from a checkpoint of
            another training.
    """

    def __init__(self, request: RetrievalRequest, found: Found) -> None:
        self.request, self.found = request, found
        spec = request.spec
        self.trained_data: tuple[RankingData, ...] = found.data.data[: len(spec.datasets())]
        self.seen = seen_in(self.trained_data)
        require_loss(spec, self.seen)
        require_optimizer(spec.optim, found.device, spec.resources.gpus if spec.resources else None)
        self.loss: Loss = choose_loss(spec, found.data.rows)
        self._has_negatives = self.seen.negatives or spec.mine_negatives is not None
        self.examples = examples(self.loss, self.trained_data, spec.negatives)
        available = self.workers.available
        setup = fitted(
            self._setup(),
            available,
            batch=spec.per_device_train_batch_size is None,
            checkpointing=spec.gradient_checkpointing is None,
        )
        self.hyper: RetrieverHyperparameters = self._completed(setup.hyper)
        self.fit: Fit = choose(replace(setup, hyper=self.hyper), spec.deepspeed, available)
        if request.resumed is not None:
            require_same(request.resumed, self.identity, {"method": "loss"})
            require_steps_left(request.resumed, self.hyper.max_steps)

    @property
    def precision(self) -> Precision:
        """Type of frozen weights and of the computation.

        Where nothing is asked for, bfloat16 on GPUs that compute in it: such models are small, and what a CPU saves by
        it is little beside what similarities lose.
        """
        if self.request.spec.precision != "auto":
            return self.request.spec.precision
        return self.found.device.precision if self.found.device.cuda else "float32"

    @property
    def notes(self) -> tuple[str, ...]:
        """What one should know of it beside what the request alone says."""
        spec = self.request.spec
        notes = [*self.request.notes, *notes_of_loss(spec, self.seen)]
        if spec.deepspeed.offload and not self.found.device.cuda:
            notes.append("`offload` has no effect: without GPUs all memory is main memory.")
        batch, usual = self.hyper.per_device_train_batch_size, batches(spec, self.loss)[0]
        if batch < usual:
            passes = self.hyper.gradient_accumulation_steps
            more = f" {passes} times a step" if passes > 1 else f"; {self.fit.setup.instead}"
            notes.append(f"A batch of {usual} does not fit a worker, so one of {batch} is taken{more}.")
        return tuple(notes)

    @property
    def can_measure(self) -> bool:
        """Whether one worker alone can hold the model, as what measures it has to."""
        return WIDTHS[self.precision] * self.request.shape.parameters <= USABLE * self.found.device.memory

    @cached_property
    def identity(self) -> Identity:
        """What its checkpoints are of."""
        stage = self.fit.setup.stage
        return Identity(
            base_model=self._base_identity(),
            method=f"{self.request.kind}, {self.loss}",
            dataset=self._rows_identity(),
            adapter=self.request.adapter,
            optim=self.hyper.optim,
            deepspeed="off" if stage is None else f"stage {stage} of {self.fit.setup.members} workers",
        )

    @property
    def steps(self) -> int:
        """Optimiser steps, about: the rows that are found beside the given ones are not counted yet."""
        return steps(self.request.spec, self.hyper, self.examples)

    @property
    def epochs(self) -> float:
        """How often each example is seen."""
        return epochs(self.request.spec, self.hyper, self.examples)

    @cached_property
    def estimate(self) -> TrainEstimate:
        """What it will need."""
        setup = self.fit.setup
        assert isinstance(setup, RetrieverSetup)
        words = [(one.lengths.median, one.train) for one in self.trained_data if one.lengths]
        counted = sum(count for _, count in words) or 1
        median = round(sum(length * count for length, count in words) / counted) or 64
        passage = min(tokens_of(median, self.request.kind), self.hyper.max_length)
        query = min(QUERY_TOKENS, self.hyper.max_length) if self.request.kind == "embedding" else 0
        an_example = query + setup.passages * passage
        a_step = self.hyper.per_device_train_batch_size * self.hyper.gradient_accumulation_steps
        return self.fit.estimate(
            self.found.device,
            self.workers.cpus,
            self.steps,
            self.examples * an_example,
            a_step * self.request.spec.workers * an_example,
        )

    @cached_property
    def workers(self) -> Workers:
        """Who trains."""
        return Workers(self.request.spec, self.found.device)

    @property
    def output(self) -> Path:
        """Where the training writes the result."""
        return self.request.context.workspace / "model"

    def result(self, name: str) -> Retriever:
        """Return the result as a model that can be measured."""
        own: dict[str, Any] = {"name": name, "max_length": self.hyper.max_length}
        if self.request.spec.makes_adapter:
            own["adapter"] = self.output
        else:  # how it pools is in its files, and what adapters the base had are in its weights
            own |= {"model": self.output, "adapter": None, "task": None, "pooling": None, "normalize": None}
        return self.request.base.model_copy(update=own)

    def unit(self, train: Rows, held_out: Rows | None) -> TrainModel:
        """Return the unit that trains.

        Args:
            train: Rows, with what was found for them meanwhile.
            held_out: The same of those whose loss is measured.
        """
        return self.workers.unit(self._training(train, held_out))

    def _training(self, train: Rows, held_out: Rows | None) -> EmbeddingTraining | RerankerTraining:
        request, spec, context = self.request, self.request.spec, self.request.context
        workspace = context.workspace / "training"
        resumed = request.resumed
        own: dict[str, Any] = {
            "job_id": context.job_id,
            "loss": self.loss,
            "retriever": request.base.model_copy(update={"max_length": self.hyper.max_length}),
            "rows": self.found.data.rows,
            "merge": not spec.makes_adapter,
            "base": request.base.model,
            "base_name": shown(spec.base_model),
            "train": train,
            "held_out": held_out if spec.evaluate else None,
            "adapter": request.adapter,
            "hyper": self.hyper,
            "precision": self.precision,
            "deepspeed": deepspeed_config(self.fit.setup, spec.deepspeed),
            "max_shard_bytes": parse_size(spec.max_shard_size),
            "report_to": tuple(name for name in spec.report_to if name != "tensorboard"),
            "max_failures": spec.max_failures,
            "resume": resumed.path if resumed else None,
            "checkpoints": context.checkpoints_dir,
            "output": self.output,
            "tensorboard": workspace / "tensorboard",
            "story": workspace / "story.jsonl",
            "history": workspace / "history.json",
        }
        return (EmbeddingTraining if request.kind == "embedding" else RerankerTraining)(**own)

    def _setup(self) -> RetrieverSetup:
        request, spec = self.request, self.request.spec
        lengths = [one.lengths.longest for one in self.trained_data if one.lengths]
        hyper = hyperparameters(
            spec,
            self.loss,
            parameters=request.shape.parameters,
            max_length=request.max_length,
            negatives=self._has_negatives,
        )
        stage = spec.deepspeed.fixed_stage
        head, new_head = head_of(request.architecture, request.kind)
        return RetrieverSetup(
            kind=kind_of(spec),
            loss=self.loss,
            decoder=request.architecture.family == "decoder",
            negatives=self._negatives(),
            head=head,
            new_head=new_head,
            stage=None if stage is None else stage_of(stage),
            offload=stage is not None and spec.deepspeed.offload and self.found.device.cuda,
            shape=request.shape,
            adapter=request.adapter,
            hyper=hyper,
            precision=self.precision,
            members=spec.workers,
            cuda=self.found.device.cuda,
            longest=tokens_of(max(lengths), request.kind) if lengths else None,
        )

    def _negatives(self) -> int | None:
        """Return the wrong passages of a query in its row, on average; None where a step has as many as it takes."""
        if self.request.kind == "embedding":  # others of the data stand in for those that a row lacks
            return None
        mined = self.request.spec.mine_negatives
        queries = sum(one.train for one in self.trained_data)
        named = math.ceil(sum(one.negatives for one in self.trained_data) / max(1, queries))
        return named + (mined.per_query if mined is not None else 0)

    def _completed(self, hyper: RetrieverHyperparameters) -> RetrieverHyperparameters:
        """Return hyper-parameters whose batch is settled, with what follows from it."""
        spec = self.request.spec
        count = passes(spec, self.loss, hyper.per_device_train_batch_size)
        own = hyper.model_copy(update={"gradient_accumulation_steps": count})
        return with_intervals(spec, own, self.examples)

    def _base_identity(self) -> str:
        """Return a hash of what is trained: of the model, the adapter on it, and which of its own is used."""
        parts = [one.content_hash for one in self.found.parents if one.field == "base_model"]
        task = self.request.base.task
        return "+".join([*parts, *([task] if task else [])])

    def _rows_identity(self) -> str:
        """Return a hash of what is trained on: of the rows, and of what is to be found for them."""
        spec, data = self.request.spec, self.found.data.train
        if spec.mine_negatives is None and spec.distill_from is None:
            return data.sha256
        mined = spec.mine_negatives.model_dump(mode="json") if spec.mine_negatives else None
        others = [(one.field, one.content_hash) for one in self.found.parents]
        told = json.dumps([data.sha256, mined, others], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()
