"""One training, resolved: all that the processes of a training need to know, as one JSON file.

A request (``aidocks.specs.train_llm``) leaves things open; here every choice is made, so that a process that was
started on another machine, after a crash or under a debugger does the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from aidocks.errors import InvalidSpec

Method = Literal["sft", "pretrain", "dpo", "orpo", "kto", "reward", "grpo", "rloo"]
AdapterKind = Literal["lora", "qlora", "dora", "prompt_tuning", "prefix_tuning", "full", "layers"]
Backend = Literal["trl", "unsloth", "sentence-transformers"]
#: On which tokens the loss is: all, those of the completion (the last answer), or those of every assistant turn.
LossOn = Literal["all", "completion", "assistant"]
Precision = Literal["float32", "bfloat16"]

#: Methods that are taught by pairs of a better and a worse answer.
PREFERENCE_METHODS: tuple[Method, ...] = ("dpo", "orpo", "reward")
#: Methods whose model writes answers that a reward judges.
ONLINE_METHODS: tuple[Method, ...] = ("grpo", "rloo")
#: Kinds of adapter that are low-rank factors of weights, which can be added to them.
LOW_RANK: tuple[AdapterKind, ...] = ("lora", "qlora", "dora")
#: Kinds after which there is a whole model and no adapter.
WHOLE: tuple[AdapterKind, ...] = ("full", "layers")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rows(_Part):
    """Examples as the trainers read them: a JSONL file of rows that all have the same fields.

    Fields by method (``messages`` stands for a list of ``{"role", "content"}``):

    ========== ==========================================================================================
    sft        ``prompt`` and ``completion`` (texts, or messages), or ``messages`` [``tools``], or ``text``
    pretrain   ``text``
    dpo, orpo  ``prompt``, ``chosen``, ``rejected`` (texts, or messages)
    reward     the same
    kto        ``prompt``, ``completion`` (texts, or messages), ``label`` (true: wanted)
    grpo, rloo ``prompt`` (text, or messages), and further fields that rewards compare with, such as ``answer``
    ========== ==========================================================================================
    """

    path: Path
    sha256: str = Field(description="Of the file, so that other rows are other work.")
    count: int = Field(ge=0)


class AdapterSettings(_Part):
    """What is trained. See :data:`AdapterKind`."""

    kind: AdapterKind = "lora"
    rank: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) (rank-stabilised LoRA).")
    target_modules: tuple[str, ...] = Field((), description="Last names of modules. Empty: all linear ones.")
    modules_to_save: tuple[str, ...] = Field((), description="Modules trained whole beside the factors.")
    virtual_tokens: int = Field(20, ge=1, description="Length of a trained prompt or prefix, in tokens.")
    layers: tuple[str, ...] = Field((), description="For `layers`: patterns of the names of trained tensors.")


class RewardRule(_Part):
    """What one reward of an online method looks at."""

    kind: Literal["match", "contains", "regex", "length", "model", "function"]
    weight: float = 1.0
    field: str | None = Field(None, description="Field of the row that `match` and `contains` compare with.")
    pattern: str | None = Field(
        None,
        description="For `regex`: linear-time pattern of a good answer; for `match`: what precedes the answer.",
    )
    characters: int | None = Field(None, ge=1, description="For `length`: how long an answer should be.")
    words: tuple[str, ...] = Field((), description="For `contains`: words that are wanted.")
    function: str | None = Field(None, description="For `function`: name of an installed entry point.")


class Reward(RewardRule):
    """One reward of an online method."""

    model: Path | None = Field(None, description="For `model`: directory of a reward model.")


class Hyperparameters(_Part):
    """What every training is told of its steps, under transformers' names. None of it is open any more."""

    max_steps: int | None = Field(None, ge=1, description="Optimiser steps; None: as the epochs say.")
    num_train_epochs: float = Field(1.0, gt=0)
    per_device_train_batch_size: int = Field(1, ge=1, description="Examples a process and forward pass.")
    per_device_eval_batch_size: int = Field(4, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    learning_rate: float = Field(gt=0)
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of the steps in which the rate rises.")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    optim: str = "adamw_torch_fused"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_length: int = Field(1024, ge=8, description="Tokens of an example; what is longer is cut.")
    gradient_checkpointing: bool = False
    save_steps: int = Field(100, ge=1, description="Optimiser steps from one checkpoint to the next.")
    eval_steps: int = Field(100, ge=1, description="Optimiser steps from one held-out loss to the next.")
    logging_steps: int = Field(1, ge=1)
    save_total_limit: int = Field(2, ge=1, description="Checkpoints that are kept.")
    seed: int = 0


class LLMHyperparameters(Hyperparameters):
    """Those of a language model, with what TRL calls them."""

    max_prompt_length: int | None = Field(None, ge=1)
    max_completion_length: int = Field(256, ge=1, description="Tokens that an online method writes.")
    packing: bool = False
    neftune_noise_alpha: float | None = Field(None, gt=0)
    beta: float | None = Field(None, ge=0, description="Strength of the pull to the reference model.")
    loss_type: str | None = None
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    num_generations: int = Field(8, ge=2, description="Answers to each prompt in an online method.")
    temperature: float = Field(1.0, gt=0)


class Training(_Part):
    """What the processes of every training need to know. What else belongs to its kind, its class adds."""

    kind: str = Field(description="Which class this is; see `aidocks.training.kinds`.")
    job_id: str
    base: Path = Field(description="Checkpoint directory of the model that is trained.")
    base_name: str = Field(
        description="The model as the request calls it; goes into the adapter's configuration."
    )
    train: Rows
    held_out: Rows | None = None
    adapter: AdapterSettings
    hyper: Hyperparameters
    precision: Precision | None = Field(
        None, description="Type of the frozen weights; None: as the device likes it."
    )
    deepspeed: dict[str, Any] | None = Field(None, description="DeepSpeed's configuration; None: without it.")
    report_to: tuple[str, ...] = Field((), description="Trackers beside TensorBoard: mlflow, wandb.")
    workers: int | None = Field(
        None,
        ge=1,
        description="Processes for which the steps are planned, where fewer may go on: these make up for the others by "
        "more forward passes. None: as many as there are, each with its own.",
    )
    max_failures: int = Field(
        3, ge=0, description="How often in a row the training may begin anew from the same checkpoint."
    )
    resume: Path | None = Field(None, description="Checkpoint of an earlier job to begin from.")
    checkpoints: Path = Field(
        description="Directory of this job's checkpoints, on storage that all workers share."
    )
    output: Path = Field(description="Where the adapter, or the whole model, is written in the end.")
    max_shard_bytes: int = Field(
        5_000_000_000, ge=1, description="Of a weight file of a whole model, in the end."
    )
    tensorboard: Path = Field(description="Directory of the TensorBoard files.")
    story: Path = Field(description="JSONL file in which the training tells how it goes (`aidocks.telling`).")
    history: Path = Field(description="JSON file of all curves, written in the end (`History`).")

    @property
    def what(self) -> str:
        """What is done to the base, in a word or two."""
        return self.kind

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's stage; 0 also without DeepSpeed."""
        return int(((self.deepspeed or {}).get("zero_optimization") or {}).get("stage", 0))

    def passes(self, world_size: int) -> int:
        """Return the forward passes of a step of each process, where there are so many.

        Raises:
            InvalidSpec: The passes of a step cannot be divided among them.
        """
        passes = self.hyper.gradient_accumulation_steps * (self.workers or world_size)
        if passes % world_size:
            raise InvalidSpec(
                f"A step of {passes} forward passes cannot be divided among {world_size} processes.",
                field="workers",
                value=world_size,
                hint=f"It was planned for {self.workers}.",
            )
        return passes // world_size

    @property
    def measures_loss(self) -> bool:
        """Whether the loss of the held-out rows is measured while it trains."""
        return self.held_out is not None


class LLMTraining(Training):
    """The training of a language model by one of TRL's methods."""

    kind: Literal["llm"] = "llm"
    method: Method
    tokenizer: Path = Field(description="Directory of the tokenizer, chat template included.")
    hyper: LLMHyperparameters
    loss_on: LossOn = "completion"
    rewards: tuple[Reward, ...] = ()
    backend: Literal["auto", "trl", "unsloth"] = "auto"

    @property
    def what(self) -> str:
        return self.method

    @property
    def measures_loss(self) -> bool:
        # An online method writes answers to measure: that is done after the training, not within.
        return super().measures_loss and self.method not in ONLINE_METHODS


class Point(_Part):
    """What was logged at one step. What the method does not know is None.

    Losses in nats per token of the loss (preference methods: per pair); rewards in the reward's own unit.
    """

    step: int
    epoch: float | None = None
    loss: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens: int | None = Field(None, description="Tokens seen so far, by all processes.")
    tokens_per_s: float | None = None
    seconds: float | None = Field(None, description="Of training so far, in this attempt.")
    further: dict[str, float] = Field(default_factory=dict, description="Other figures under TRL's names.")


class History(_Part):
    """The curves of one training, with all points from its first step on, whatever died in between."""

    points: tuple[Point, ...]


class Trained(_Part):
    """What the processes of a training report in the end."""

    files: tuple[Path, ...] = Field(description="Written below `output`.")
    steps: int
    epochs: float
    tokens: int | None = None
    seconds: float = Field(description="Of the training loop, in the last attempt.")
    tokens_per_s: float | None = None
    loss: float | None = Field(None, description="Mean of the last tenth of the steps.")
    backend: Backend
    backend_reason: str
    device: str
    world_size: int
    precision: Precision
    trainable: int = Field(description="Parameters that were trained.")
    parameters: int
    peak_bytes: tuple[int, ...] = Field(
        description="Of every process: of the GPU, or resident where there is none."
    )
    optimizer_bytes: tuple[int, ...] = Field((), description="Optimiser state that every process held.")
    attempts: int = 1
    resumed_from: int = Field(0, description="Step at which the last attempt began.")
    versions: dict[str, str] = Field(default_factory=dict)
    notes: tuple[str, ...] = Field((), description="What one should know: rows that were left out.")
