"""A request of ``/train/emb`` or ``/train/rerank`` whose references are resolved, checked by what headers can tell."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from aidocks.checkpoints.layout import CONFIG_FILE, module_files, read_json_object
from aidocks.errors import IncompatibleModels
from aidocks.models.manifest import Parent
from aidocks.models.parents import describe_members, parent_units
from aidocks.plan import PlanContext, Stage
from aidocks.retrieval.architecture import Architecture, architecture_of
from aidocks.retrieval.checks import (
    RowsSeen,
    kind_of,
    notes_before,
    require_engine,
    require_loss,
    require_model,
)
from aidocks.retrieval.data.check import (
    CheckedRetrieval,
    check_retrieval_data,
    require_one_kind,
    retrieval_source,
)
from aidocks.retrieval.data.prepare import PreparedRetrieval, PrepareRetrievalData
from aidocks.retrieval.estimate import shape_in_training
from aidocks.retrieval.hyper import RetrieverSpec
from aidocks.retrieval.opening import AS_IT_IS, Choices, open_retriever
from aidocks.retrieval.trainable import require_one_adapter
from aidocks.specs.train_emb import EmbeddingTrainSpec
from aidocks.specs.train_rerank import RerankerTrainSpec
from aidocks.training.checkpoints import require_room
from aidocks.training.data.hub import fetch_datasets
from aidocks.training.data.rows import DataSource
from aidocks.training.device import MeasureDevice, TrainingDevice
from aidocks.training.resuming import Resumed, find_checkpoint
from aidocks.training.retriever import Retriever, RetrieverKind, RowKind
from aidocks.training.shapes import ModelShape

_CANDIDATES = RerankerTrainSpec.model_fields["candidates"].default


@dataclass(frozen=True)
class Found:
    """What had to be read before the rest could be decided.

    Attributes:
        data: The rows.
        device: That the workers train on.
        parents: The base first, and the models that taught it or looked for negatives.
    """

    data: PreparedRetrieval
    device: TrainingDevice
    parents: tuple[Parent, ...]


class RetrievalRequest:
    """A request whose references are resolved. Opening it checks what headers and configurations can tell.

    Args:
        spec: The request.
        context: Of the plan. Models of the hub are at hand.
        converted: Reference -> directory of models that were stored as PyTorch files.

    Raises:
        AIDocksError: Whatever is wrong with the request, naming the field.
    """

    def __init__(
        self, spec: RetrieverSpec, context: PlanContext, converted: Mapping[str, Path] | None = None
    ) -> None:
        self.spec, self.context = spec, context
        self.kind: RetrieverKind = kind_of(spec)
        require_engine(spec)
        self._converted = converted or {}
        base = self._open(spec.base_model, self.kind, "base_model", self._choices())
        # What is measured before is the very model that the training begins with, a new head included.
        self.base = base.model_copy(update={"seed": spec.seed})
        require_one_adapter(self.base, makes_adapter=spec.makes_adapter)
        self.architecture: Architecture = architecture_of(self.base.model)
        _require_plain(self.base.model / self.architecture.transformer, spec.base_model)
        require_model(spec, self.architecture)
        self.adapter = spec.adapter_settings()
        self.teacher = self._opened(spec.distill_from, "reranker", "distill_from")
        mined = spec.mine_negatives
        self.judge = self._opened(mined.judge if mined else None, "reranker", "mine_negatives.judge")
        self.finder = self._find_finder()
        self._named_miner = self._opened(mined.model if mined else None, "embedding", "mine_negatives.model")
        self.sources = data_sources(spec, context)
        job = spec.resume_from_checkpoint
        self.resumed: Resumed | None = find_checkpoint(context.checkpoints_dir.parent, job) if job else None

    @cached_property
    def shape(self) -> ModelShape:
        """The sizes of the base."""
        return shape_in_training(self.architecture)

    @property
    def miner(self) -> Retriever | None:
        """The embedding model that looks for hard negatives; None where BM25 alone does, or nobody."""
        if self.spec.mine_negatives is None:
            return None
        # A plain encoder's vectors say little before it is trained.
        own = self.kind == "embedding" and self.architecture.kind == "embedding"
        return self._named_miner or (self.base if own else None)

    @property
    def max_length(self) -> int:
        """Tokens of a text (reranker: of query and passage)."""
        return self.base.max_length

    @property
    def notes(self) -> tuple[str, ...]:
        """What one should know before anything has run."""
        spec, found = self.spec, list(notes_before(self.spec))
        if spec.max_length is not None and self.max_length < spec.max_length:
            found.append(
                f"`max_length` is {self.max_length}, not {spec.max_length}: the model reads no more."
            )
        if (
            self.kind == "reranker"
            and self.architecture.kind is None
            and self.architecture.family == "encoder"
        ):
            found.append(
                "The base gives no scores of its own: it gets a score with random weights, which is what is measured "
                "before the training."
            )
        if isinstance(spec, RerankerTrainSpec) and spec.retriever is None and spec.candidates != _CANDIDATES:
            found.append("`candidates` matters only where BM25 or `retriever` finds the passages.")
        return tuple(found)

    def parents(self) -> list[tuple[str, str, Path]]:
        """Return field, reference and directory of the models that the result is made of, or learnt from."""
        spec = self.spec
        found = [("base_model", spec.base_model, self.base)]
        named = {
            "distill_from": self.teacher,
            "mine_negatives.model": self._named_miner,
            "mine_negatives.judge": self.judge,
        }
        found += [(field, one.name, one) for field, one in named.items() if one is not None]
        return [(field, name, directory) for field, name, one in found for directory in _directories(one)]

    def directories(self) -> list[Path]:
        """Return the directories of all models that it reads."""
        finder = [] if self.finder in (None, "bm25") else _directories(self.finder)  # type: ignore[arg-type]
        return [*(directory for _, _, directory in self.parents()), *finder]

    def require_space(self) -> None:
        """Raise InsufficientDisk when result and checkpoints would not fit."""
        stored = sum(path.stat().st_size for path in self.base.model.rglob("*.safetensors"))
        require_room(
            self.context.workspace,
            whole=0 if self.spec.makes_adapter else stored,
            trained=self.shape.trained(self.adapter),
            checkpoints=self.spec.save_total_limit,
        )

    def check_data(self) -> None:
        """Look at the rows before any work: at all of them, or the first ones of many.

        Raises:
            InvalidSpec: Naming line and column, or what of the request does not go together with them.
        """
        checked: list[CheckedRetrieval] = []
        kinds: dict[str, tuple[str, RowKind]] = {}
        for field, source in self.sources.items():
            if source is None:
                continue
            found = check_retrieval_data(
                source, self.kind, fields=self.spec.fields, format=self.spec.format, field=field
            )
            if field in self.spec.datasets():
                checked.append(found)
                # The beginning of a large one may look like another kind than all of it.
                kinds |= {field: (source.name, found.rows)} if found.complete else {}
        if kinds:
            require_one_kind(kinds)
        if checked and len(checked) == len(self.spec.datasets()):
            seen = RowsSeen(
                rows=checked[0].rows,
                negatives=any(one.negatives or not one.complete for one in checked),
                scored=all(one.scored for one in checked),
            )
            require_loss(self.spec, seen)

    def look(self) -> Generator[Stage, list[Any], Found]:
        """Yield the stages that prepare the data, look at the workers, and hash the models."""
        spec, context = self.spec, self.context
        named = named_data(spec)
        hub = {
            field: (str(named[field][0]), named[field][1])
            for field, one in self.sources.items()
            if one is None
        }
        fetched = yield from fetch_datasets(hub)
        sources = {field: source for field, source in self.sources.items() if source} | fetched
        preparation = PrepareRetrievalData(
            kind=self.kind,
            datasets={field: sources[field] for field in spec.datasets()},
            eval_datasets={field: sources[field] for field in spec.eval_datasets()},
            format=spec.format,
            fields=spec.fields,
            eval_split=spec.eval_split,
            seed=spec.seed,
            directory=context.workspace / "data",
        )
        parents = self.parents()
        hashing = parent_units(parents, context.cache_dir, self._in_parts())
        asked = None if spec.precision == "auto" else spec.precision
        device = MeasureDevice(precision=asked)
        data, found, *described = yield Stage("prepare", (preparation, device, *hashing))
        return Found(data, found, describe_members(parents, hashing, described))

    def _in_parts(self) -> set[Path]:
        """Return the directories of models that are more than one plain checkpoint."""
        used = (self.base, self.teacher, self._named_miner, self.judge)
        return {
            one.model
            for one in used
            if one is not None
            and (
                one.remote_code
                or not (one.model / CONFIG_FILE).is_file()
                or any(path.suffix == ".safetensors" for path in module_files(one.model))
            )
        }

    def _choices(self) -> Choices:
        """Return what the request says of the base's use."""
        spec = self.spec
        chosen = Choices(
            query_prompt=spec.query_prompt, passage_prompt=spec.passage_prompt, max_length=spec.max_length
        )
        if isinstance(spec, EmbeddingTrainSpec):
            return replace(chosen, pooling=spec.pooling, normalize=spec.normalize, task=spec.task)
        return chosen

    def _open(
        self, reference: str, kind: RetrieverKind, field: str, choices: Choices = AS_IT_IS
    ) -> Retriever:
        return open_retriever(
            reference,
            kind,
            self.context.resolver,
            choices,
            field=field,
            remote_code=self.context.remote_code,
            converted=self._converted,
        )

    def _opened(self, reference: str | None, kind: RetrieverKind, field: str) -> Retriever | None:
        return None if reference is None else self._open(reference, kind, field)

    def _find_finder(self) -> Retriever | Literal["bm25"] | None:
        """Return what finds the passages that a reranker is measured on."""
        asked = self.spec.retriever if isinstance(self.spec, RerankerTrainSpec) else None
        if asked is None or asked == "bm25":
            return "bm25" if asked else None
        return self._open(asked, "embedding", "retriever")


