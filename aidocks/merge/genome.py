"""What a search varies: the numbers of a merge request that are given as ranges, and the way from values to a request.

A range stands where mergekit has a number: ``weight: {min: 0, max: 1}``, in a gradient ``[{min: 0, max: 1}, 0.5]``, or
behind a filter. ``points`` makes a gradient of so many searched values of it; a ``name`` makes one variable of all the
places that bear it. A search moves in shares of the ranges, from 0 (``min``) to 1 (``max``).
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from aidocks.errors import InvalidSpec
from aidocks.merge.method import Method, Parameter, find_method
from aidocks.specs.faults import invalid_spec
from aidocks.specs.search_range import SearchRange, require_inside

#: Where a value stands in a request: keys and positions, from the top.
Place = tuple[str | int, ...]
Document = dict[str, Any]
Number = float | int

#: Digits of a value below the size of its range: the last bits of a computation must not make another candidate.
_DIGITS = 6
_PART = re.compile(r"([^.\[\]]+)|\[(\d+)\]")
_RANGE_KEYS = frozenset(("min", "max"))
_EXAMPLE = "Write a range in place of a number: `weight: {min: 0, max: 1}`."


@dataclass(frozen=True)
class Variable:
    """One searched number.

    Attributes:
        name: As the request calls it, or the place where it stands.
        low: Smallest value.
        high: Largest value.
        initial: Where the search begins.
        is_whole: Whether it is an integer.
        places: Where it stands in the request.
    """

    name: str
    low: float
    high: float
    initial: Number
    is_whole: bool
    places: tuple[Place, ...]

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
    plain: Document = copy.deepcopy(dict(document))
    ranges: dict[str, SearchRange] = {}
    for place, given in list(_ranges(plain, ())):
        asked = _read_range(given, place)
        ranges[place_text(place)] = asked
        _set(plain, place, asked.start)
    return plain, ranges


def read_genome(document: Mapping[str, Any], ranges: Mapping[str, SearchRange]) -> Genome:
    """Return what is searched.

    Args:
        document: A merge request, with numbers in all places.
        ranges: By place. A range without `initial` begins with the number in its place.

    Raises:
        InvalidSpec: For ranges of places that hold no number, or of parameters that the method does not have or that
            cannot have such values, for ranges of one name that differ, or when there are none.
    """
    if not ranges:
        raise InvalidSpec("Nothing is searched: no parameter is given as a range.", hint=_EXAMPLE)
    method = find_method(str(document.get("merge_method")))
    plain: Document = copy.deepcopy(dict(document))
    found: dict[str, Variable] = {}
    for text, asked in ranges.items():
        place, starts = _look_up(plain, text, asked)
        declared = _declared(method, place)
        _require_allowed(asked, declared, place)
        for variable in _variables(asked, place, starts, is_whole=declared.kind is int):
            found[variable.name] = _joined(found.get(variable.name), variable)
            _set(plain, variable.places[0], variable.initial)
    return Genome(tuple(found.values()), plain)


def place_text(place: Place) -> str:
    """Return a place as people write it, such as ``models[1].parameters.weight``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.removeprefix(".")


def _look_up(document: Document, text: str, asked: SearchRange) -> tuple[Place, tuple[float, ...]]:
    """Return the place that a text names, and the numbers that the search begins with there."""
    place: Place = tuple(int(index) if index else key for key, index in _PART.findall(text))
    node: Any = document
    try:
        for part in place:
            node = node[part]
        values = node if asked.points is not None and isinstance(node, list) else [node] * (asked.points or 1)
        starts = tuple(float(value) for value in values)
    except (KeyError, IndexError, TypeError, ValueError):
        starts = ()
    if "parameters" not in place[:-1] or len(starts) != (asked.points or 1):
        raise InvalidSpec("There is no number that could be searched.", field=f"search.{text}", hint=_EXAMPLE)
    starts = asked.starts or starts
    require_inside(starts, asked, place_text(place))
    _set(document, place, list(starts) if asked.points is not None else starts[0])
    return place, starts


def _ranges(node: Any, place: Place) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Yield every range below a node, with its place; ranges are values of `parameters`."""
    if isinstance(node, dict):
        if "parameters" in place[:-1] and _RANGE_KEYS & node.keys():
            yield place, node
            return
        for key, inner in node.items():
            yield from _ranges(inner, (*place, key))
    elif isinstance(node, list | tuple):
        for number, inner in enumerate(node):
            yield from _ranges(inner, (*place, number))


def _declared(method: Method, place: Place) -> Parameter:
    """Return the method's parameter that a range stands for."""
    name = place[len(place) - place[::-1].index("parameters")]
    numbers = {p.name: p for p in method.parameters if p.kind is not bool}
    if name in numbers:
        return numbers[str(name)]
    is_switch = any(p.name == name for p in method.parameters)
    reason = "is a switch, not a number" if is_switch else f"is no parameter of {method.name}"
    raise InvalidSpec(
        f"{name!r} {reason}: there is nothing to search.",
        field=place_text(place),
        hint=f"Numbers that {method.name} takes: {', '.join(numbers) or 'none'}.",
    )


def _read_range(given: dict[str, Any], place: Place) -> SearchRange:
    try:
        asked = SearchRange.model_validate(given)
    except ValidationError as error:
        fault = invalid_spec(error.errors(include_url=False), SearchRange)
        first = fault.errors[0]
        field = f"{place_text(place)}.{first['field']}".rstrip(".")
        raise InvalidSpec(
            str(first["message"]), field=field, value=first["value"], hint=first["hint"] or _EXAMPLE
        ) from None
    if asked.points is not None and isinstance(place[-1], int):
        raise InvalidSpec(
            "`points` makes a gradient of its own; inside of a list there is none.",
            field=f"{place_text(place)}.points",
            value=asked.points,
            hint="Give the parameter the range itself, without the list.",
        )
    return asked


def _require_allowed(asked: SearchRange, declared: Parameter, place: Place) -> None:
    """Raise InvalidSpec for a range that leaves what the method's parameter may be."""
    ends = (("min", asked.min), ("max", asked.max))
    for end, value in ends:
        low, high = declared.at_least, declared.at_most
        outside = (low is not None and value < low) or (high is not None and value > high)
        if outside or (declared.kind is int and value != int(value)):
            kind = "a whole number" if declared.kind is int else "a number"
            limits = [
                f"at least {low:g}" if low is not None else "",
                f"at most {high:g}" if high is not None else "",
            ]
            raise InvalidSpec(
                f"{declared.name!r} cannot be {value:g}.",
                field=f"{place_text(place)}.{end}",
                value=value,
                hint=f"It is {', '.join([kind, *filter(None, limits)])}.",
            )


def _variables(
    asked: SearchRange, place: Place, starts: Sequence[float], *, is_whole: bool
) -> Iterator[Variable]:
    for number, initial in enumerate(starts):
        where = (*place, number) if asked.points is not None else place
        name = asked.name or place_text(place)
        if asked.points is not None:
            name = f"{name}[{number}]"
        start = round(initial) if is_whole else initial
        yield Variable(name, asked.min, asked.max, start, is_whole, (where,))


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
    return Variable(
        known.name,
        known.low,
        known.high,
        known.initial,
        known.is_whole or other.is_whole,
        (*known.places, *other.places),
    )


def _set(document: Document, place: Place, value: Any) -> None:
    node: Any = document
    for part in place[:-1]:
        node = node[part]
    node[place[-1]] = value
