"""The parameters of a method, from what a request says at its several places to one value for each tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from aidocks.errors import InvalidSpec
from aidocks.merge.method import Method, Parameter, Value, find_method, known_methods
from aidocks.specs.merge_config import MergeConfig
from aidocks.specs.merge_settings import FilteredValue, Setting

#: Names that files from the wild give and that no method of mergekit has any more.
_FORMER = ("consensus_method", "embed_method", "embed_slerp", "majority_sign_method", "rectify_embed")
#: Sums of weights closer to zero than this cannot be divided by.
NO_WEIGHT = 1e-8


@dataclass(frozen=True)
class Rule:
    """A value for tensors whose name contains a text; None for all.

    Attributes:
        values: One, or a gradient from the first layer to the last.
    """

    filter: str | None
    values: tuple[Value, ...]

    def fits(self, tensor: str) -> bool:
        return self.filter in (None, "*") or (self.filter or "") in tensor

    def at(self, t: float, kind: type) -> Value:
        """Return the value at a place between the first layer (0) and the last (1).

        Numbers are interpolated. Of n truth values it is the one at t (n - 1), rounded down: the last holds for the
        last layer alone.
        """
        last = len(self.values) - 1
        if kind is bool:
            return self.values[int(t * last)]
        place = t * last
        lower = int(place)
        upper = min(last, lower + 1)
        share = place - lower
        value = (1 - share) * float(self.values[lower]) + share * float(self.values[upper])
        return round(value) if kind is int else value


@dataclass(frozen=True)
class Settings:
    """The parameters that one place of a request gives, checked.

    Attributes:
        field: That place, such as ``models[1].parameters``.
        rules: Name -> rules, the first that fits counts.
    """

    field: str
    rules: Mapping[str, tuple[Rule, ...]]


def check_words(merge: MergeConfig, path: str = "") -> None:
    """Check what needs no model: the method, and names and values of its parameters.

    Args:
        merge: A merge of the request.
        path: Of the merge in the request: ``stages[0].`` or empty.

    Raises:
        InvalidSpec: As :func:`~aidocks.merge.method.find_method` and :func:`read_settings`.
    """
    method = find_method(merge.merge_method, field=f"{path}merge_method")
    within, module = merge.module
    read_settings(method, merge.parameters, f"{path}parameters")
    if within:
        read_settings(method, module.parameters, f"{path}{within}parameters")
    for number, model in enumerate(module.models or ()):
        read_settings(method, model.parameters, f"{path}{within}models[{number}].parameters", of_model=True)
    for number, part in enumerate(module.slices or ()):
        field = f"{path}{within}slices[{number}]"
        read_settings(method, part.parameters, f"{field}.parameters")
        for place, source in enumerate(part.sources):
            read_settings(method, source.parameters, f"{field}.sources[{place}].parameters", of_model=True)


def read_settings(
    method: Method, given: Mapping[str, Setting], field: str, *, of_model: bool = False
) -> tuple[Settings, list[str]]:
    """Check the parameters that one place of a request gives.

    Args:
        method: The merge's.
        given: Name -> setting.
        field: The place in the request.
        of_model: Whether they are a single model's.

    Returns:
        The settings of parameters that have an effect here, and a note for every other.

    Raises:
        InvalidSpec: For an unknown name, a value of another type, or one out of range.
    """
    known = {parameter.name: parameter for parameter in method.parameters}
    rules: dict[str, tuple[Rule, ...]] = {}
    notes = []
    for name, setting in given.items():
        place = f"{field}.{name}"
        if name not in known:
            notes.append(_without_effect(method, name, setting, place))
        elif of_model and known[name].scope == "tensor":
            notes.append(
                f"{place} has no effect: {name!r} is no parameter of a single model; give it in `parameters` "
                "beside `merge_method`."
            )
        else:
            rules[name] = _rules(known[name], setting, place)
    return Settings(field, rules), notes


def find_value(parameter: Parameter, levels: Iterable[Settings], tensor: str, t: float) -> Value | None:
    """Return the value of a parameter for a tensor; None where nobody gives one and it has no default.

    Args:
        parameter: Which.
        levels: Where it may be given, what counts most first.
        tensor: Name that filters are compared with.
        t: Place of the tensor's layer in its slice, from 0 to 1; 0 outside the layers.
    """
    for level in levels:
        for rule in level.rules.get(parameter.name, ()):
            if rule.fits(tensor):
                return rule.at(t, parameter.kind)
    return parameter.default


def missing_value(
    method: Method, parameter: Parameter, levels: Sequence[Settings], tensor: str, model: str | None = None
) -> InvalidSpec:
    """Return the error for a parameter that has to be given and is not."""
    what = f"the tensor {tensor}" + (f" of {model!r}" if model else "")
    given = next((level for level in levels if parameter.name in level.rules), None)
    hint = "A last item without `filter` is for all other tensors." if given else None
    if hint is None:
        elsewhere = f", or {levels[-1].field}.{parameter.name} for all" if len(levels) > 1 else ""
        hint = f"Give {levels[0].field}.{parameter.name}{elsewhere}: {parameter.allowed}."
    return InvalidSpec(
        f"The method {method.name!r} needs {parameter.name!r} for {what}.",
        field=f"{(given or levels[0]).field}.{parameter.name}",
        hint=hint,
    )


def _without_effect(method: Method, name: str, setting: Setting, place: str) -> str:
    """Return the note for a parameter that the method does not have.

    Raises:
        InvalidSpec: Nothing has it, or ever had.
    """
    known = {known for other in known_methods().values() for known in _names(other)}
    if name not in known and name not in (*_names(method), *_FORMER):
        names = [parameter.name for parameter in method.parameters]
        close = get_close_matches(name, names, n=1)
        has = f"has {', '.join(names)}" if names else "has no parameters"
        raise InvalidSpec(
            f"There is no parameter {name!r}.",
            field=place,
            value=_plain(setting),
            hint=(f"Did you mean {close[0]!r}? " if close else "") + f"The method {method.name!r} {has}.",
        )
    return f"{place} has no effect: the method {method.name!r} has no parameter {name!r}."


def _names(method: Method) -> tuple[str, ...]:
    return (*(parameter.name for parameter in method.parameters), *method.ignored)


def _rules(parameter: Parameter, setting: Setting, place: str) -> tuple[Rule, ...]:
    if isinstance(setting, FilteredValue):
        return (_rule(parameter, setting, f"{place}.value"),)
    if not isinstance(setting, tuple):
        return (Rule(None, _values(parameter, setting, place)),)
    filtered = [item for item in setting if isinstance(item, FilteredValue)]
    if filtered:
        return tuple(_rule(parameter, item, f"{place}[{n}].value") for n, item in enumerate(filtered))
    gradient = tuple(item for item in setting if not isinstance(item, FilteredValue))
    return (Rule(None, _values(parameter, gradient, place)),)


def _rule(parameter: Parameter, given: FilteredValue, place: str) -> Rule:
    return Rule(given.filter, _values(parameter, given.value, place))


def _values(parameter: Parameter, given: Value | tuple[Value, ...], place: str) -> tuple[Value, ...]:
    if isinstance(given, tuple):
        return tuple(parameter.checked(value, f"{place}[{n}]") for n, value in enumerate(given))
    return (parameter.checked(given, place),)


def _plain(setting: Setting) -> Any:
    if isinstance(setting, FilteredValue):
        return setting.model_dump(mode="json")
    return [_plain(item) for item in setting] if isinstance(setting, tuple) else setting


class WeightSums:
    """What the weights of the models sum to, tensor after tensor, where a method takes them as shares of a whole.

    Args:
        method: Only one without a base has weights of that kind.
    """

    def __init__(self, method: Method) -> None:
        self._method = method
        weight = next((p for p in method.parameters if p.name == "weight"), None)
        self._counts = method.base == "none" and weight is not None and weight.scope != "tensor"
        self._other: dict[str, float] = {}

    def add(self, tensor: str, values: Mapping[str, Any], field: str) -> None:
        """Look at the weights of a tensor.

        Args:
            tensor: Its name in the result.
            values: Of all parameters.
            field: Place in the request that gives a weight.

        Raises:
            InvalidSpec: They sum to nothing, and are to be divided by their sum.
        """
        if not self._counts:
            return
        total = sum(values["weight"])
        divides = values.get("normalize", values.get("normalize_weights", False))
        if divides and abs(total) < NO_WEIGHT:
            raise InvalidSpec(
                f"The weights for the tensor {tensor} sum to {total:g}, and are to be divided by their sum.",
                field=field,
                value=list(values["weight"]),
                hint="Give weights with another sum, or `normalize: false` to take them as they are.",
            )
        if not divides and "normalize" in values and abs(total - 1) > 1e-6:
            self._other[tensor] = total

    def notes(self) -> list[str]:
        """Return what to say of sums other than one that nothing divides by."""
        if not self._other:
            return []
        tensor, total = next(iter(self._other.items()))
        more = (
            f", and those of {len(self._other) - 1} more tensors not to 1 either"
            if len(self._other) > 1
            else ""
        )
        return [
            f"The weights for {tensor} sum to {total:g}{more}; `normalize` is off, so the result is that much larger "
            "or smaller than its models."
        ]
