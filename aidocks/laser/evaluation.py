"""The unit that measures what a change does to a model; no file is written for it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from aidocks.evaluate.measurements import Pairs, decide
from aidocks.evaluate.memory import memory_to_load
from aidocks.evaluate.objectives import ObjectiveSource, Part
from aidocks.laser.matrices import Reduction
from aidocks.plan import Unit, UnitContext


class Change(BaseModel):
    """What a change did.

    Attributes:
        pairs: On the deciding objective, and then on the guards in their order; without the guards where the
            objective was not reached anyway.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pairs: tuple[Pairs, ...]

    @property
    def objective(self) -> Pairs:
        """The measurement that decides."""
        return self.pairs[0]

    @property
    def guards(self) -> tuple[Pairs, ...]:
        return self.pairs[1:]


class MeasureChange(Unit[Change]):
    """Losses of a checkpoint under a set of reductions, before and after further ones are added.

    Both are measured by the same worker on the same batches, so that nothing but the change can make a difference.
    Units of one stage come sorted by layer: the worker keeps the outputs of the layers below.
    """

    result_type: ClassVar[type[BaseModel]] = Change

    checkpoint: Path = Field(description="Checkpoint directory.")
    base: tuple[Reduction, ...] = Field((), description="What was accepted before, in that order.")
    added: tuple[Reduction, ...] = Field(
        (), description="What is tried on top; none to measure the base alone."
    )
    objectives: tuple[ObjectiveSource, ...] = Field(
        min_length=1, description="The first decides; the others are guards, which must not get worse."
    )
    part: Part = Field(description="Of the objectives' data.")
    z_threshold: float | None = Field(
        None,
        description="Significance at which the first objective's measurement ends early; None for never.",
    )
    share: float = Field(
        1.0, gt=0, le=1, description="Of the first objective's items, at which it ends, decided or not."
    )
    dtype: str | None = Field(
        None, description="Computation type; None lets the worker choose what it does well."
    )
    subject: str = Field(description="What is measured, for people.")

    @property
    def label(self) -> str:
        return self.subject

    @property
    def memory(self) -> int | None:
        return memory_to_load(self.checkpoint)

    @property
    def weight(self) -> float:
        return float(sum(source.sizes[self.part] for source in self.objectives))

    def run(self, context: UnitContext) -> Change:
        from aidocks.laser.workbench import workbench

        bench = workbench(self.checkpoint, self.dtype, context)
        bench.set_base(self.base)
        bench.expect(self.objectives, self.part)
        objective, *guards = self.objectives
        total = objective.sizes[self.part]
        pairs = [
            bench.measure(objective, self.part, self.added, z_threshold=self.z_threshold, share=self.share)
        ]
        if self.z_threshold is None or decide(pairs[0], total, self.z_threshold) == "accept":
            pairs += [bench.measure(guard, self.part, self.added) for guard in guards]
        return Change(pairs=tuple(pairs))
