"""``/train/negatives``: hard negatives for the queries of a data set, as a data set that trainings can name.

prepare the rows, and further passages -> vectors and words -> look, judge and choose -> a data set of the registry.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from aidocks.datasets.store import DatasetStore
from aidocks.errors import InvalidSpec
from aidocks.models.converting import are_at_hand, bring
from aidocks.models.names import derive_name
from aidocks.models.unchanged import require_unchanged
from aidocks.plan import Operation, Plan, PlanContext, Stage
from aidocks.retrieval.data.check import check_retrieval_data, retrieval_source
from aidocks.retrieval.data.prepare import PreparedRetrieval, PrepareRetrievalData
from aidocks.retrieval.gathering import GatheredPassages, GatherPassages
from aidocks.retrieval.mining import mine, sentence
from aidocks.retrieval.opening import Choices, open_retriever
from aidocks.retrieval.store_negatives import StoreNegatives
from aidocks.specs.base import OperationResult, Spec
from aidocks.specs.mine_negatives import MineNegativesResult, MineNegativesSpec
from aidocks.specs.train_data import named_rows
from aidocks.training.data.hub import fetch_datasets
from aidocks.training.data.reading import SUFFIXES, place_of
from aidocks.training.data.rows import DataSource, describe_skipped
from aidocks.training.references import data_source
from aidocks.training.retriever import Retriever
from aidocks.training.run import Rows


class MineNegatives(Operation[MineNegativesSpec, MineNegativesResult]):
    """See the top of this module."""

    spec_type: ClassVar[type[Spec]] = MineNegativesSpec
    result_type: ClassVar[type[OperationResult]] = MineNegativesResult

    def inputs(self, spec: MineNegativesSpec) -> dict[str, str]:
        return spec.inputs()

    def preflight(self, spec: MineNegativesSpec, context: PlanContext) -> None:
        _require_somebody(spec)
        DatasetStore(_datasets(context)).require_free(_name(spec, context.job_id))
        source = _sources(spec, context)["dataset"]
        if source is not None:
            found = check_retrieval_data(source, "reranker", fields=spec.fields, format=spec.format)
            _require_rankings(found.rows, source.name)
        if are_at_hand(spec.inputs(), context):
            _open(spec, context, {})

    def plan(self, spec: MineNegativesSpec, context: PlanContext) -> Plan[MineNegativesResult]:
        name = _name(spec, context.job_id)
        converted, _ = yield from bring(spec.inputs(), context)
        model, judge = _open(spec, context, converted)
        read = [one for one in (model, judge) if one is not None]
        yield from require_unchanged(
            directory for one in read for directory in (one.model, one.adapter) if directory is not None
        )
        sources = yield from _fetch(spec, context)
        preparation = PrepareRetrievalData(
            kind="reranker",
            datasets={"dataset": sources["dataset"]},
            format=spec.format,
            fields=spec.fields,
            eval_split=0,
            seed=spec.seed,
            directory=context.workspace / "data",
        )
        (data,) = yield Stage("prepare", (preparation,))
        assert isinstance(data, PreparedRetrieval)
        _require_rankings(data.rows, sources["dataset"].name)
        for told in data.sentences:
            context.say(told)
        corpus = data.corpora[0]
        left_out: tuple[str, ...] = ()
        if "corpus" in sources:
            corpus, left_out = yield from _gather(corpus, sources["corpus"], context.workspace)
        mined = yield from mine(
            data.train, (corpus,), spec, model, judge, context, context.workspace / "negatives", spec.seed
        )
        context.say(sentence(mined))
        notes = [*_notes(spec), *left_out, *mined.notes]
        store = StoreNegatives(
            rows=mined.rows,
            name=name,
            otherwise=derive_name(name, "negatives", context.job_id),
            datasets=_datasets(context),
        )
        (stored,) = yield Stage("store", (store,))
        if stored.name != name:
            notes.append(
                f"Somebody has stored a data set called {name} meanwhile: this one is {stored.name}."
            )
        for told in notes:
            context.say(told)
        return MineNegativesResult(
            dataset=stored.name,
            file_id=stored.id,
            data=data.data[0],
            queries=mined.queries,
            passages=corpus.count,
            negatives=mined.negatives,
            without=mined.without,
            too_alike=mined.too_alike,
            rank_of_positive=mined.rank_of_positive,
            notes=tuple(notes),
        )


def _name(spec: MineNegativesSpec, job_id: str) -> str:
    """Return the name of the new data set."""
    if spec.name is not None:
        return spec.name
    reference = named_rows(spec.dataset)
    ending = next((suffix for suffix in SUFFIXES if reference.endswith(suffix)), "")
    return derive_name(reference.removesuffix(ending), "negatives", job_id)


def _datasets(context: PlanContext) -> Path:
    if context.datasets_dir is None:
        raise InvalidSpec(
            "There is no place for data sets here, which is where negatives are kept.", field="name"
        )
    return context.datasets_dir


def _require_somebody(spec: MineNegativesSpec) -> None:
    if spec.model is None and not spec.bm25:
        raise InvalidSpec(
            "Nothing looks for negatives: there is no model, and BM25 is not to.",
            field="bm25",
            value=False,
            hint="Name an embedding model (`model`), or leave `bm25` on.",
        )


def _require_rankings(rows: str, name: str) -> None:
    if rows != "ranking":
        raise InvalidSpec(
            f"{name} has pairs of texts with scores, and no passages that answer queries.",
            field="dataset",
            value=name,
            hint="Hard negatives are found for queries with right passages: columns such as `query` and `positive`.",
        )


def _notes(spec: MineNegativesSpec) -> tuple[str, ...]:
    """Return what of the request has no effect."""
    notes = []
    if spec.max_score is not None and spec.model is None:
        notes.append("`max_score` has no effect: it is of the model, and none is named.")
    if spec.judge is not None and spec.margin is None:
        notes.append("`judge` has no effect: `margin` is null, so nothing is left out.")
    prompts = [name for name in ("query_prompt", "passage_prompt") if getattr(spec, name) is not None]
    if prompts and spec.model is None:
        notes.append(f"`{prompts[0]}` has no effect: no embedding model is named.")
    return tuple(notes)


def _open(
    spec: MineNegativesSpec, context: PlanContext, converted: Mapping[str, Path]
) -> tuple[Retriever | None, Retriever | None]:
    """Return the model and the judge."""
    model = judge = None
    if spec.model is not None:
        model = open_retriever(
            spec.model,
            "embedding",
            context.resolver,
            Choices(spec.query_prompt, spec.passage_prompt, max_length=spec.max_length),
            field="model",
            remote_code=context.remote_code,
            converted=converted,
        )
    if spec.judge is not None:
        judge = open_retriever(
            spec.judge,
            "reranker",
            context.resolver,
            Choices(max_length=spec.max_length),
            field="judge",
            remote_code=context.remote_code,
            converted=converted,
        )
    return model, judge


def _sources(spec: MineNegativesSpec, context: PlanContext) -> dict[str, DataSource | None]:
    """Return field -> data set; None for one of the hub."""
    found = {"dataset": retrieval_source(spec.dataset, context, "dataset", spec.dataset_split)}
    if spec.corpus is not None:
        found["corpus"] = data_source(spec.corpus, context, "corpus")
    return found


def _fetch(
    spec: MineNegativesSpec, context: PlanContext
) -> Generator[Stage, list[Any], dict[str, DataSource]]:
    """Yield the stage that downloads data sets of the hub; return field -> data set."""
    sources = _sources(spec, context)
    hub = {
        field: (str(getattr(spec, field)), spec.dataset_split)
        for field, one in sources.items()
        if one is None
    }
    fetched = yield from fetch_datasets(hub)
    return {field: one for field, one in sources.items() if one is not None} | fetched


def _gather(
    own: Rows, further: DataSource, workspace: Path
) -> Generator[Stage, list[Any], tuple[Rows, tuple[str, ...]]]:
    """Yield the stage that adds further passages; return all of them, and what of these was left out."""
    unit = GatherPassages(own=own, further=further, path=workspace / "passages" / "passages.jsonl")
    (gathered,) = yield Stage("passages", (unit,))
    assert isinstance(gathered, GatheredPassages)
    told = describe_skipped(gathered.skipped, place_of(further))
    return gathered.rows, ((f"Of {further.name}, passages are left out. {told}",) if told else ())
