"""The units in which a reranker gives scores: to the candidates of held-out queries, and to scored pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, Field

from aidocks.evaluate.memory import memory_to_load
from aidocks.plan import Unit, UnitContext
from aidocks.retrieval.data.convert import digest_of
from aidocks.retrieval.measures import Measures, comparable, measures_of
from aidocks.retrieval.parts import parts_of, read_lines
from aidocks.training.measuring import read_rows
from aidocks.training.retriever import Retriever
from aidocks.training.run import Rows

#: Queries (or pairs) of one unit.
_LEAST, _MOST = 16, 512


class OrderCandidates(Unit[Measures]):
    """The candidates of some queries, put in order by a reranker.

    A query all of whose own candidates are right is left out: any order of them would be the best.
    """

    result_type: ClassVar[type[BaseModel]] = Measures

    retriever: Retriever
    queries: Rows
    corpus: Rows
    candidates: Rows | None = Field(
        description="Lines of the corpus for each query; None for those that its row names."
    )
    begin: int = Field(ge=0)
    end: int = Field(description="Of the queries: from `begin` to before this one.")
    of: str = Field(description="The data set, as people know it.")

    @property
    def label(self) -> str:
        return f"{self.retriever.name}: passages for queries {self.begin + 1} to {self.end} of {self.of}"

    @property
    def memory(self) -> int | None:
        return memory_to_load(self.retriever.model)

    @property
    def weight(self) -> float:
        return float(self.end - self.begin)

    def run(self, context: UnitContext) -> Measures:
        from aidocks.retrieval.metrics import in_order
        from aidocks.retrieval.reranker import open_reranker

        rows = read_rows(self.queries.path, self.begin, self.end)
        found = rows if self.candidates is None else read_rows(self.candidates.path, self.begin, self.end)
        measured = [
            (self.begin + number, row, [int(line) for line in given["candidates"]])
            for number, (row, given) in enumerate(zip(rows, found, strict=True))
            if self.candidates is not None or has_wrong(row)
        ]
        texts = read_lines(self.corpus.path, {line for _, _, lines in measured for line in lines})
        # Rows name the right passages first. Were equal scores to leave them there, a model that gives
        # everything one score would seem perfect.
        shuffled = [
            sorted(lines, key=lambda line: digest_of(str(texts[line]["text"]))) for _, _, lines in measured
        ]
        pairs = [
            (str(row["query"]), str(texts[line]["text"]))
            for (_, row, _), lines in zip(measured, shuffled, strict=True)
            for line in lines
        ]
        scores = open_reranker(self.retriever, context).scores(pairs) if pairs else ()
        orders, at = [], 0
        for lines in shuffled:
            orders.append([lines[place] for place in in_order(scores[at : at + len(lines)])])
            at += len(lines)
        return measures_of(
            [number for number, _, _ in measured], orders, [row["relevant"] for _, row, _ in measured]
        )


class ScorePairs(Unit[Measures]):
    """What a reranker makes of scored pairs."""

    result_type: ClassVar[type[BaseModel]] = Measures

    retriever: Retriever
    pairs: Rows
    begin: int = Field(ge=0)
    end: int = Field(description="Of the pairs: from `begin` to before this one.")
    of: str = Field(description="The data set, as people know it.")

    @property
    def label(self) -> str:
        return f"{self.retriever.name}: pairs {self.begin + 1} to {self.end} of {self.of}"

    @property
    def memory(self) -> int | None:
        return memory_to_load(self.retriever.model)

    @property
    def weight(self) -> float:
        return float(self.end - self.begin)

    def run(self, context: UnitContext) -> Measures:
        from aidocks.retrieval.reranker import open_reranker

        rows = read_rows(self.pairs.path, self.begin, self.end)
        pairs = [(str(row["first"]), str(row["second"])) for row in rows]
        return Measures(
            numbers=tuple(range(self.begin, self.end)),
            scores=comparable(open_reranker(self.retriever, context).scores(pairs)),
            wanted=tuple(float(row["score"]) for row in rows),
        )


def ordering_units(
    retriever: Retriever, queries: Rows, corpus: Rows, candidates: Rows | None, of: str
) -> tuple[OrderCandidates, ...]:
    """Return the units that put the candidates of all queries in order; see :class:`OrderCandidates`."""
    return tuple(
        OrderCandidates(
            retriever=retriever,
            queries=queries,
            corpus=corpus,
            candidates=candidates,
            begin=begin,
            end=end,
            of=of,
        )
        for begin, end in parts_of(queries.count, least=_LEAST, most=_MOST)
    )


def pair_units(retriever: Retriever, pairs: Rows, of: str) -> tuple[ScorePairs, ...]:
    """Return the units that score all pairs; see :class:`ScorePairs`."""
    return tuple(
        ScorePairs(retriever=retriever, pairs=pairs, begin=begin, end=end, of=of)
        for begin, end in parts_of(pairs.count, least=4 * _LEAST, most=8 * _MOST)
    )


def has_wrong(row: dict[str, Any]) -> bool:
    """Say whether a query's row names passages that are not right."""
    relevant: dict[str, float] = row["relevant"]
    named: Sequence[int] = row["candidates"]
    return any(relevant.get(str(line), 0) <= 0 for line in named)