def named_data(spec: RetrieverSpec) -> dict[str, tuple[Any, str]]:
    """Return field -> data set (reference or rows) and split, of all that a request learns from or measures on."""
    split = spec.eval_dataset_split or spec.dataset_split
    return {field: (one, spec.dataset_split) for field, one in spec.datasets().items()} | {
        field: (one, split) for field, one in spec.eval_datasets().items()
    }


def data_sources(spec: RetrieverSpec, context: PlanContext) -> dict[str, DataSource | None]:
    """Return field -> data set; None for one of the hub, whose form alone is checked.

    Raises:
        InvalidSpec, PathNotAllowed: As :func:`~aidocks.retrieval.data.check.retrieval_source`.
    """
    return {
        field: retrieval_source(reference, context, field, split)
        for field, (reference, split) in named_data(spec).items()
    }


def _directories(retriever: Retriever) -> list[Path]:
    return [retriever.model, *([retriever.adapter] if retriever.adapter else [])]


def _require_plain(directory: Path, reference: str) -> None:
    """Refuse a base whose stored numbers are not its weights."""
    if read_json_object(directory / CONFIG_FILE).get("quantization_config"):
        raise IncompatibleModels(
            f"The model {reference!r} is stored quantised.",
            field="base_model",
            value=reference,
            hint="Give the model that it was made from.",
        )
