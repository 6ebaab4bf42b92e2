"""A range in place of a number: what a search may choose from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field, model_validator

from aidocks.errors import InvalidSpec
from aidocks.specs.base import Spec

MOST_POINTS = 64
#: Beyond it, the numbers of most models' weights end.
_LARGEST = 1e30
EXAMPLE = "Write a range in place of a number: `weight: {min: 0, max: 1}`."


class SearchRange(Spec):
    """``{min: 0, max: 1}``, in place of the number of a merge's parameter."""

    min: float = Field(ge=-_LARGEST, le=_LARGEST, description="Smallest value.", examples=[0])
    max: float = Field(ge=-_LARGEST, le=_LARGEST, description="Largest value.", examples=[1])
    initial: float | tuple[float, ...] | None = Field(
        None,
        description="Where the search begins, and what its result has to beat; with `points`, one number for all or "
        "as many. Default: the middle.",
    )
    name: str | None = Field(
        None,
        min_length=1,
        max_length=64,
        pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*$",
        description="Ranges of one name are one variable: they always have the same value.",
        examples=["mlp"],
    )
    points: int | None = Field(
        None,
        ge=2,
        le=MOST_POINTS,
        description="Search a gradient of so many values, which are interpolated over the layers.",
        examples=[4],
    )

    @model_validator(mode="before")
    @classmethod
    def _plain_numbers(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            raise InvalidSpec("Must be a range.", hint=EXAMPLE)
        switches = [key for key, value in given.items() if isinstance(value, bool)]
        if switches:
            raise InvalidSpec("Must be a number.", field=str(switches[0]), value=given[switches[0]])
        return given

    @model_validator(mode="after")
    def _has_room(self) -> SearchRange:
        if not self.min < self.max:
            raise InvalidSpec(
                f"There is nothing to search between {self.min:g} and {self.max:g}.",
                field="max",
                value=self.max,
                hint="Give a `max` above `min`.",
            )
        if isinstance(self.initial, tuple) and len(self.initial) != (self.points or 0):
            raise InvalidSpec(
                f"`initial` has {len(self.initial)} values for {self.points or 'a range without'} points.",
                field="initial",
                value=list(self.initial),
                hint="Give one number, or as many as `points`.",
            )
        require_inside(self.starts, self)
        return self

    @property
    def starts(self) -> tuple[float, ...]:
        """Where the search begins, one number or one for each point; empty where that is not said."""
        if self.initial is None or isinstance(self.initial, tuple):
            return self.initial or ()
        return (self.initial,) * (self.points or 1)

    @property
    def start(self) -> float | list[float]:
        """What stands in the range's place before anything was searched: `initial`, or the middle."""
        starts = self.starts or ((self.min + self.max) / 2,) * (self.points or 1)
        return list(starts) if self.points is not None else starts[0]


def require_inside(starts: Sequence[float], asked: SearchRange, place: str = "") -> None:
    """Raise InvalidSpec when a search is to begin outside of its range."""
    for start in starts:
        if not asked.min <= start <= asked.max:
            raise InvalidSpec(
                f"The search cannot begin at {start:g}, outside of its range.",
                field=f"{place}.initial".removeprefix("."),
                value=start,
                hint=f"From {asked.min:g} to {asked.max:g}.",
            )
