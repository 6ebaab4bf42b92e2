"""How requests of merges name models, and how they give parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag

from aidocks.errors import InvalidSpec
from aidocks.specs.base import Spec

_LONGEST_REFERENCE = 2048
_REFERENCE_KEYS = ("model", "lora")
_PATH_KEYS = ("path", "revision")


def _as_reference(given: Any) -> Any:
    """Write the long form of a reference, ``{model: {path, revision}, lora: {path}}``, in one line."""
    if not isinstance(given, Mapping):
        return given
    if given.get("override_architecture") is not None:
        raise InvalidSpec(
            "A model is merged as what its config.json says that it is.",
            field="override_architecture",
            value=given["override_architecture"],
            hint="Leave it out, or change `architectures` in a copy of the model.",
        )
    keys = {key for key in given if key != "override_architecture"}
    _require_keys(keys, _REFERENCE_KEYS, "model")
    model, adapter = _as_path(given["model"], "model"), _as_path(given.get("lora"), "lora")
    if not isinstance(model, str) or not isinstance(adapter, str | None):
        return given
    # An empty adapter after the last plus: what stands before it may hold one.
    return f"{model}+{adapter or ''}" if adapter or "+" in model else model


def _as_path(given: Any, field: str) -> Any:
    if not isinstance(given, Mapping):
        return given
    _require_keys(set(given), _PATH_KEYS, "path", field)
    path, revision = given["path"], given.get("revision")
    return f"{path}@{revision}" if revision else path


def _require_keys(given: set[Any], known: tuple[str, ...], needed: str, within: str = "") -> None:
    strange = sorted(str(key) for key in given.difference(known))
    if strange:
        raise InvalidSpec(
            "There is no such field.",
            field=".".join(filter(None, (within, strange[0]))),
            hint=f"The fields here are {', '.join(known)}.",
        )
    if needed not in given:
        raise InvalidSpec(
            "This field is required.",
            field=".".join(filter(None, (within, needed))),
            hint=f"The fields here are {', '.join(known)}.",
        )


#: A model to merge, with an adapter if there is a plus: ``model[+adapter]``.
MergeRef = Annotated[
    str,
    Field(
        min_length=1,
        max_length=_LONGEST_REFERENCE,
        description="A registry name, a hub model `org/name[@revision]`, a path below an allowed root, or the name of "
        "an earlier stage; behind a plus, the reference of a LoRA adapter to add to it: `model+adapter`. Or in long "
        "form: `{model: {path, revision}, lora: {path, revision}}`.",
        examples=["smollm2-135m-instruct", "org/name@main", "smollm2-135m-instruct+./my-adapter"],
    ),
    BeforeValidator(_as_reference, json_schema_input_type=str | dict[str, Any]),
]


def split_reference(reference: str) -> tuple[str, str | None]:
    """Divide ``model[+adapter]`` at its last plus; nothing behind it stands for no adapter."""
    model, plus, adapter = reference.rpartition("+")
    return (model, adapter or None) if plus else (reference, None)


Scalar = bool | int | float | str
_SETTING = (
    "must be a number, true or false, a list of them (a gradient over the layers), or `{filter, value}`, alone or in "
    "a list"
)


def _kind_of_value(given: Any) -> str | None:
    if isinstance(given, bool | int | float | str):
        return "one"
    return "gradient" if isinstance(given, list | tuple) and given and all(map(_is_scalar, given)) else None


def _kind_of_setting(given: Any) -> str | None:
    if isinstance(given, Mapping | FilteredValue):
        return "filtered"
    listed = isinstance(given, list | tuple) and len(given) > 0
    if listed and all(isinstance(item, Mapping | FilteredValue) for item in given):
        return "listed"
    return _kind_of_value(given)


def _is_scalar(given: Any) -> bool:
    return isinstance(given, bool | int | float | str)


_One = Annotated[Scalar, Tag("one")]
_Gradient = Annotated[tuple[Scalar, ...], Tag("gradient")]
Value = Annotated[
    _One | _Gradient,
    Discriminator(
        _kind_of_value,
        custom_error_type="setting",
        custom_error_message="must be a number, true or false, or a list of them (a gradient over the layers)",
    ),
]


class FilteredValue(Spec):
    """A value for tensors whose name contains a text."""

    filter: str | None = Field(
        None,
        description="What the tensor's name must contain; `*`, or nothing at all, for every tensor.",
        examples=["self_attn"],
    )
    value: Value = Field(
        description="A number, true or false; or a list of them, a gradient from the first layer of the slice to the "
        "last.",
        examples=[[0, 0.5, 0.3, 0.7, 1]],
    )


#: What a request may give for a parameter: a scalar, a gradient, or such values with filters, the first that fits.
Setting = Annotated[
    _One
    | _Gradient
    | Annotated[FilteredValue, Tag("filtered")]
    | Annotated[tuple[FilteredValue, ...], Tag("listed")],
    Discriminator(_kind_of_setting, custom_error_type="setting", custom_error_message=_SETTING),
]


def none_is_empty(given: Any) -> Any:
    """Read a key without a value as an empty mapping."""
    return {} if given is None else given


Parameters = Annotated[
    dict[str, Setting],
    BeforeValidator(none_is_empty),
    Field(
        description="Parameters of the method: each a number, true or false; a list of them, a gradient over the "
        "layers; or `{filter, value}`, alone or in a list of which the first that fits counts.",
        examples=[{"weight": 0.5, "density": [0.2, 0.8]}],
    ),
]
