"""The units in which retrievers look for the held-out queries' passages: by vectors, or by words."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, Field

from aidocks.checkpoints.files import OutputFile
from aidocks.plan import Unit, UnitContext
from aidocks.retrieval.embedding import Similarity, VectorFiles, Vectors, find_nearest
from aidocks.retrieval.measures import Measures, comparable, measures_of
from aidocks.retrieval.parts import write_part
from aidocks.training.measuring import read_rows
from aidocks.training.run import Rows


class _RankQueries(Unit[Measures]):
    """The passages that some queries find in the whole corpus, and what that order is worth."""

    result_type: ClassVar[type[BaseModel]] = Measures

    queries: Rows
    begin: int = Field(ge=0)
    end: int = Field(description="Of the queries: from `begin` to before this one.")
    count: int = Field(ge=1, description="Passages that are found for each.")
    of: str = Field(description="The data set, as people know it.")
    file: Path | None = Field(None, description="Where what is found is written; None for nowhere.")

    @property
    def weight(self) -> float:
        return float(self.end - self.begin)

    @abstractmethod
    def find(self, rows: list[dict[str, Any]], count: int, context: UnitContext) -> list[list[int]]:
        """Return lines of the corpus for each query, the best first, at most ``count``."""

    def run(self, context: UnitContext) -> Measures:
        rows = read_rows(self.queries.path, self.begin, self.end)
        # One more, which makes room for what the query itself is.
        found = [
            [line for line in lines if line != row.get("itself")][: self.count]
            for row, lines in zip(rows, self.find(rows, self.count + 1, context), strict=True)
        ]
        measures = measures_of(range(self.begin, self.end), found, [row["relevant"] for row in rows])
        if self.file is None:
            return measures
        written = write_part(self.file, ({"candidates": lines} for lines in found))
        return measures.model_copy(update={"file": written.file})

    def outputs(self, result: Measures) -> Sequence[OutputFile]:
        return () if result.file is None else (result.file,)


class RankByVectors(_RankQueries):
    """By an embedding model: every query is compared with every passage."""

    name: str = Field(description="Of the model, for people.")
    query_vectors: tuple[Vectors, ...] = Field(description="Of all queries.")
    passage_vectors: tuple[Vectors, ...]
    similarity: Similarity

    @property
    def label(self) -> str:
        return f"{self.name}: queries {self.begin + 1} to {self.end} in {self.of}"

    def find(self, rows: list[dict[str, Any]], count: int, context: UnitContext) -> list[list[int]]:
        queries = VectorFiles(self.query_vectors, self.similarity).rows(self.begin, self.end)
        passages = VectorFiles(self.passage_vectors, self.similarity)
        nearest = find_nearest(queries, passages, count, context.device)
        return [[int(line) for line in lines] for lines in nearest.lines]


class RankByWords(_RankQueries):
    """By BM25."""

    index: Path = Field(description="Directory of the corpus' index.")

    @property
    def label(self) -> str:
        return f"BM25: queries {self.begin + 1} to {self.end} in {self.of}"

    def find(self, rows: list[dict[str, Any]], count: int, context: UnitContext) -> list[list[int]]:
        from aidocks.retrieval.bm25 import open_index

        index = open_index(self.index, context)
        return [index.find(str(row["query"]), count) for row in rows]


class ComparePairs(Unit[Measures]):
    """How alike an embedding model finds the two texts of scored pairs."""

    result_type: ClassVar[type[BaseModel]] = Measures

    pairs: Rows
    name: str = Field(description="Of the model, for people.")
    of: str = Field(description="The data set, as people know it.")
    first: tuple[Vectors, ...] = Field(description="Of the first texts of all pairs.")
    second: tuple[Vectors, ...]
    similarity: Similarity

    @property
    def label(self) -> str:
        return f"{self.name}: {self.pairs.count} pairs of {self.of}"

    @property
    def weight(self) -> float:
        return float(self.pairs.count)

    def run(self, context: UnitContext) -> Measures:
        import numpy as np

        count = self.pairs.count
        sides = [
            VectorFiles(vectors, self.similarity).rows(0, count) for vectors in (self.first, self.second)
        ]
        rows = read_rows(self.pairs.path)
        return Measures(
            numbers=tuple(range(count)),
            scores=comparable(np.einsum("nd,nd->n", *sides)),
            wanted=tuple(float(row["score"]) for row in rows),
        )
