"""From the fields of a spec to command-line flags (names, types, choices, help), and back to fields."""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt

from aidocks.errors import InvalidSpec

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from aidocks.specs.base import Spec

_SCALARS = (bool, int, float, str)
_BOUNDS = ((Ge, "ge", "at least"), (Gt, "gt", "more than"), (Le, "le", "at most"), (Lt, "lt", "less than"))


@dataclass(frozen=True)
class Flag:
    """How one field of a spec is given on the command line.

    Attributes:
        field: Name of the field.
        annotation: What the command-line parser shall read; never given means None.
        metavar: Shown instead of the type where that says more.
        decode: Turns what was read into the field's value.
    """

    field: str
    annotation: Any
    help: str
    metavar: str | None
    decode: Callable[[Any], Any]

    @property
    def option(self) -> str:
        name = self.field.replace("_", "-")
        return f"--{name}/--no-{name}" if self.annotation is bool else f"--{name}"


def flags_of(spec_type: type[Spec]) -> tuple[Flag, ...]:
    """Return one flag for each field: what must be given, then the spec's own, then what it shares with others."""
    classes = [inspect.get_annotations(kind) for kind in spec_type.__mro__]

    def place(item: tuple[str, FieldInfo]) -> tuple[bool, int]:
        name, field = item
        return not field.is_required(), next(n for n, own in enumerate(classes) if name in own)

    fields = sorted(spec_type.model_fields.items(), key=place)
    return tuple(_flag(name, field) for name, field in fields)


def given_fields(flags: Sequence[Flag], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the flags that were given.

    Raises:
        InvalidSpec: JSON text that is none.
    """
    return {flag.field: flag.decode(values[flag.field]) for flag in flags if values[flag.field] is not None}


def _flag(name: str, field: FieldInfo) -> Flag:
    annotation, metavar, decode = _reading(_bare(field.annotation))

    def read(given: Any) -> Any:
        try:
            return decode(given)
        except InvalidSpec as error:
            hint = _json_form(name, field) or error.hint
            raise InvalidSpec(error.message, field=name, value=given, hint=hint) from None

    return Flag(name, annotation, _help(field), metavar, read)


def _reading(kind: Any) -> tuple[Any, str | None, Callable[[Any], Any]]:
    """Return what the parser reads for a field of type ``kind``, its metavar, and the way to the value."""
    if kind in _SCALARS:
        return kind, None, _as_it_is
    if _has_short(kind):
        return str, kind.written_short, _word_or_json
    if get_origin(kind) is Literal and all(isinstance(choice, str) for choice in get_args(kind)):
        return kind, None, _as_it_is
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind, None, lambda choice: choice.value
    if elements := _listed_words(kind):
        return list[str], f"{'|'.join(sorted(map(_word_name, elements)))},...", _items
    if get_origin(kind) in (Union, types.UnionType):
        members = [_bare(member) for member in get_args(kind)]
        words = [_word_name(member) for member in members if _is_word(member)]
        if len(words) == len(members):
            return str, "|".join(words), _as_it_is
        if words:
            return str, "|".join([*words, "JSON"]), _word_or_json
        lists = {_word_name(word) for member in members for word in _listed_words(member)}
        if lists:
            return list[str], "|".join([*sorted(lists), "JSON"]), _words_or_json
    return str, "JSON", _parsed


def _listed_words(kind: Any) -> set[Any]:
    """Return the types of the elements of a list, where each of them is written in one word; else none."""
    origin = get_origin(kind)
    if not (isinstance(origin, type) and issubclass(origin, Sequence | AbstractSet)):
        return set()
    elements = {_bare(element) for element in get_args(kind) if element is not Ellipsis}
    return elements if all(map(_is_word, elements)) else set()


def _bare(annotation: Any) -> Any:
    """Return ``annotation`` without ``Annotated`` and without the alternative None."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        return _bare(members[0]) if len(members) == 1 else Union[tuple(members)]  # noqa: UP007 - made at run time
    return annotation


def _is_word(kind: Any) -> bool:
    return (
        kind in _SCALARS
        or get_origin(kind) is Literal
        or (isinstance(kind, type) and issubclass(kind, Enum))
        or _has_short(kind)
    )


def _has_short(kind: Any) -> bool:
    """Say whether a model is written in one word, too, such as ``metric:data``."""
    return isinstance(getattr(kind, "written_short", None), str)


def _word_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if _has_short(kind):
        return str(kind.written_short)
    if issubclass(kind, Enum):
        return "|".join(str(choice.value) for choice in kind)
    return str(kind.__name__)


def _as_it_is(given: Any) -> Any:
    return given


def _word_or_json(given: str) -> Any:
    return _parsed(given) if given.lstrip()[:1] in ("[", "{") else given


def _words_or_json(given: list[str]) -> Any:
    """Read a list of words, one a flag (a comma may stand in a pattern), or JSON."""
    if len(given) > 1:
        return given
    read = _word_or_json(given[0])
    return [read] if isinstance(read, str) else read


def _items(given: list[str]) -> list[Any]:
    """Read a list: flags repeated, values separated by commas, or one JSON array."""
    if len(given) == 1 and given[0].lstrip().startswith("["):
        parsed: list[Any] = _parsed(given[0])
        return parsed
    return [item.strip() for text in given for item in text.split(",")]


def _parsed(given: str) -> Any:
    from aidocks.specs.read import parse_json

    return parse_json(given)


def _json_form(name: str, field: FieldInfo) -> str | None:
    """Say how the field is written, by its first example that has to be JSON."""
    for example in field.examples or ():
        if isinstance(example, list | tuple | dict):
            return f"Write JSON: --{name.replace('_', '-')} '{json.dumps(example, ensure_ascii=False)}'"
    return None


def _help(field: FieldInfo) -> str:
    from rich.markup import escape

    facts = [
        f"{words} {bound}"
        for kind, attribute, words in _BOUNDS
        for bound in [getattr(item, attribute) for item in field.metadata if isinstance(item, kind)]
    ]
    if field.is_required():
        facts.append("required")
    elif isinstance(field.default, str | int | float) and not isinstance(field.default, bool):
        facts.append(f"default: {field.default.value if isinstance(field.default, Enum) else field.default}")
    return escape(field.description or "") + (f" [dim]({escape(', '.join(facts))})[/]" if facts else "")
