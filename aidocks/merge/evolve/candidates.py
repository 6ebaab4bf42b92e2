"""From values to the unit that measures their merge: planned anew, and compared with the merge that is loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from aidocks.checkpoints.files import OutputFile
from aidocks.evaluate.objectives import ObjectiveSource, Part
from aidocks.merge.build import Step
from aidocks.merge.evolve.measuring import MeasureMerge
from aidocks.merge.members import Member
from aidocks.merge.recipe import Operand, TensorMerge
from aidocks.merge.target import Target, plan_target
from aidocks.specs.merge_evolve import MergeEvolveSpec
from aidocks.specs.search_space import Number

_NUMBERED = re.compile(r"\.\d+\.")


class Candidates:
    """The merges of one request that differ in the searched values.

    Args:
        spec: The request.
        start: The merge with the initial values, which is written and stands for the others' form.
        mapping: Which rows of the models the rows of the vocabulary are, where they move.
    """

    def __init__(self, spec: MergeEvolveSpec, start: Step, mapping: OutputFile | None = None) -> None:
        self._spec = spec
        self._start = start
        self._mapping = mapping
        self._tensors = {tensor.name: tensor for tensor in self._recipes(start.target)}

    def unit(
        self,
        values: Sequence[Number],
        part: Part,
        subject: str,
        *,
        objectives: tuple[ObjectiveSource, ...],
        start: tuple[float | None, ...] | None = None,
    ) -> MeasureMerge:
        """Return the unit that measures the merge with these values.

        Raises:
            InvalidSpec: There is no merge with these values, such as of weights whose sum is 0.
        """
        target = plan_target(self._spec.merge(values), self._start.members, self._start.vocabulary)
        changed = [tensor for tensor in self._recipes(target) if not self._has(tensor)]
        return self._measure(changed, objectives, part, subject, start)

    def alone(self, objectives: tuple[ObjectiveSource, ...], part: Part) -> dict[str, MeasureMerge]:
        """Return the units that measure every model of the merge alone, by reference.

        A model is left out where the result is not of its form: of other layers, or of another vocabulary.
        """
        units: dict[str, MeasureMerge] = {}
        for number, source in enumerate(self._start.target.sources):
            tensors = self._copies(number)
            if tensors is not None:
                changed = [tensor for tensor in tensors if not self._has(tensor)]
                units[source.reference] = self._measure(changed, objectives, part, source.reference, None)
        return units

    def _copies(self, source: int) -> list[TensorMerge] | None:
        """Return recipes that copy every tensor from one model; None where that is not the model."""
        member = next(
            m for m in self._start.members.values() if m.source == self._start.target.sources[source]
        )
        copies: list[TensorMerge] = []
        for tensor in self._tensors.values():
            own = next((operand for operand in tensor.operands if operand.source == source), None)
            if own is None or tensor.vocabulary is not None or not _same_place(own, tensor, member):
                return None
            copied: dict[str, Any] = {"operands": (own,), "base": None, "method": None, "values": {}}
            copies.append(tensor.model_copy(update=copied))
        used = {tensor.operands[0].tensor for tensor in copies}
        return copies if {name for name in member.tensors if _NUMBERED.search(name)} <= used else None

    def _has(self, tensor: TensorMerge) -> bool:
        """Say whether the loaded merge has the tensor as it is to be."""
        return self._tensors[tensor.name] == tensor

    def _recipes(self, target: Target) -> tuple[TensorMerge, ...]:
        """Return how the tensors are made, those of the vocabulary with the rows that they consist of."""
        moved = target.vocabulary_tensors if self._mapping else frozenset()
        return tuple(
            tensor.model_copy(update={"vocabulary": self._mapping}) if tensor.name in moved else tensor
            for tensor in target.tensors
        )

    def _measure(
        self,
        tensors: Sequence[TensorMerge],
        objectives: tuple[ObjectiveSource, ...],
        part: Part,
        subject: str,
        start: tuple[float | None, ...] | None,
    ) -> MeasureMerge:
        return MeasureMerge(
            host=self._start.directory,
            sources=self._start.target.sources,
            tensors=tuple(tensors),
            seed=self._spec.seed,
            compute_dtype=self._spec.compute_dtype,
            objectives=objectives,
            part=part,
            start=start,
            subject=subject,
        )


def _same_place(operand: Operand, tensor: TensorMerge, member: Member) -> bool:
    """Say whether a tensor comes from the same layer; a head may come from an embedding that it is tied to."""
    return operand.tensor == member.own_name(tensor.name) or not _NUMBERED.search(operand.tensor)
