"""The unit that measures a model with some of its matrices reduced; no file is written for it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, Field

from aidocks.evaluate.perplexity import PerplexityResult
from aidocks.evaluate.texts import Split, TextSource
from aidocks.laser.matrices import Reduction
from aidocks.plan import Unit, UnitContext


class EvaluateReductions(Unit[PerplexityResult]):
    """Perplexity of a checkpoint under a set of reductions (none: of the checkpoint itself)."""

    result_type: ClassVar[type[BaseModel]] = PerplexityResult

    checkpoint: Path = Field(description="Checkpoint directory.")
    reductions: tuple[Reduction, ...] = Field(
        (), description="In order of name, so that equal sets are equal."
    )
    text: TextSource
    split: Split
    seq_length: int
    chunks: int
    seed: int
    dtype: str | None = Field(
        None, description="Computation type. Only a baseline leaves it to the worker: pairs must share it."
    )
    subject: str = Field(description="What is measured, for people.")

    @property
    def label(self) -> str:
        return self.subject

    @property
    def weight(self) -> float:
        return float(self.seq_length * self.chunks)

    def run(self, context: UnitContext) -> PerplexityResult:
        from aidocks.laser.workbench import workbench

        bench = workbench(self.checkpoint, self.dtype, context)
        bench.apply({reduction.name: reduction.rank for reduction in self.reductions})
        return bench.model.measure(self.text, self.split, self.seq_length, self.chunks, self.seed)
