"""Merging tensors at hand: every merge method as a function of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch

from aidocks.errors import IncompatibleModels, InvalidSpec
from aidocks.merge.inputs import Inputs, require_one_shape
from aidocks.merge.method import Method, Parameter, find_method
from aidocks.merge.rows import MemoryRows


def merge_tensors(
    method: str | Method,
    tensors: Sequence[torch.Tensor],
    base: int | None = None,
    parameters: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
) -> torch.Tensor:
    """Return the merge of tensors, in the type of the first, computed in float32 (of any float64 in float64).

    Args:
        method: A method, or the name of one.
        tensors: Floating-point tensors of one shape. They are not changed.
        base: Position of the base; None without one.
        parameters: By name; those of each model or input as one value for all, or as a sequence in the order of the
            tensors (the base left out for those of scope ``model``).
        seed: Of methods that draw random numbers.

    Raises:
        InvalidSpec: An unknown method, an unknown or missing parameter, a value of the wrong type or range, a base
            that is missing, or a number of tensors that the method does not take.
        IncompatibleModels: The tensors differ in shape, or are not of floating point.
        CorruptCheckpoint: A tensor contains values that are not finite.
    """
    found = find_method(method, field="method") if isinstance(method, str) else method
    rows = tuple(MemoryRows(f"tensors[{number}]", tensor) for number, tensor in enumerate(tensors))
    base_index = None if found.base == "none" else base
    _check_tensors(found, rows, base_index)
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    inputs = Inputs("tensor", rows, base_index, "float64" if wide else "float32", seed=seed)
    values = _values(found, parameters or {}, inputs)
    found.require_possible(values)
    blocks = [block.to(tensors[0].dtype) for block in found.apply(inputs, values)]
    return torch.cat(blocks).reshape(inputs.shape) if blocks else torch.empty_like(tensors[0])


def _check_tensors(method: Method, rows: Sequence[MemoryRows], base_index: int | None) -> None:
    if base_index is None and method.base == "required":
        raise InvalidSpec(
            f"{method.name} needs a base.", field="base", hint="Say which of the tensors it is."
        )
    if base_index is not None and not 0 <= base_index < len(rows):
        raise InvalidSpec(
            f"There is no tensor {base_index}.",
            field="base",
            value=base_index,
            hint=f"There are {len(rows)}, counted from 0.",
        )
    models = len(rows) - (base_index is not None)
    least, most = method.models
    if models < least or (most is not None and models > most):
        wanted = (
            str(least) if least == most else f"at least {least}" if most is None else f"{least} to {most}"
        )
        beside = " besides the base" if base_index is not None else ""
        raise InvalidSpec(
            f"{method.name} merges {wanted} model(s){beside}, not {models}.", field="tensors", value=len(rows)
        )
    require_one_shape(rows)
    for each in rows:
        if not each.tensor.is_floating_point():
            raise IncompatibleModels(
                f"{each.label} is of {each.tensor.dtype}: only floating point is merged."
            )


def _values(method: Method, given: Mapping[str, Any], inputs: Inputs) -> dict[str, Any]:
    """Return every parameter's value as the method takes it."""
    known = [parameter.name for parameter in method.parameters]
    for name in given:
        if name not in known and name not in method.ignored:
            close = get_close_matches(name, known, n=1)
            raise InvalidSpec(
                f"{method.name} has no parameter {name!r}.",
                field=f"parameters.{name}",
                value=given[name],
                hint=(f"Did you mean {close[0]!r}? " if close else "")
                + f"Its parameters: {', '.join(known) or 'none'}.",
            )
    return {parameter.name: _value(method, parameter, given, inputs) for parameter in method.parameters}


def _value(method: Method, parameter: Parameter, given: Mapping[str, Any], inputs: Inputs) -> Any:
    field = f"parameters.{parameter.name}"
    value = given.get(parameter.name, parameter.default)
    if value is None:
        raise InvalidSpec(
            f"{method.name} needs the parameter {parameter.name!r}.", field=field, hint=parameter.description
        )
    if parameter.scope == "tensor":
        return parameter.checked(value, field)
    wanted = inputs.num_models if parameter.scope == "model" else len(inputs.rows)
    if not isinstance(value, Sequence) or isinstance(value, str):
        value = [value] * wanted
    if len(value) != wanted:
        left_out = ", the base left out" if parameter.scope == "model" else ""
        raise InvalidSpec(
            f"{parameter.name} has {len(value)} values for {wanted} tensors.",
            field=field,
            value=list(value),
            hint=f"Give one for each tensor{left_out}.",
        )
    return tuple(parameter.checked(each, f"{field}[{number}]") for number, each in enumerate(value))
