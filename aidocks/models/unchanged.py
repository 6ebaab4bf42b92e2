"""Noticing that a model changed while a job waited to be resumed: half of its result would be of the old one."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from aidocks.errors import CorruptCheckpoint
from aidocks.plan import Stage, Unit, UnitContext
from aidocks.storage import identity_of


class InputStates(BaseModel):
    """What files directories held: names, sizes and times of change, as one text for each directory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    states: tuple[str, ...]


class NoteInputs(Unit[InputStates]):
    """Notes the state of the models that a job reads, once: a resumed job gets the first answer again."""

    directories: tuple[Path, ...] = Field(description="Checkpoint and adapter directories.")

    result_type: ClassVar[type[BaseModel]] = InputStates

    @property
    def label(self) -> str:
        return "state of the models"

    @property
    def computes(self) -> bool:
        return False

    def run(self, context: UnitContext) -> InputStates:
        return InputStates(states=tuple(identity_of(directory) for directory in self.directories))


def require_unchanged(directories: Iterable[Path]) -> Generator[Stage, list[InputStates], None]:
    """Yield the stage that notes the state of models, and refuse to go on with another one than at the first attempt.

    Raises:
        CorruptCheckpoint: Naming the model that is another one now.
    """
    noted = tuple(dict.fromkeys(directories))
    (known,) = yield Stage("inputs", (NoteInputs(directories=noted),))
    for directory, state in zip(noted, known.states, strict=True):
        if identity_of(directory) != state:
            raise CorruptCheckpoint(
                f"{directory.name} has changed since this job began; what it wrote so far is of the old one.",
                value=directory.name,
                hint="Submit the request again, or put the old files back and resume.",
            )
