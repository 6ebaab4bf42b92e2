"""The numbers of a merge request that are searched: given as ranges, and the way from values to a request.

A range stands where mergekit has a number: ``weight: {min: 0, max: 1}``, in a gradient ``[{min: 0, max: 1}, 0.5]``, or
behind a filter. ``points`` makes a gradient of so many searched values of it; a ``name`` makes one variable of all the
places that bear it. A search moves in shares of the ranges, from 0 (``min``) to 1 (``max``).
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from aidocks.errors import InvalidSpec
from aidocks.specs.faults import invalid_spec
from aidocks.specs.search_range import EXAMPLE, SearchRange, require_inside

#: Where a value stands in a request: keys and positions, from the top.
Place = tuple[str | int, ...]
Document = dict[str, Any]
Number = float | int

#: Digits of a value below the size of its range: the last bits of a computation must not make another candidate.
_DIGITS = 6
_PART = re.compile(r"([^.\[\]]+)|\[(\d+)\]")
_RANGE_KEYS = frozenset(("min", "max"))
#: Levels of a request, at most; those of mergekit's files are a dozen.
_DEEPEST = 32


@dataclass(frozen=True)
class Variable:
    """One searched number.

    Attributes:
        name: As the request calls it, or the place where it stands.
        low: Smallest value.
        high: Largest value.
        initial: Where the search begins.
        places: Where it stands in the request.
        is_whole: Whether it is an integer.
    """

    name: str
    low: float
    high: float
    initial: Number
    places: tuple[Place, ...]
    is_whole: bool = False

    def value(self, share: float) -> Number:
        """Return the value at a share of the range, rounded to six digits of the range's size."""
        raw = self.low + min(1.0, max(0.0, share)) * (self.high - self.low)
        if self.is_whole:
            return round(raw)
        digits = _DIGITS - math.floor(math.log10(self.high - self.low))
        return min(self.high, max(self.low, round(raw, digits)))

    def share(self, value: Number) -> float:
        """Return where in the range a value lies."""
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Genome:
    """The variables of a request, and the request around them.

    Attributes:
        variables: In the order in which they stand in the request.
        document: The request with the initial values in the places of the ranges.
    """

    variables: tuple[Variable, ...]
    document: Document

    @property
    def initial(self) -> tuple[Number, ...]:
        """The values that the search begins with."""
        return tuple(variable.initial for variable in self.variables)

    def values(self, shares: Sequence[float]) -> tuple[Number, ...]:
        """Return the values at these shares of the ranges."""
        return tuple(v.value(share) for v, share in zip(self.variables, shares, strict=True))

    def shares(self, values: Sequence[Number]) -> tuple[float, ...]:
        """Return where in their ranges these values lie."""
        return tuple(v.share(value) for v, value in zip(self.variables, values, strict=True))

    def express(self, values: Sequence[Number]) -> Document:
        """Return the merge request that has these values."""
        document = copy.deepcopy(self.document)
        for variable, value in zip(self.variables, values, strict=True):
            for place in variable.places:
                _set(document, place, value)
        return document


def lift_ranges(document: Mapping[str, Any]) -> tuple[Document, dict[str, SearchRange]]:
    """Take the ranges out of a merge request.

    Args:
        document: mergekit's configuration, in which numbers of parameters may be ranges.

    Returns:
        The request with initial values in their places, and the ranges by place.

    Raises:
        InvalidSpec: For a range that cannot be searched; the field is its place.
    """
    ranges: dict[str, SearchRange] = {}
    return {key: _lifted(value, (key,), ranges) for key, value in document.items()}, ranges


def read_genome(document: Mapping[str, Any], ranges: Mapping[str, SearchRange]) -> Genome:
    """Return what is searched, whatever the method says to it.

    Args:
        document: A merge request, with numbers in all places.
        ranges: By place. A range without `initial` begins with the number in its place.

    Raises:
        InvalidSpec: For ranges of places that hold no number, for ranges of one name that differ, or when there are
            none.
    """
    if not ranges:
        raise InvalidSpec("Nothing is searched: no parameter is given as a range.", hint=EXAMPLE)
    plain: Document = copy.deepcopy(dict(document))
    found: dict[str, Variable] = {}
    for text, asked in ranges.items():
        place, starts = _look_up(plain, text, asked)
        for variable in _variables(asked, place, starts):
            found[variable.name] = _joined(found.get(variable.name), variable)
            _set(plain, variable.places[0], variable.initial)
    return Genome(tuple(found.values()), plain)


