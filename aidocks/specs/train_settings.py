"""Parts of the request of ``/train/llm``: rewards, DeepSpeed, resources, which tensors are trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import (
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    JsonValue,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from aidocks.errors import InvalidSpec
from aidocks.specs.base import ModelRef, Spec
from aidocks.specs.laser_scan import Score
from aidocks.specs.patterns import compile_pattern
from aidocks.training.run import Reward, RewardRule

Tracker = Literal["tensorboard", "mlflow", "wandb"]

#: Optimisers of transformers whose packages are there. Those in 8 bits need bitsandbytes (the extra `gpu`).
Optimizer = Literal[
    "adamw_torch_fused",
    "adamw_torch",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "lion_8bit",
    "lion_32bit",
    "adafactor",
    "sgd",
    "adagrad",
    "rmsprop",
]
Schedule = Literal[
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
]

#: Parts of a DeepSpeed configuration that a request may bring. Others write files where they are told to, or start
#: services; what concerns files and trackers has fields of its own.
_CONFIG = frozenset(
    {
        "zero_optimization", "bf16", "fp16", "gradient_clipping", "train_batch_size", "gradient_accumulation_steps",
        "train_micro_batch_size_per_gpu", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "optimizer",
        "scheduler", "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "steps_per_print",
        "wall_clock_breakdown", "activation_checkpointing", "data_types", "sparse_gradients", "torch_autocast",
    }
)  # fmt: skip

#: Fields of a reward that each kind needs.
_NEEDS = {"regex": "pattern", "length": "characters", "model": "model", "function": "function"}


class RewardSpec(RewardRule):
    """One reward of an online method (``grpo``, ``rloo``); the sum of all, by weight, is what is learned from."""

    model: ModelRef | None = Field(
        None,
        description="For `model`: a reward model, such as `method: reward` makes.",
        examples=["polite-reward"],
    )

    @model_validator(mode="after")
    def _complete(self) -> RewardSpec:
        needed = _NEEDS.get(self.kind)
        if needed and getattr(self, needed) is None:
            raise InvalidSpec(f"A reward of kind {self.kind!r} needs `{needed}`.", field=needed)
        if self.kind == "contains" and self.field is None and not self.words:
            raise InvalidSpec(
                "A reward of kind 'contains' needs `words`, or the `field` of the row that holds them.",
                field="words",
            )
        if self.pattern is not None:
            compile_pattern(self.pattern, "pattern")
        return self

    def resolved(self, model: Path | None = None) -> Reward:
        """Return the reward as the trainer reads it, with the directory of its model."""
        return Reward(**self.model_dump(exclude={"model"}), model=model)


class ScannedLayers(Spec):
    """The tensors of the highest signal-to-noise ratio, as ``/laser/scan`` lists them."""

    scan: str = Field(
        min_length=1,
        max_length=4096,
        description="A job of `/laser/scan`, its directory, or a file of `unfrozen_parameters`, below an allowed root.",
        examples=["job-0199c2f3a41-5d1c02aa"],
    )
    fraction: float | None = Field(
        None, gt=0, le=1, description="Which of the scan's lists. Default: the first.", examples=[0.25]
    )
    score: Score = Field("noise_ratio", description="What that list is ordered by.")


Stage = Literal["auto", "off", 0, 1, 2, 3]


class DeepSpeed(Spec):
    """How DeepSpeed shares the memory of a training among its workers."""

    #: How people write it in one word, on a command line for instance.
    written_short: ClassVar[str] = "auto|off|0|1|2|3|2-offload|3-offload"
    model_config = ConfigDict(json_schema_extra={"examples": [{"stage": 2, "offload": True}]})

    stage: Stage = Field(
        "auto",
        description="What is divided among the workers: 1 the optimiser's state, 2 also the gradients, 3 also the "
        "weights; 0 nothing. `auto`: without DeepSpeed where the model fits, else the first stage at which it does.",
    )
    offload: bool = Field(
        False, description="Keep the optimiser's state (3: the weights, too) in main memory."
    )
    config: dict[str, JsonValue] | None = Field(
        None, description="A whole configuration in DeepSpeed's own words, instead of these."
    )

    @property
    def is_off(self) -> bool:
        """Whether it is certain that DeepSpeed is not used."""
        return self.stage == "off"

    @property
    def fixed_stage(self) -> int | None:
        """The stage that the request asks for; None where none is asked for."""
        return self.stage if isinstance(self.stage, int) else None

    @model_validator(mode="before")
    @classmethod
    def _from_short(cls, given: Any) -> Any:
        """Read `auto`, `off`, a stage, `2-offload`, or a whole configuration."""
        if isinstance(given, bool) or given is None:
            return {"stage": "auto" if given else "off"}  # `off` is false in YAML
        if isinstance(given, int):
            return {"stage": given}
        if isinstance(given, str):
            return _read_words(given)
        if isinstance(given, Mapping) and not set(given) <= set(cls.model_fields):
            return {"config": given, "stage": _stage_in(given)}
        return given

    @model_validator(mode="after")
    def _agree(self) -> DeepSpeed:
        if self.offload and self.stage in ("off", 0):
            raise InvalidSpec(
                f"Stage {self.stage} cannot be offloaded.",
                field="offload",
                hint="Use stage 2 or 3, or 'auto'.",
            )
        _check_config(self.config or {})
        if self.config is not None and self.stage != _stage_in(self.config):
            raise InvalidSpec(
                "The stage is not that of the configuration.", field="stage", hint="Leave `stage` out."
            )
        return self

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        words = ["auto", "off", *(str(stage) for stage in range(4)), "2-offload", "3-offload"]
        return {
            "anyOf": [
                handler(schema),
                {"enum": [*words, 0, 1, 2, 3], "description": "A stage, in short."},
                {"type": "object", "description": "A whole configuration of DeepSpeed."},
            ]
        }


def _read_words(given: str) -> dict[str, Any]:
    word, _, rest = given.strip().lower().removeprefix("zero").removeprefix("-").partition("-")
    known = {"auto": "auto", "off": "off", "none": "off", **{str(stage): stage for stage in range(4)}}
    if word not in known or rest not in ("", "offload"):
        raise ValueError(
            f"{given[:40]!r} is none of 'auto', 'off', 0, 1, 2, 3, '2-offload', '3-offload', {{\"stage\": …}} and a "
            "configuration of DeepSpeed"
        )
    return {"stage": known[word], "offload": rest == "offload"}


def _check_config(config: Mapping[str, Any]) -> None:
    for name in config:
        if name not in _CONFIG:
            raise InvalidSpec(
                f"A request cannot bring the part {name[:60]!r} of a DeepSpeed configuration.",
                field=f"config.{name[:60]}",
                hint=f"It can bring {', '.join(sorted(_CONFIG))}.",
            )
    zero = config.get("zero_optimization")
    for name in ("offload_optimizer", "offload_param"):
        offload = zero.get(name) if isinstance(zero, Mapping) else None
        device = offload.get("device", "none") if isinstance(offload, Mapping) else "none"
        if device not in ("cpu", "none") or (isinstance(offload, Mapping) and "nvme_path" in offload):
            raise InvalidSpec(
                "Weights and optimiser states can be kept in main memory, and not on disks.",
                field=f"config.zero_optimization.{name}",
                hint='Use {"device": "cpu"}.',
            )


def _stage_in(config: Mapping[str, Any]) -> Any:
    """Return the stage of a configuration in DeepSpeed's own words, where 0 is the default."""
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else None
    if stage not in (0, 1, 2, 3):
        raise ValueError("`zero_optimization.stage` of the DeepSpeed configuration is none of 0, 1, 2, 3")
    return stage
