"""What a model that finds texts is worth: measured on held-out queries, before the training and after it.

An embedding model looks for each query in the whole corpus; the search is exact. A reranker puts candidates in order:
those that the row of the data names, or those that a retriever finds, and then a right passage that the retriever did
not find counts as not found. Both models see the same queries and passages, so changes are judged query by query.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from aidocks.plan import PlanContext, Stage, Unit
from aidocks.retrieval.bm25 import IndexWords
from aidocks.retrieval.embedding import VECTORS, Vectors, embedding_units, similarity_of
from aidocks.retrieval.eval_set import EvalSet
from aidocks.retrieval.measures import Measured, Measures, joined
from aidocks.retrieval.parts import JoinRows, WrittenPart, parts_of
from aidocks.retrieval.ranking import ComparePairs, RankByVectors, RankByWords
from aidocks.retrieval.scoring import has_wrong, ordering_units, pair_units
from aidocks.training.measuring import read_rows
from aidocks.training.retriever import Retriever
from aidocks.training.run import Rows

Moment = Literal["before", "after"]

#: Passages that are looked at of an order: what the deepest figure needs.
_DEPTH = 100
#: Queries of one unit that looks for passages.
_LEAST, _MOST = 64, 1024


class Candidates(BaseModel):
    """What a retriever finds for the queries of every set, for a reranker to put in order.

    Attributes:
        rows: Of each set, ``candidates`` (lines of the corpus, the best first), one row of each query; None where a
            reranker orders the passages that the row itself names, and for scored pairs.
        alone: What the retriever's own order is worth, of the same sets.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: tuple[Rows | None, ...]
    alone: tuple[Measured | None, ...]


def measure(
    sets: Sequence[EvalSet],
    retriever: Retriever,
    moment: Moment,
    context: PlanContext,
    *,
    candidates: Candidates | None = None,
) -> Generator[Stage, list[Any], tuple[Measured, ...]]:
    """Yield the stages that measure a model on each set; return what was measured, in the order of the sets.

    Args:
        sets: What is measured on.
        retriever: The model: an embedding model looks in the whole corpus, a reranker puts candidates in order.
        moment: Whether it is the base or the result.
        context: Of the plan; vectors are written below its workspace.
        candidates: Of a reranker, as :func:`find_candidates` returns them.
    """
    if not sets:
        return ()
    if retriever.kind == "reranker":
        return (yield from _measure_order(sets, retriever, moment, candidates))
    plans = [_Vectors(one, retriever, context.workspace) for one in sets]
    measured = yield from _in_turn(f"measure {moment}", f"rank {moment}", plans)
    return tuple(_measured(one, measures) for one, measures in zip(sets, measured, strict=True))


def find_candidates(
    sets: Sequence[EvalSet],
    retriever: Retriever | Literal["bm25"] | None,
    context: PlanContext,
    *,
    count: int = 50,
) -> Generator[Stage, list[Any], Candidates]:
    """Yield the stages in which a retriever finds passages for the queries of each set; return them.

    Args:
        sets: What is measured on.
        retriever: An embedding model, or BM25. None: the passages that rows name are ordered, and BM25 finds them
            where most rows of a set name no wrong ones.
        context: Of the plan; what is found is written below its workspace.
        count: Passages of each query.
    """
    directory = context.workspace / "candidates"
    plans: list[_Vectors | _Words] = []
    places: list[int] = []
    paths: list[Path] = []
    for number, one in enumerate(sets):
        if one.rows == "scored" or (retriever is None and _names_wrong(one)):
            continue
        where = directory / str(number)
        if isinstance(retriever, Retriever):
            plans.append(_Vectors(one, retriever, context.workspace, count, found=where))
        else:
            plans.append(_Words(one, where, count))
        places.append(number)
        paths.append(where / "candidates.jsonl")
    if not plans:
        return Candidates(rows=(None,) * len(sets), alone=(None,) * len(sets))
    found = yield from _in_turn("look for candidates", "candidates", plans)
    joins = tuple(JoinRows(parts=_parts(parts), path=path) for path, parts in zip(paths, found, strict=True))
    files = yield Stage("candidates in one file", joins)
    rows: list[Rows | None] = [None] * len(sets)
    alone: list[Measured | None] = [None] * len(sets)
    for place, file, parts in zip(places, files, found, strict=True):
        rows[place], alone[place] = file.rows, _measured(sets[place], parts)
    return Candidates(rows=tuple(rows), alone=tuple(alone))


