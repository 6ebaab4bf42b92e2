"""A training request whose references are resolved, checked by what headers and configurations can tell."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from aidocks.checkpoints.dtypes import torch_name
from aidocks.checkpoints.header import TensorEntry
from aidocks.checkpoints.layout import CAUSAL_ENDINGS
from aidocks.checkpoints.reader import Checkpoint
from aidocks.errors import IncompatibleModels, InvalidSpec
from aidocks.merge.members import text_config
from aidocks.models.manifest import Parent
from aidocks.models.parents import describe_members, parent_units
from aidocks.models.tokenizer_files import choose_chat_template, read_template
from aidocks.plan import PlanContext, Stage
from aidocks.specs.train_llm import LLMTrainSpec
from aidocks.specs.train_settings import ScannedLayers
from aidocks.training.checkpoints import require_room
from aidocks.training.data.hub import fetch_datasets
from aidocks.training.data.prepare import Prepared, PrepareData
from aidocks.training.data.rows import DataSource
from aidocks.training.device import MeasureDevice, TrainingDevice
from aidocks.training.references import WriteTokenizer, data_sources, named_data, scanned_layers
from aidocks.training.resuming import Resumed, find_checkpoint
from aidocks.training.rewards import fields_of
from aidocks.training.run import ONLINE_METHODS, AdapterSettings, Reward
from aidocks.training.shapes import ModelShape, shape_of

#: What gives scores, as transformers calls it.
_SCORING = "ForSequenceClassification"
#: Tokens that are left for a prompt, at least.
_SHORTEST_PROMPT = 8


@dataclass(frozen=True)
class Found:
    """What had to be read before the rest could be decided.

    Attributes:
        data: The rows.
        device: That the workers train on.
        parents: The base, and reward models, with the hashes of their content.
    """

    data: Prepared
    device: TrainingDevice
    parents: tuple[Parent, ...]


class Request:
    """A request whose references are resolved. Opening it checks what headers and configurations can tell.

    Args:
        spec: The request.
        context: Of the plan. Models of the hub are at hand.
        converted: Reference -> directory of models that were stored as PyTorch files.

    Raises:
        AIDocksError: Whatever is wrong with the request, naming the field.
    """

    def __init__(
        self, spec: LLMTrainSpec, context: PlanContext, converted: Mapping[str, Path] | None = None
    ) -> None:
        self.spec, self.context = spec, context
        self._converted = converted or {}
        self.base = self._open(spec.base_model, "base_model")
        _require_causal(self.base, spec)
        layers = scanned_layers(spec.layers, context) if isinstance(spec.layers, ScannedLayers) else ()
        self.adapter = spec.adapter_settings(layers)
        self.chat_template = choose_chat_template(spec.chat_template, [self.base.path])
        if spec.chat_template == "auto" and self.chat_template is None:
            raise InvalidSpec(
                f"The model {spec.base_model!r} has no chat template.",
                field="chat_template",
                value="auto",
                hint="Name one, such as chatml.",
            )
        self._require_room()
        self.sources = data_sources(spec, context)
        self.resumed = self._find_checkpoint()
        _require_trainable(self.shape, self.adapter, spec)

    @cached_property
    def shape(self) -> ModelShape:
        """The sizes of the base."""
        return shape_of(self.base.config, self.base.entries)

    @cached_property
    def rewards(self) -> tuple[Reward, ...]:
        """What judges answers, with the directories of reward models."""
        return tuple(
            reward.resolved(self._judge(reward.model, number) if reward.model else None)
            for number, reward in enumerate(self.spec.rewards)
        )

    @property
    def tokenizer(self) -> Path:
        """Where the tokenizer of training and result is written."""
        return self.context.workspace / "tokenizer"

    @property
    def longest(self) -> int | None:
        """Tokens that an example may have at most, if the configuration says; a trained prompt takes of them."""
        own = self.shape.context
        ahead = self.adapter.virtual_tokens if self.adapter.kind == "prompt_tuning" else 0
        return None if own is None else max(8, own - ahead)

    @property
    def max_length(self) -> int:
        """Tokens of an example, of an online method with its answer."""
        return min(self.spec.max_length, self.longest or self.spec.max_length)

    @property
    def notes(self) -> tuple[str, ...]:
        """What one should know before anything has run."""
        found = list(self.spec.notes())
        if self.max_length < self.spec.max_length and "max_length" in self.spec.model_fields_set:
            found.append(
                f"`max_length` is {self.max_length}, not {self.spec.max_length}: the model reads no more."
            )
        if self.spec.dataset_split != "train" and all(self.sources.values()):
            found.append("`dataset_split` has no effect: it is of data sets of the hub.")
        evaluated = self.sources.get("eval_dataset")
        is_of_hub = self.spec.eval_dataset is not None and evaluated is None
        if self.spec.eval_dataset_split and not is_of_hub:
            found.append("`eval_dataset_split` has no effect: no data set of the hub is `eval_dataset`.")
        if self.spec.adapter == "qlora" and not self.spec.makes_adapter:
            found.append(
                "The adapter was trained on weights in 4 bits, and is added to the base as it is stored."
            )
        return tuple(found)

    def parents(self) -> list[tuple[str, str, Path]]:
        """Return field, reference and directory of every model of the request."""
        judges = [
            (f"rewards[{number}].model", str(spec.model), reward.model)
            for number, (spec, reward) in enumerate(zip(self.spec.rewards, self.rewards, strict=True))
            if reward.model is not None
        ]
        return [("base_model", self.spec.base_model, self.base.path), *judges]

    def directories(self) -> list[Path]:
        """Return the directories of all models that it reads."""
        return [directory for _, _, directory in self.parents()]

    def require_space(self) -> None:
        """Raise InsufficientDisk when result and checkpoints would not fit."""
        require_room(
            self.context.workspace,
            whole=0 if self.spec.makes_adapter else self.base.total_bytes,
            trained=self.shape.trained(self.adapter),
            checkpoints=self.spec.save_total_limit,
        )

    def check_data(self) -> None:
        """Look at the rows before any work: at all of them, or the first ones of many.

        Raises:
            InvalidSpec: Naming line and column.
        """
        from aidocks.training.data.examples import check_data

        spec = self.spec
        for field, source in self.sources.items():
            if source is not None:
                checked = check_data(
                    source,
                    spec.method,
                    fields=spec.fields,
                    format=spec.format,
                    loss_on=spec.loss_on,
                    template=self.chat_template or read_template(self.base.path),
                    spoken=spec.chat_template is not None,
                    field=field,
                )
                _require_compared(self.rewards, checked.layout.kept)

    def look(self) -> Generator[Stage, list[Any], Found]:
        """Yield the stages that prepare the data, look at the workers, and hash the models."""
        spec, context = self.spec, self.context
        splits = {"eval_dataset": spec.eval_dataset_split or spec.dataset_split}
        hub = {
            field: (str(reference), splits.get(field, spec.dataset_split))
            for field, reference in named_data(spec).items()
            if self.sources[field] is None
        }
        fetched = yield from fetch_datasets(hub)
        sources = {field: source for field, source in self.sources.items() if source} | fetched
        yield Stage(
            "tokenizer",
            (
                WriteTokenizer(
                    base=self.base.path, chat_template=self.chat_template, directory=self.tokenizer
                ),
            ),
        )
        named = self.parents()
        hashing = parent_units(named, context.cache_dir)
        asked = None if spec.precision == "auto" else spec.precision
        first = (self._preparation(sources), MeasureDevice(precision=asked))
        data, device, *described = yield Stage("prepare", (*first, *hashing))
        return Found(data, device, describe_members(named, hashing, described))

    def _preparation(self, sources: Mapping[str, DataSource]) -> PrepareData:
        spec = self.spec
        length = self.max_length
        if spec.method in ONLINE_METHODS:
            length = spec.max_prompt_length or length - spec.max_completion_length
        return PrepareData(
            dataset=sources["dataset"],
            eval_dataset=sources.get("eval_dataset"),
            method=spec.method,
            format=spec.format,
            fields=spec.fields,
            loss_on=spec.loss_on,
            spoken=spec.chat_template is not None,
            eval_split=spec.eval_split,
            seed=spec.seed,
            max_length=length,
            tokenizer=self.tokenizer,
            directory=self.context.workspace / "data",
        )

    def _open(self, reference: str, field: str) -> Checkpoint:
        place = self._converted.get(reference)
        return Checkpoint(place) if place is not None else self.context.resolver.open(reference, field=field)

    def _judge(self, reference: str, number: int) -> Path:
        field = f"rewards[{number}].model"
        judge = self._open(reference, field)
        names = judge.config.get("architectures") or [""]
        if not str(names[0]).endswith(_SCORING):
            raise IncompatibleModels(
                f"The model {reference!r} gives no scores, but is: {names[0] or 'none'}.",
                field=field,
                value=reference,
                hint="Train one with `method: reward`.",
            )
        return judge.path

    def _require_room(self) -> None:
        """Refuse answers that leave no room for a prompt."""
        spec = self.spec
        if spec.method not in ONLINE_METHODS:
            return
        whole = self.max_length if spec.max_prompt_length is None else self.longest
        if whole is not None and whole - spec.max_completion_length < _SHORTEST_PROMPT:
            raise InvalidSpec(
                f"Answers of {spec.max_completion_length} tokens leave no room for a prompt within {whole}.",
                field="max_completion_length",
                value=spec.max_completion_length,
                hint="Make it smaller, or `max_length` larger, as far as the model reads.",
            )

    def _find_checkpoint(self) -> Resumed | None:
        job = self.spec.resume_from_checkpoint
        return find_checkpoint(self.context.checkpoints_dir.parent, job) if job else None


def _require_causal(base: Checkpoint, spec: LLMTrainSpec) -> None:
    """Refuse what is no causal language model, or whose stored numbers are not its weights."""
    names = base.config.get("architectures") or [""]
    if not str(names[0]).endswith(CAUSAL_ENDINGS) or not text_config(base.config):
        raise IncompatibleModels(
            f"The model {spec.base_model!r} is not a causal language model, but: {names[0] or 'none'}.",
            field="base_model",
            value=spec.base_model,
            hint="Models whose architecture ends with ForCausalLM can be trained.",
        )
    quantised = base.config.get("quantization_config")
    if quantised:
        raise IncompatibleModels(
            f"The model {spec.base_model!r} is stored quantised.",
            field="base_model",
            value=spec.base_model,
            hint="Give the model that it was made from; `adapter: qlora` quantises it while it is trained.",
        )


def _require_trainable(shape: ModelShape, adapter: AdapterSettings, spec: LLMTrainSpec) -> None:
    """Refuse names of modules and tensors that the model has not."""
    kinds = sorted({matrix.kind for matrix in shape.linear})
    unknown = [name for name in adapter.target_modules if name not in kinds]
    if unknown:
        raise InvalidSpec(
            f"The model has no module {unknown[0]!r}.",
            field="target_modules",
            value=unknown[0],
            hint=f"Its linear modules are {', '.join(kinds)}.",
        )
    modules = {name.split(".")[-2] for name in shape.entries if "." in name}
    missing = [name for name in adapter.modules_to_save if name not in modules]
    if missing:
        is_head = missing[0] == "lm_head"
        raise InvalidSpec(
            f"The model has no module {missing[0]!r} with weights of its own.",
            field="modules_to_save",
            value=missing[0],
            hint="Its head is its embedding: name that, such as embed_tokens."
            if is_head
            else f"It has {', '.join(sorted(modules))}.",
        )
    unmatched = [pattern for pattern in adapter.layers if not shape.chosen([pattern])]
    if unmatched:
        raise InvalidSpec(
            f"No tensor of the model matches {unmatched[0]!r}.",
            field="layers",
            value=unmatched[0],
            hint=f"Names look like {next(iter(shape.entries))}.",
        )


def _require_compared(rewards: Sequence[Reward], kept: Mapping[str, str]) -> None:
    """Refuse rewards that compare with what the rows do not have."""
    for number, reward in enumerate(rewards):
        missing = fields_of([reward]) - set(kept)
        if missing:
            raise InvalidSpec(
                f"A reward compares with the field {min(missing)!r}, which the rows do not have.",
                field=f"rewards[{number}].field",
                value=min(missing),
                hint=f"Beside the prompt they have {', '.join(sorted(kept)) or 'none'}; `fields` gives them other "
                "names.",
            )


def stored_dtype(checkpoint: Checkpoint) -> str:
    """Return the type of most of a checkpoint's weights, as torch calls it."""
    return dtype_of(checkpoint.entries)


def dtype_of(entries: Mapping[str, TensorEntry]) -> str:
    """Return the type of most of some tensors, as torch calls it."""
    sizes: dict[str, int] = {}
    for entry in entries.values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    return torch_name(max(sizes, key=lambda dtype: sizes[dtype]))
