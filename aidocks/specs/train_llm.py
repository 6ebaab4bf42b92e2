"""The request of ``/train/llm``: fine-tuning of a language model on a data set, by one of TRL's methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from aidocks.specs.aliases import with_aliases
from aidocks.specs.base import ModelName, ModelRef
from aidocks.specs.laser import Listed
from aidocks.specs.patterns import compile_pattern
from aidocks.specs.train_data import SPLIT_PATTERN, DataFormat, DatasetRef, InlineRows, held_out_count
from aidocks.specs.train_fields import ModuleName, TrainSpec
from aidocks.specs.train_rewriting import METHOD_WORDS, rewritten
from aidocks.specs.train_settings import RewardSpec, ScannedLayers
from aidocks.training.run import (
    LOW_RANK,
    AdapterKind,
    AdapterSettings,
    LLMHyperparameters,
    LossOn,
    Method,
)

_MOST_PATTERNS = 2048

ColumnName = Annotated[str, Field(min_length=1, max_length=200)]


def _usable(patterns: tuple[str, ...]) -> tuple[str, ...]:
    if not 1 <= len(patterns) <= _MOST_PATTERNS:
        raise ValueError(f"{len(patterns)} patterns are given; 1 to {_MOST_PATTERNS} can be")
    for pattern in patterns:
        compile_pattern(pattern)
    return patterns


TensorPatterns = Annotated[tuple[str, ...], AfterValidator(_usable)]

EXAMPLES: list[dict[str, Any]] = [
    {
        "base_model": "smollm2-135m-instruct",
        "method": "sft",
        "dataset": "domain-math",
        "adapter": "lora",
        "lora_rank": 16,
        "num_train_epochs": 1,
        "name": "smollm2-math",
    },
    {
        "base_model": "smollm2-135m-instruct",
        "method": "dpo",
        "dataset": "HuggingFaceH4/ultrafeedback_binarized",
        "dataset_split": "train_prefs",
        "workers": 2,
        "deepspeed": "auto",
    },
]


class LLMTrainSpec(TrainSpec):
    """Train a language model on a data set by one of TRL's methods, on one core or on the GPUs of many nodes.

    The names of the original `/train` work, and so do those of TRL, axolotl and LLaMA-Factory for the same things.
    """

    model_config = ConfigDict(json_schema_extra=with_aliases(EXAMPLES))

    base_model: ModelRef = Field(
        validation_alias=AliasChoices(
            "base_model", "model", "model_name", "base_model_name", "base_model_path", "model_name_or_path"
        ),
        description="Model to train: a registry name, a hub model `org/name[@revision]`, or a path below an allowed "
        "root. It must be a causal language model in safetensors format.",
        examples=["smollm2-135m-instruct"],
    )
    name: ModelName | None = Field(
        None,
        description="Registry name of the result. Default: the base's, the method, and the end of the job's id.",
        examples=["smollm2-math"],
    )
    method: Method = Field(
        "sft",
        description="`sft` (supervised), `pretrain` (continued, on plain text), by preferences `dpo`, `orpo`, `kto` "
        "and `reward` (a reward model), by rewards of the model's own answers `grpo` and `rloo`. `ppo` is `rloo`, the "
        "kept method of that kind. Also: `supervised`, `preference` (dpo), `cpt`.",
        examples=["sft"],
    )
    # --- the data
    dataset: DatasetRef | InlineRows = Field(
        validation_alias=AliasChoices(
            "dataset", "training_data", "train_data", "training_file", "train_dataset"
        ),
        description="What to train on: a data set of the registry, an uploaded file (`file-…`), a hub data set "
        "`org/name[:config][@revision]`, the path of a .jsonl, .json, .csv or .parquet file below an allowed root, or "
        "the rows themselves.",
        examples=["domain-math"],
    )
    dataset_split: str = Field(
        "train",
        pattern=SPLIT_PATTERN,
        max_length=100,
        description="Split of a hub data set.",
        examples=["train", "train[:1000]"],
    )
    eval_dataset_split: str | None = Field(
        None,
        pattern=SPLIT_PATTERN,
        max_length=100,
        description="Split of a hub data set that `eval_dataset` names. Default: `dataset_split`.",
        examples=["test"],
    )
    eval_dataset: DatasetRef | InlineRows | None = Field(
        None,
        validation_alias=AliasChoices("eval_dataset", "eval_data", "validation_file", "validation_data"),
        description="Rows to measure on, never trained on; instead of `eval_split`.",
    )
    eval_split: float | int | None = Field(
        None,
        ge=0,
        le=100_000,
        validation_alias=AliasChoices("eval_split", "val_set_size", "val_size"),
        description="What is held out of `dataset`, to measure on: a share below 1, or a number of rows; 0 for none. "
        "Default: a tenth, at least 8 and at most 500 rows.",
        examples=[0.1, 200],
    )
    fields: dict[ColumnName, ColumnName] = Field(
        default_factory=dict,
        max_length=64,
        validation_alias=AliasChoices("fields", "field_map"),
        description="Which column is what, where it is not found by itself: role -> column. With `grpo` and `rloo` "
        "also further names, by which rewards call columns.",
        examples=[{"prompt": "question", "completion": "answer"}],
    )
    format: DataFormat = Field("auto", description="Form of the rows; `auto` looks at them.")
    chat_template: Annotated[str, Field(min_length=1, max_length=65_536)] | None = Field(
        None,
        description="A known template (chatml, llama3, mistral, alpaca, …), a Jinja text, or `auto`, the base's own. "
        "Where it is given, columns of plain prompts and answers are written by it, too; else only conversations and "
        "instructions are, by the base's own, and plain texts stay as they are.",
        examples=["chatml"],
    )
    # --- what is trained
    adapter: AdapterKind = Field(
        "lora",
        validation_alias=AliasChoices("adapter", "finetuning_type", "peft_type"),
        description="`lora`, `qlora` (over a base in 4 bits; `load_in_4bit` is the same), `dora`, `prompt_tuning`, "
        "`prefix_tuning`, `full` (all weights), `layers` (those that `layers` names).",
    )
    load_in_4bit: bool | None = Field(None, description="The original name of `adapter: qlora`.")
    modules_to_save: Listed[ModuleName] | None = Field(
        None, description="Modules that are trained whole, beside the factors.", examples=[["embed_tokens"]]
    )
    virtual_tokens: int = Field(
        20,
        ge=1,
        le=4096,
        validation_alias=AliasChoices("virtual_tokens", "num_virtual_tokens"),
        description="Length of the trained prompt or prefix, in tokens.",
    )
    layers: TensorPatterns | ScannedLayers | None = Field(
        None,
        validation_alias=AliasChoices("layers", "unfrozen_parameters"),
        description="With `adapter: layers`: patterns of the names of the trained tensors, or the scan that lists "
        'them (`{"scan": …, "fraction": 0.25}`).',
        examples=[{"scan": "job-0199c2f3a41-5d1c02aa", "fraction": 0.25}, ["layers\\.1[0-9]\\.mlp"]],
    )
    merge_adapter: bool = Field(
        True,
        description="Whether the result is a whole model, base and adapter in one; else the adapter alone. Default: "
        "true, but for what cannot be merged: trained prompts and prefixes. A merged reward model loads as a sequence "
        "classifier, its score included.",
    )
    # --- how it is trained
    max_prompt_length: int | None = Field(
        None,
        ge=1,
        le=1_048_576,
        description="Tokens of a prompt (`grpo`, `rloo`); rows with longer ones are left out.",
    )
    max_completion_length: int = Field(
        256, ge=1, le=131_072, description="Tokens of an answer that `grpo` or `rloo` write."
    )
    packing: bool = Field(
        False,
        validation_alias=AliasChoices("packing", "sample_packing"),
        description="Fill every sequence with several short examples (`sft`, `pretrain`).",
    )
    loss_on: LossOn = Field(
        "completion",
        description="Tokens that the loss is on, with `sft`: `completion` (the last answer), `assistant` (every turn "
        "of it; the chat template must mark them), `all`.",
    )
    assistant_only_loss: bool | None = Field(None, description="TRL's name of `loss_on: assistant`.")
    neftune_noise_alpha: float | None = Field(
        None, gt=0, le=1000, description="Noise on embeddings (NEFTune); not of `reward`, `grpo` and `rloo`."
    )
    beta: float | None = Field(
        None,
        ge=0,
        le=100,
        description="Pull to the reference model (`dpo`, `kto`: 0.1; `rloo`: 0.05; `grpo`: 0), or weight of the odds "
        "ratio (`orpo`: 0.1).",
    )
    loss_type: str | None = Field(
        None, max_length=40, description="Variant of the loss, by TRL's names, such as `ipo` of `dpo`."
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="Of `dpo` with `loss_type` `robust` or `exo_pair`: how probable it is that a pair is the wrong way "
        "round.",
    )
    desirable_weight: float = Field(1.0, gt=0, le=100, description="Of `kto`: weight of wanted answers.")
    undesirable_weight: float = Field(1.0, gt=0, le=100, description="Of `kto`: weight of unwanted answers.")
    rewards: tuple[RewardSpec, ...] = Field(
        (),
        max_length=16,
        description="What judges the answers of `grpo` and `rloo`.",
        examples=[[{"kind": "match", "field": "answer"}]],
    )
    num_generations: int = Field(
        8,
        ge=2,
        le=256,
        description="Answers to each prompt (`grpo`, `rloo`), which are compared with each other.",
    )
    temperature: float = Field(1.0, gt=0, le=10, description="Of these answers.")
    backend: Literal["auto", "trl", "unsloth"] = Field(
        "auto", description="`unsloth` needs a CUDA GPU and the extra `gpu`; `auto` takes it where it can."
    )
    min_workers: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="With so few the training goes on while the cluster has no room for all `workers`, each step the "
        "same. Default: it waits for all of them.",
        examples=[1],
    )
    samples: int = Field(4, ge=0, le=64, description="Held-out prompts that both answer, for people to read.")

    @model_validator(mode="before")
    @classmethod
    def _in_our_words(cls, given: Any) -> Any:
        return rewritten(cls, given) if isinstance(given, Mapping) else given

    @field_validator("method", mode="before")
    @classmethod
    def _method_of(cls, given: Any) -> Any:
        return METHOD_WORDS.get(given.lower(), given.lower()) if isinstance(given, str) else given

    @model_validator(mode="after")
    def _agree(self) -> LLMTrainSpec:
        from aidocks.specs.train_checks import check

        check(self)
        return self

    def inputs(self) -> dict[str, str]:
        """Return field -> reference of every model that the request names."""
        judges = {
            f"rewards[{n}].model": reward.model for n, reward in enumerate(self.rewards) if reward.model
        }
        return {"base_model": self.base_model, **judges}

    def held_out_rows(self, rows: int) -> int:
        """Return how many of the usable rows of `dataset` are held out."""
        return 0 if self.eval_dataset is not None else held_out_count(rows, self.eval_split)

    def adapter_settings(self, layers: tuple[str, ...] = ()) -> AdapterSettings:
        """Return what is trained, with the patterns that a scan stands for."""
        patterns = self.layers if isinstance(self.layers, tuple) else layers
        return AdapterSettings(
            kind=self.adapter,
            rank=self.lora_rank,
            alpha=self.lora_alpha or 2 * self.lora_rank,
            dropout=self.lora_dropout,
            rslora=self.rslora,
            target_modules=self.target_modules or (),
            modules_to_save=self.modules_to_save or (),
            virtual_tokens=self.virtual_tokens,
            layers=patterns if self.adapter == "layers" else (),
        )

    def hyperparameters(
        self, rows: int, *, gpus: bool = False, longest: int | None = None
    ) -> LLMHyperparameters:
        """Return all hyper-parameters, the open ones chosen; see :mod:`aidocks.specs.train_hyper`.

        Args:
            rows: Training rows (with `packing`: sequences).
            gpus: Whether it is trained on GPUs.
            longest: Tokens that the model can read.
        """
        from aidocks.specs.train_hyper import hyperparameters

        return hyperparameters(self, rows, gpus=gpus, longest=longest)

    def notes(self) -> tuple[str, ...]:
        """Return what one should know of this request: settings without effect."""
        from aidocks.specs.train_checks import notes

        return notes(self)

    @property
    def makes_adapter(self) -> bool:
        """Whether the result is an adapter, and no whole model."""
        return self.adapter not in ("full", "layers") and not (
            self.adapter in LOW_RANK and self.merge_adapter
        )
