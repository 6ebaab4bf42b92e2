"""What the requests of all trainings share: how long, how fast, on what, and what is kept."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, StringConstraints, field_validator

from aidocks.errors import InvalidSpec
from aidocks.specs.base import PublishableSpec
from aidocks.specs.laser import Listed
from aidocks.specs.resources import Resources
from aidocks.specs.train_settings import DeepSpeed, Optimizer, Schedule, Tracker
from aidocks.training.run import Precision

ModuleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.]+$", max_length=200)]

_JOB = re.compile(r"job-[A-Za-z0-9-]{1,80}")


class TrainSpec(PublishableSpec):
    """Base of the requests that train."""

    max_steps: int | None = Field(
        None, ge=1, le=10_000_000, description="Optimiser steps, whatever the epochs say. Default: by epochs."
    )
    num_train_epochs: float = Field(
        1.0,
        gt=0,
        le=1000,
        validation_alias=AliasChoices("num_train_epochs", "num_epochs", "n_epochs", "epochs"),
        description="How often every row is seen.",
    )
    per_device_train_batch_size: int | None = Field(
        None,
        ge=1,
        le=4096,
        validation_alias=AliasChoices("per_device_train_batch_size", "micro_batch_size"),
        description="Examples (of `grpo` and `rloo`: answers) of one worker's forward pass. Default: 4 or less.",
    )
    gradient_accumulation_steps: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="Forward passes for one step. Default: so that a step sees 16 examples, on all workers together.",
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Highest learning rate. Default: by method and adapter, such as 2e-4 for `sft` with `lora`.",
        examples=[2e-4],
    )
    lr_scheduler_type: Schedule = Field(
        "cosine",
        validation_alias=AliasChoices("lr_scheduler_type", "lr_scheduler"),
        description="How the rate falls after it has risen.",
    )
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of the steps in which the rate rises.")
    weight_decay: float = Field(
        0.0, ge=0, le=1, description="Share of every weight that a step at rate 1 takes away."
    )
    max_grad_norm: float = Field(
        1.0, gt=0, le=1e4, description="Longer gradients are shortened to this norm."
    )
    optim: Optimizer = Field(
        "adamw_torch_fused",
        validation_alias=AliasChoices("optim", "optim_fn", "optimizer"),
        description="Optimiser. Those in 8 bits need bitsandbytes (the extra `gpu`).",
    )
    max_length: int = Field(
        1024,
        ge=8,
        le=1_048_576,
        validation_alias=AliasChoices(
            "max_length", "max_seq_length", "max_total_length", "sequence_len", "cutoff_len", "max_seq_len"
        ),
        description="Tokens of an example; what is longer is cut. At most what the model can read. Of "
        "`max_seq_length` and `max_total_length` together, the smaller.",
    )
    lora_rank: int = Field(
        16,
        ge=1,
        le=4096,
        validation_alias=AliasChoices("lora_rank", "lora_r", "r"),
        description="Rank of the factors.",
    )
    lora_alpha: float | None = Field(
        None, gt=0, le=65_536, description="Factors are scaled by alpha / rank. Default: twice the rank."
    )
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of the inputs of the factors that is left out in a step."
    )
    rslora: bool = Field(
        False,
        validation_alias=AliasChoices("rslora", "use_rslora"),
        description="Scale by alpha / sqrt(rank) (rank-stabilised LoRA).",
    )
    target_modules: Listed[ModuleName] | None = Field(
        None,
        validation_alias=AliasChoices("target_modules", "lora_target_modules", "lora_target"),
        description="Modules that get factors, by their last name. Default: all linear ones of the layers.",
        examples=[["q_proj", "v_proj"]],
    )
    gradient_checkpointing: bool | None = Field(
        None,
        validation_alias=AliasChoices(
            "gradient_checkpointing", "use_gradient_checkpointing", "activation_checkpointing"
        ),
        description="Compute activations twice rather than keep them. Default: on GPUs.",
    )
    precision: Precision | Literal["auto"] = Field(
        "auto", description="Type of the frozen weights; `auto`: bfloat16 where the device computes in it."
    )
    workers: int = Field(
        1,
        ge=1,
        le=1024,
        validation_alias=AliasChoices("workers", "num_workers", "ray_num_workers"),
        description="Processes that train together, each on its part of every step's examples.",
    )
    resources: Resources | None = Field(None, description="What each worker gets. Default: by the cluster.")
    spread_over_nodes: bool = Field(
        False, description="Workers on as many nodes as there are, rather than on as few."
    )
    deepspeed: DeepSpeed = Field(
        DeepSpeed(),
        description="`auto` (where the model does not fit otherwise), `off`, a ZeRO stage 0 to 3, `2-offload`, "
        "`3-offload`, or a whole configuration.",
        examples=["auto", 2, {"stage": 3, "offload": True}],
    )
    save_steps: int | None = Field(
        None, ge=1, description="Steps between checkpoints. Default: a tenth, 20 to 500."
    )
    eval_steps: int | None = Field(
        None, ge=1, description="Steps between held-out losses. Default: as `save_steps`."
    )
    logging_steps: int = Field(1, ge=1, le=10_000, description="Steps between points of the curves.")
    save_total_limit: int = Field(2, ge=1, le=100, description="Checkpoints that are kept.")
    max_failures: int = Field(
        3,
        ge=0,
        le=100,
        description="How often in a row it goes on from the same checkpoint after a worker was lost.",
    )
    resume_from_checkpoint: str | None = Field(
        None,
        validation_alias=AliasChoices("resume_from_checkpoint", "resume"),
        max_length=200,
        description="A failed or cancelled job (`job-…`) of this installation, whose last checkpoint is gone on from.",
        examples=["job-0199c2f3a41-5d1c02aa"],
    )
    report_to: Annotated[tuple[Tracker, ...], Field(max_length=3)] = Field(
        (), description="Trackers beside the TensorBoard files, which are always written."
    )
    evaluate: bool = Field(
        True, description="Measure base and result on the held-out rows, if there are any."
    )
    max_shard_size: str = Field(
        "5GB", description="Largest weight file of the result, such as 500MB or 5GB.", examples=["5GB"]
    )
    seed: int = Field(
        0, ge=0, le=2**31 - 1, description="Of the split, the order of the rows, dropout and new weights."
    )
    dry_run: bool = Field(
        False,
        description="Check everything, and return what it will need: memory, steps, hours.",
        examples=[True],
    )

    @field_validator("resume_from_checkpoint", mode="before")
    @classmethod
    def _job(cls, given: Any) -> Any:
        """Read what other tools write for `no`, and refuse what they write for a directory of theirs."""
        if given in (None, False, ""):
            return None
        if isinstance(given, str) and _JOB.fullmatch(given):
            return given
        raise InvalidSpec(
            "It is a job that is gone on from, here, and not a directory of checkpoints.",
            value=given if isinstance(given, bool) else str(given)[:200],
            hint="Name the failed or cancelled job (job-…): the last checkpoint of that is gone on from. Leave it out "
            "to begin anew.",
        )

    @field_validator("target_modules", mode="before")
    @classmethod
    def _all_modules(cls, given: Any) -> Any:
        return None if given in ("all-linear", "all", ["all-linear"], ["all"], [], ()) else given

    @field_validator("report_to", mode="before")
    @classmethod
    def _trackers(cls, given: Any) -> Any:
        if given is None or given == "none":
            return ()
        return tuple(word.strip() for word in given.split(",")) if isinstance(given, str) else given
