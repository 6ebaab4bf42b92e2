"""The unit that measures a merge of which no file is written."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from aidocks.evaluate.measurements import Pairs, normal_equivalent
from aidocks.evaluate.memory import memory_to_load
from aidocks.evaluate.objectives import ObjectiveSource, Part
from aidocks.merge.recipe import Source, TensorMerge
from aidocks.plan import Unit, UnitContext
from aidocks.specs.objective import Metric

#: A candidate that is so significantly worse than the start on the items so far is not measured on the others.
HOPELESS_Z = 3.0


class Losses(BaseModel):
    """Losses of one model on items of one objective, see :class:`~aidocks.evaluate.measurements.Pairs`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: Metric
    positions: tuple[int, ...]
    losses: tuple[float | None, ...]
    tokens: int
    dtype: str

    def against(self, before: Losses) -> Pairs:
        """Return the pairs of another model's losses and these, on the items that both have."""
        count = min(len(self.positions), len(before.positions))
        assert self.positions[:count] == before.positions[:count], "losses of different items"
        return Pairs(
            metric=self.metric,
            positions=self.positions[:count],
            before=before.losses[:count],
            after=self.losses[:count],
            tokens=min(self.tokens, before.tokens),
            dtype=self.dtype,
        )


class MergeLosses(BaseModel):
    """What a merge was measured to be worth.

    Attributes:
        losses: On the deciding objective and then on the guards; without the guards where it was hopeless.
        fault: Why it cannot be merged, and was not measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    losses: tuple[Losses, ...] = ()
    fault: str | None = None


class MeasureMerge(Unit[MergeLosses]):
    """Losses of a merge: tensors of a loaded model are overwritten by merged ones, rounded as a file would hold them.

    The loaded model is a merge of the same form, written before. The worker keeps it, and computes anew what differs
    from the candidate before.
    """

    result_type: ClassVar[type[BaseModel]] = MergeLosses

    host: Path = Field(description="Checkpoint directory of the model that is loaded.")
    sources: tuple[Source, ...] = ()
    tensors: tuple[TensorMerge, ...] = Field((), description="Those that the host has otherwise.")
    seed: int = Field(0, description="Of methods that draw random numbers.")
    compute_dtype: str = "float32"
    objectives: tuple[ObjectiveSource, ...] = Field(
        min_length=1, description="The first decides; the others are guards."
    )
    part: Part = Field(description="Of the objectives' data.")
    start: tuple[float | None, ...] | None = Field(
        None,
        description="Losses of the start on the deciding objective: what is significantly worse than it early on is "
        "not measured to the end. None to measure all.",
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
        return memory_to_load(self.host)

    @property
    def weight(self) -> float:
        return float(sum(source.sizes[self.part] for source in self.objectives))

    def run(self, context: UnitContext) -> MergeLosses:
        from aidocks.errors import ValueTooLarge
        from aidocks.merge.evolve.workbench import merge_bench

        bench = merge_bench(self.host, self.dtype, context)
        try:
            bench.apply(
                self.tensors,
                self.sources,
                threads=context.threads,
                seed=self.seed,
                compute_dtype=self.compute_dtype,
            )
        except ValueTooLarge as error:  # which only these values made so
            return MergeLosses(fault=error.message)
        decisive, *guards = self.objectives
        measured = [bench.measure(decisive, self.part, start=self.start)]
        if len(measured[0].positions) == decisive.sizes[self.part]:
            measured += [bench.measure(guard, self.part) for guard in guards]
        return MergeLosses(losses=tuple(measured))


def is_hopeless(start: Losses, candidate: Losses) -> bool:
    """Say whether a candidate is so much worse than the start that the rest of the items would not change it."""
    change = candidate.against(start).comparison
    if not change.standard_error or change.z is None:
        return change.delta is None
    return normal_equivalent(change.z, len(candidate.positions)) >= HOPELESS_Z
