"""What a search varies, as the merge method sees it: numbers that it takes, whole where it takes whole ones."""

from __future__ import annotations

from dataclasses import replace

from aidocks.errors import InvalidSpec
from aidocks.merge.method import Method, Parameter, find_method
from aidocks.specs.merge_evolve import MergeEvolveSpec
from aidocks.specs.search_space import Genome, Place, Variable, place_text, read_place


def checked_genome(spec: MergeEvolveSpec) -> Genome:
    """Return what a request searches.

    Raises:
        InvalidSpec: There is no such method; or a range is of a parameter that the method does not have, or that
            cannot have such values.
    """
    method = find_method(spec.merge_method)
    whole: list[Place] = []
    for text, asked in spec.search.items():
        place = read_place(text)
        declared = _declared(method, place)
        for end, value in (("min", asked.min), ("max", asked.max)):
            declared.checked(value, f"{place_text(place)}.{end}")
        if declared.kind is int:
            whole.append(place)
    return replace(spec.genome, variables=tuple(_as_declared(v, whole) for v in spec.genome.variables))


def _as_declared(variable: Variable, whole: list[Place]) -> Variable:
    """Return a variable that is whole if any of its places is below one of a whole number."""
    if any(own[: len(place)] == place for own in variable.places for place in whole):
        return replace(variable, initial=round(variable.initial), is_whole=True)
    return variable


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
