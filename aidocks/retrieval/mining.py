"""Hard negatives: passages that look like the answer of a query, and are none.

An embedding model and BM25 each rank all passages; their first ones that are no known positive are the candidates. Some
of these are answers that nobody has marked, and would teach the wrong thing. So what scores nearly as high as the best
positive is left out: the positive-aware mining of NV-Retriever (Moreira et al., arXiv 2407.15831, section 3, "TopK-
PercPos"), whose threshold is a share of the positive's own score.

index the passages, make the vectors -> look, judge and choose, in parts -> one file.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from aidocks.checkpoints.files import OutputFile
from aidocks.plan import PlanContext, Stage, Unit, UnitContext
from aidocks.retrieval.bm25 import IndexWords
from aidocks.retrieval.embedding import VECTORS, EmbedTexts, Vectors, embedding_units, open_array
from aidocks.retrieval.hard_negatives import KeyedPassages, KeyPassages, LookForNegatives, MinedPart, Searches
from aidocks.retrieval.parts import join_files, parts_of
from aidocks.specs.train_retrieval import NegativesFields
from aidocks.training.retriever import Retriever
from aidocks.training.run import Rows

#: Queries of one unit that looks for negatives.
_LEAST, _MOST = 64, 1024
_ROWS_FILE = "train.jsonl"


class Mined(BaseModel):
    """Training rows with hard negatives.

    Attributes:
        rows: As before, with ``negatives`` added.
        queries: Rows for which negatives were looked for.
        negatives: That were found, altogether.
        without: Rows for which none was left.
        too_alike: Passages that were left out as too good to be wrong.
        rank_of_positive: Median rank of the best positive in the model's ranking, from 1; None without a model.
        notes: What one should know.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: Rows
    queries: int
    negatives: int
    without: int
    too_alike: int
    rank_of_positive: float | None = None
    notes: tuple[str, ...] = ()


def mine(
    train: Rows,
    corpora: Sequence[Rows],
    settings: NegativesFields,
    retriever: Retriever | None,
    judge: Retriever | None,
    context: PlanContext,
    directory: Path,
    seed: int,
) -> Generator[Stage, list[Any], Mined]:
    """Yield the stages that look for hard negatives; return the rows with them.

    Args:
        train: Rankings (``query``, ``positives``, ``negatives``, maybe ``set``: in which of the corpora they look).
        corpora: Passages (``text``) of each data set.
        settings: Of the request. The models that it names are the next two arguments.
        retriever: Embedding model that looks for them; None for BM25 alone, whatever ``settings.bm25`` says.
        judge: Reranker that says what is too alike; None for the embedding model.
        context: Of the plan; vectors are kept below its workspace.
        directory: Where the rows and indices are written.
        seed: Of ``sampling: random``.
    """
    searches = yield from _prepare(
        train, corpora, settings, retriever, directory, context.workspace / VECTORS
    )
    units = tuple(
        LookForNegatives(
            train=train,
            begin=begin,
            end=end,
            searches=searches,
            settings=_choices(settings),
            judge=judge,
            seed=seed,
            name=retriever.name if retriever is not None else "BM25",
            directory=directory / "parts",
        )
        for begin, end in parts_of(train.count, least=_LEAST, most=_MOST)
    )
    parts = yield Stage("look for negatives", units)
    (joined,) = yield Stage(
        "rows with negatives", (JoinMined(parts=tuple(parts), path=directory / _ROWS_FILE),)
    )
    assert isinstance(joined, JoinedNegatives)
    mined = joined.mined
    notes = _notes(mined, joined.kept, joined.unplaced, settings, retriever, judge)
    return mined.model_copy(update={"notes": notes})


def sentence(mined: Mined) -> str:
    """Say in words what was found."""
    parts = [f"{mined.negatives:,} hard negatives for {mined.queries:,} queries"]
    if mined.too_alike:
        parts.append(f"{mined.too_alike:,} passages left out as too much like an answer")
    if mined.without:
        parts.append(f"none left for {mined.without:,} queries")
    if mined.rank_of_positive is not None:
        parts.append(f"the right passage is at rank {mined.rank_of_positive:g} in the median")
    return "; ".join(parts) + "."


def _choices(settings: NegativesFields) -> NegativesFields:
    """Return the settings alone, of a request that may have more; units name models by their files."""
    chosen = {name: getattr(settings, name) for name in NegativesFields.model_fields}
    return NegativesFields(**(chosen | {"model": None, "judge": None}))


