"""A teacher's scores: what a reranker makes of the passages of every training row."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, Field

from aidocks.checkpoints.files import OutputFile
from aidocks.errors import IncompatibleModels
from aidocks.evaluate.memory import memory_to_load
from aidocks.plan import PlanContext, Stage, Unit, UnitContext
from aidocks.retrieval.parts import JoinedRows, JoinRows, WrittenPart, parts_of, write_part
from aidocks.training.measuring import read_rows
from aidocks.training.retriever import Retriever
from aidocks.training.run import Rows

#: Rows of one unit; each has some passages.
_LEAST, _MOST = 16, 512
_ROWS_FILE = "train.jsonl"


class ScorePassages(Unit[WrittenPart]):
    """Some rankings with ``scores`` of their positives and then of their negatives, as the reranker makes them."""

    result_type: ClassVar[type[BaseModel]] = WrittenPart

    train: Rows
    begin: int = Field(ge=0)
    end: int = Field(description="Of the rows: from `begin` to before this one.")
    teacher: Retriever
    directory: Path = Field(description="Where the rows are written.")

    @property
    def label(self) -> str:
        return f"{self.teacher.name}: scores of rows {self.begin + 1} to {self.end}"

    @property
    def memory(self) -> int | None:
        return memory_to_load(self.teacher.model)

    @property
    def weight(self) -> float:
        return float(self.end - self.begin)

    def outputs(self, result: WrittenPart) -> Sequence[OutputFile]:
        return (result.file,)

    def run(self, context: UnitContext) -> WrittenPart:
        from math import isfinite

        from aidocks.retrieval.reranker import open_reranker

        rows = read_rows(self.train.path, self.begin, self.end)
        passages = [[*row["positives"], *(row.get("negatives") or [])] for row in rows]
        pairs = [
            (str(row["query"]), str(passage))
            for row, texts in zip(rows, passages, strict=True)
            for passage in texts
        ]
        scores = [float(score) for score in open_reranker(self.teacher, context).scores(pairs)]
        if not all(map(isfinite, scores)):
            raise IncompatibleModels(
                f"{self.teacher.name} gives scores that are no finite numbers.",
                field="distill_from",
                value=self.teacher.name,
                hint="Distil from another reranker.",
            )
        taught, at = [], 0
        for row, texts in zip(rows, passages, strict=True):
            taught.append({**row, "scores": scores[at : at + len(texts)]})
            at += len(texts)
        return write_part(self.directory / f"rows-{self.begin:08d}.jsonl", taught)


def teach(
    train: Rows, teacher: Retriever, context: PlanContext, directory: Path
) -> Generator[Stage, list[Any], Rows]:
    """Yield the stages in which a reranker scores all passages of rankings; return the rows with ``scores``.

    Args:
        train: Rankings (``query``, ``positives``, ``negatives``); scores that they have are replaced.
        teacher: The reranker.
        context: Of the plan.
        directory: Where the rows are written.

    Raises:
        IncompatibleModels: The teacher gives scores that are no finite numbers.
    """
    units = tuple(
        ScorePassages(train=train, begin=begin, end=end, teacher=teacher, directory=directory / "parts")
        for begin, end in parts_of(train.count, least=_LEAST, most=_MOST)
    )
    parts = yield Stage("ask the teacher", units)
    (joined,) = yield Stage("rows with scores", (JoinRows(parts=tuple(parts), path=directory / _ROWS_FILE),))
    assert isinstance(joined, JoinedRows)
    context.say(f"{teacher.name} gave scores to the passages of {train.count:,} queries.")
    return joined.rows