def place_text(place: Place) -> str:
    """Return a place as people write it, such as ``models[1].parameters.weight``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.removeprefix(".")


def read_place(text: str) -> Place:
    """Return the place that a text names."""
    return tuple(int(index) if index else key for key, index in _PART.findall(text))


def _look_up(document: Document, text: str, asked: SearchRange) -> tuple[Place, tuple[float, ...]]:
    """Return the place that a text names, and the numbers that the search begins with there."""
    place = read_place(text)
    node: Any = document
    try:
        for part in place:
            node = node[part]
        values = node if asked.points is not None and isinstance(node, list) else [node] * (asked.points or 1)
        starts = tuple(float(value) for value in values)
    except (KeyError, IndexError, TypeError, ValueError):
        starts = ()
    if "parameters" not in place[:-1] or len(starts) != (asked.points or 1):
        raise InvalidSpec("There is no number that could be searched.", field=f"search.{text}", hint=EXAMPLE)
    starts = asked.starts or starts
    require_inside(starts, asked, place_text(place))
    _set(document, place, list(starts) if asked.points is not None else starts[0])
    return place, starts


def _lifted(node: Any, place: Place, ranges: dict[str, SearchRange]) -> Any:
    """Return a copy of a node with numbers in place of its ranges; ranges are values of `parameters`."""
    if len(place) > _DEEPEST:
        raise InvalidSpec("The request is nested too deeply.", field=place_text(place[:4]))
    if isinstance(node, dict):
        if "parameters" in place[:-1] and _RANGE_KEYS & node.keys():
            asked = ranges[place_text(place)] = _read_range(node, place)
            return asked.start
        return {key: _lifted(inner, (*place, key), ranges) for key, inner in node.items()}
    if isinstance(node, list | tuple):
        return [_lifted(inner, (*place, number), ranges) for number, inner in enumerate(node)]
    return node


def _read_range(given: dict[str, Any], place: Place) -> SearchRange:
    try:
        asked = SearchRange.model_validate(given)
    except ValidationError as error:
        fault = invalid_spec(error.errors(include_url=False), SearchRange)
        first = fault.errors[0]
        field = f"{place_text(place)}.{first['field']}".rstrip(".")
        raise InvalidSpec(
            str(first["message"]), field=field, value=first["value"], hint=first["hint"] or EXAMPLE
        ) from None
    if asked.points is not None and isinstance(place[-1], int):
        raise InvalidSpec(
            "`points` makes a gradient of its own; inside of a list there is none.",
            field=f"{place_text(place)}.points",
            value=asked.points,
            hint="Give the parameter the range itself, without the list.",
        )
    return asked


def _variables(asked: SearchRange, place: Place, starts: Sequence[float]) -> Iterator[Variable]:
    for number, initial in enumerate(starts):
        where = (*place, number) if asked.points is not None else place
        name = asked.name or place_text(place)
        if asked.points is not None:
            name = f"{name}[{number}]"
        yield Variable(name, asked.min, asked.max, initial, (where,))


def _joined(known: Variable | None, other: Variable) -> Variable:
    """Return the variable with the places of both, which must agree on everything else."""
    if known is None:
        return other
    if (known.low, known.high, known.initial) != (other.low, other.high, other.initial):
        raise InvalidSpec(
            f"Two ranges are called {known.name!r}, but differ.",
            field=place_text(other.places[0]),
            hint=f"Give it the min, max and initial of {place_text(known.places[0])}, or another name.",
        )
    return replace(known, places=(*known.places, *other.places))


def _set(document: Document, place: Place, value: Any) -> None:
    node: Any = document
    for part in place[:-1]:
        node = node[part]
    node[place[-1]] = value