def _prepare(
    train: Rows,
    corpora: Sequence[Rows],
    settings: NegativesFields,
    retriever: Retriever | None,
    directory: Path,
    vectors_dir: Path,
) -> Generator[Stage, list[Any], tuple[Searches, ...]]:
    """Yield the stage that makes what the searches need; return it, of each corpus."""
    names = [f"data set {number + 1}" if len(corpora) > 1 else "the data" for number in range(len(corpora))]
    keys = [
        KeyPassages(corpus=corpus, of=name, path=directory / str(number) / "keys.npy")
        for number, (corpus, name) in enumerate(zip(corpora, names, strict=True))
    ]
    words: list[IndexWords] = []
    if settings.bm25 or retriever is None:
        words = [
            IndexWords(corpus=corpus, of=name, directory=directory / str(number) / "words")
            for number, (corpus, name) in enumerate(zip(corpora, names, strict=True))
        ]
    queries: tuple[EmbedTexts, ...] = ()
    passages: list[tuple[EmbedTexts, ...]] = [() for _ in corpora]
    if retriever is not None:
        queries = embedding_units(retriever, train, "query", "query", "the data", vectors_dir)
        passages = [
            embedding_units(retriever, corpus, "text", "passage", name, vectors_dir)
            for corpus, name in zip(corpora, names, strict=True)
        ]
    units: list[Unit[Any]] = [*queries, *(unit for group in passages for unit in group), *words, *keys]
    results = yield Stage("vectors and words of the passages", tuple(units))
    answers = iter(results)

    def take(count: int) -> tuple[Any, ...]:
        return tuple(next(answers) for _ in range(count))

    query_vectors: tuple[Vectors, ...] = take(len(queries))
    vectors = [take(len(group)) for group in passages]
    indices = take(len(words))
    keyed: tuple[KeyedPassages, ...] = take(len(keys))
    return tuple(
        Searches(
            corpus=corpus,
            keys=keyed[number].file,
            query_vectors=query_vectors,
            passage_vectors=vectors[number],
            words=indices[number].directory if indices else None,
        )
        for number, corpus in enumerate(corpora)
    )


class JoinedNegatives(BaseModel):
    """All parts together.

    Attributes:
        kept: Rows that were left as they were, for they carry scores of their own.
        unplaced: Rows none of whose positives is among the passages.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mined: Mined
    kept: int
    unplaced: int
    file: OutputFile


class JoinMined(Unit[JoinedNegatives]):
    """One file of the rows of all parts, and what was found in them."""

    result_type: ClassVar[type[BaseModel]] = JoinedNegatives

    parts: tuple[MinedPart, ...]
    path: Path = Field(description="Where the rows are written.")

    @property
    def label(self) -> str:
        return self.path.name

    @property
    def computes(self) -> bool:
        return False

    def run(self, context: UnitContext) -> JoinedNegatives:
        import numpy as np

        file = join_files(self.path, [part.rows.file for part in self.parts])
        ranks = np.concatenate([open_array(part.ranks.path) for part in self.parts]) if self.parts else ()
        count = sum(part.rows.count for part in self.parts)
        kept = sum(part.kept for part in self.parts)
        mined = Mined(
            rows=Rows(path=self.path, sha256=file.sha256, count=count),
            queries=count - kept,
            negatives=sum(part.negatives for part in self.parts),
            without=sum(part.without for part in self.parts),
            too_alike=sum(part.too_alike for part in self.parts),
            rank_of_positive=float(np.median(ranks)) if len(ranks) else None,
        )
        unplaced = sum(part.unplaced for part in self.parts)
        return JoinedNegatives(mined=mined, kept=kept, unplaced=unplaced, file=file)

    def outputs(self, result: JoinedNegatives) -> Sequence[OutputFile]:
        return (result.file,)


def _notes(
    mined: Mined,
    kept: int,
    unplaced: int,
    settings: NegativesFields,
    retriever: Retriever | None,
    judge: Retriever | None,
) -> tuple[str, ...]:
    notes = []
    if kept:
        notes.append(f"{kept:,} rows carry scores of their passages, and get no others.")
    if mined.without:
        notes.append(f"No hard negative is left for {mined.without:,} of {mined.queries:,} queries.")
    if retriever is None and not settings.bm25:
        notes.append(
            "BM25 looked for negatives, though `bm25` is false: there is no embedding model that could."
        )
    if retriever is None and judge is None and settings.margin is not None:
        notes.append(
            "No model judges what BM25 finds, so `margin` leaves nothing out: some of it may be answers that nobody "
            "has marked."
        )
    if unplaced:
        notes.append(
            f"The passages lack the answers of {unplaced:,} queries, so `margin` leaves nothing out there."
        )
    return tuple(notes)