class _Vectors:
    """The units that measure an embedding model on one set: vectors first, then comparisons.

    Args:
        one: The set.
        retriever: The model.
        workspace: Of the job, where vectors are kept.
        count: Passages that are found for each query.
        found: Directory in which what is found is written; None for nowhere.
    """

    def __init__(
        self,
        one: EvalSet,
        retriever: Retriever,
        workspace: Path,
        count: int = _DEPTH,
        *,
        found: Path | None = None,
    ) -> None:
        self._set, self._retriever, self._directory = one, retriever, workspace / VECTORS
        self._count, self._found = count, found
        self._sides: list[int] = []

    def first(self) -> tuple[Unit[Any], ...]:
        one, model = self._set, self._retriever
        if one.rows == "scored":
            # Likeness is the same both ways: the texts are read alike, as a training reads them.
            sides = [
                embedding_units(model, one.queries, side, "query", one.name, self._directory)
                for side in ("first", "second")
            ]
        else:
            assert one.corpus is not None, "rankings have a corpus"
            sides = [
                embedding_units(model, one.queries, "query", "query", one.name, self._directory),
                embedding_units(model, one.corpus, "text", "passage", one.name, self._directory),
            ]
        self._sides = [len(side) for side in sides]
        return tuple(unit for side in sides for unit in side)

    def second(self, vectors: Sequence[Vectors]) -> tuple[Unit[Measures], ...]:
        one, similarity = self._set, similarity_of(self._retriever)
        left, right = tuple(vectors[: self._sides[0]]), tuple(vectors[self._sides[0] :])
        if one.rows == "scored":
            unit = ComparePairs(
                pairs=one.queries,
                name=self._retriever.name,
                of=one.name,
                first=left,
                second=right,
                similarity=similarity,
            )
            return (unit,)
        return tuple(
            RankByVectors(
                queries=one.queries,
                begin=begin,
                end=end,
                count=self._count,
                of=one.name,
                file=self._found / f"found-{begin:08d}.jsonl" if self._found is not None else None,
                name=self._retriever.name,
                query_vectors=left,
                passage_vectors=right,
                similarity=similarity,
            )
            for begin, end in parts_of(one.queries.count, least=_LEAST, most=_MOST)
        )


class _Words:
    """The same of BM25: an index first, then searches; what is found is written."""

    def __init__(self, one: EvalSet, directory: Path, count: int) -> None:
        self._set, self._directory, self._count = one, directory, count

    def first(self) -> tuple[Unit[Any], ...]:
        assert self._set.corpus is not None, "rankings have a corpus"
        return (IndexWords(corpus=self._set.corpus, of=self._set.name, directory=self._directory / "words"),)

    def second(self, indexed: Sequence[Any]) -> tuple[Unit[Measures], ...]:
        return tuple(
            RankByWords(
                queries=self._set.queries,
                begin=begin,
                end=end,
                count=self._count,
                of=self._set.name,
                file=self._directory / f"found-{begin:08d}.jsonl",
                index=indexed[0].directory,
            )
            for begin, end in parts_of(self._set.queries.count, least=_LEAST, most=_MOST)
        )


def _in_turn(
    first: str, second: str, plans: Sequence[_Vectors | _Words]
) -> Generator[Stage, list[Any], list[list[Measures]]]:
    """Yield two stages with the units of all plans; return the parts of the measures of each."""
    begun = [plan.first() for plan in plans]
    results = yield from _grouped(first, begun)
    ended = [plan.second(made) for plan, made in zip(plans, results, strict=True)]
    return (yield from _grouped(second, ended))


def _grouped(
    name: str, groups: Sequence[tuple[Unit[Any], ...]]
) -> Generator[Stage, list[Any], list[list[Any]]]:
    """Yield one stage with the units of all groups; return their results, group by group."""
    units = tuple(unit for group in groups for unit in group)
    results = iter((yield Stage(name, units)) if units else ())
    return [[next(results) for _ in group] for group in groups]


def _measure_order(
    sets: Sequence[EvalSet], retriever: Retriever, moment: Moment, candidates: Candidates | None
) -> Generator[Stage, list[Any], tuple[Measured, ...]]:
    found = candidates.rows if candidates is not None else (None,) * len(sets)
    groups: list[tuple[Unit[Any], ...]] = []
    for one, rows in zip(sets, found, strict=True):
        if one.rows == "scored":
            groups.append(pair_units(retriever, one.queries, one.name))
        else:
            assert one.corpus is not None, "rankings have a corpus"
            groups.append(ordering_units(retriever, one.queries, one.corpus, rows, one.name))
    measured = yield from _grouped(f"measure {moment}", groups)
    return tuple(_measured(one, parts, ordered=True) for one, parts in zip(sets, measured, strict=True))


def _measured(one: EvalSet, parts: Sequence[Measures], *, ordered: bool = False) -> Measured:
    measures = joined(parts)
    passages = one.corpus.count if one.corpus is not None else 0
    if ordered and passages:
        passages = round(fmean(measures.ordered)) if measures.ordered else 0
    return Measured(dataset=one.name, rows=one.rows, passages=passages, measures=measures)


def _names_wrong(one: EvalSet) -> bool:
    """Say whether at least half of a set's rows name passages that are not right."""
    rows = read_rows(one.queries.path)
    return 2 * sum(has_wrong(row) for row in rows) >= len(rows)


def _parts(parts: Sequence[Measures]) -> tuple[WrittenPart, ...]:
    written = []
    for part in parts:
        assert part.file is not None, "candidates are written"
        written.append(WrittenPart(file=part.file, count=len(part.numbers)))
    return tuple(written)
