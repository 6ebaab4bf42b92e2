"""From text to spec: JSON and YAML with strict rules, and validation errors that name the field.

Every door (HTTP, command line, client, ``ray.remote``) reads specs through this module, so a mistake is
reported in the same words everywhere.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from pydantic import ValidationError

from aidocks.errors import InvalidSpec, NotFound
from aidocks.specs.faults import invalid_spec

if TYPE_CHECKING:
    import yaml

    from aidocks.specs.base import Spec

SpecT = TypeVar("SpecT", bound="Spec")

#: Field under which the documents of a YAML text of several are handed on; further fields may stand beside it.
DOCUMENTS = "documents"

#: Values that a YAML document may stand for. Lists of aliases of lists of aliases double with every line.
_MOST_NODES = 100_000

#: What of an offending line is worth repeating.
_SHOWN_LINE = 120

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+', re.DOTALL)


def build_spec(spec_type: type[SpecT], data: Any) -> SpecT:
    """Validate ``data`` as a ``spec_type``.

    Of several documents (what :func:`parse_yaml` returns of them, or the same in JSON) the spec is made by its class
    method ``from_documents``, if it has one.

    Raises:
        InvalidSpec: Listing every wrong field in ``errors``, with what would be right.
    """
    try:
        documents = data.get(DOCUMENTS) if isinstance(data, Mapping) else None
        if (
            isinstance(documents, list | tuple)
            and len(documents) > 1
            and DOCUMENTS not in spec_type.model_fields
        ):
            others = {name: value for name, value in data.items() if name != DOCUMENTS}
            return _join(spec_type, documents, others)
        return spec_type.model_validate(data)
    except ValidationError as error:
        raise invalid_spec(error.errors(include_url=False), spec_type) from None


def _join(spec_type: type[SpecT], documents: Sequence[Any], others: Mapping[str, Any]) -> SpecT:
    join = getattr(spec_type, "from_documents", None)
    if join is None:
        raise InvalidSpec(
            f"These are {len(documents)} documents, but this request is a single one.",
            hint="Send each of them as a request of its own.",
        )
    spec: SpecT = join(documents, others)
    return spec


def read_spec_file(path: Path) -> dict[str, Any]:
    """Read the spec file at ``path``: JSON when it is called ``*.json``, else YAML (of which JSON is a part).

    Raises:
        NotFound: There is no such file.
        InvalidSpec: It is not JSON or YAML, repeats a key, or is not a mapping.
    """
    try:
        text = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise NotFound(f"There is no spec file {str(path)!r}.", hint="Give a YAML or JSON file.") from None
    except OSError as error:
        raise InvalidSpec(f"The spec file {str(path)!r} cannot be read: {error.strerror}.") from None
    try:
        data = parse_json(text) if path.suffix.lower() == ".json" else parse_yaml(text)
        if not isinstance(data, dict):
            raise InvalidSpec("A spec is a mapping of fields to values.", hint="Write 'field: value' lines.")
    except InvalidSpec as error:
        raise InvalidSpec(
            f"{path}: {error.message}", field=error.field, value=error.value, hint=error.hint
        ) from None
    return data


def parse_json(text: str | bytes) -> Any:
    """Parse strict JSON, but supply a comma that is missing between two elements of an array.

    Bodies are pasted from documents, and lists of prompts printed one a line without commas are common there;
    between two array elements nothing else can be meant. Repeated keys, NaN and Infinity are refused.

    Raises:
        InvalidSpec: With line, column and the text of the line.
    """
    text = _decoded(text)
    try:
        return _loads(text)
    except json.JSONDecodeError as first:
        if not first.msg.startswith("Expecting ',' delimiter"):
            _refuse(text, first.pos, first.msg)
    mended, inserted = _with_missing_commas(text)
    try:
        return _loads(mended)
    except json.JSONDecodeError as error:
        _refuse(text, error.pos - sum(place < error.pos for place in inserted), error.msg)


def parse_yaml(text: str | bytes) -> Any:
    """Parse YAML of plain data; repeated keys, and documents that their aliases make endless, are refused.

    Returns:
        The document. Of several (separated by ``---``), a mapping with the one key ``documents``: all that are not
        empty, for :func:`build_spec`.

    Raises:
        InvalidSpec: With line, column and the text of the line.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_document(self, node: yaml.Node) -> Any:
            if _count_nodes(node, {}) > _MOST_NODES:
                raise InvalidSpec(
                    f"The YAML stands for more than {_MOST_NODES:,} values.",
                    hint="Write values out, instead of aliases of aliases.",
                )
            return super().construct_document(node)

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise yaml.constructor.ConstructorError(
                        None, None, "a key is a list or a mapping", key.start_mark
                    )
                if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    text = _decoded(text)
    try:
        documents = list(yaml.load_all(text, Loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        _refuse(
            text, _offset(text, mark.line, mark.column) if mark else 0, error.problem or str(error), "YAML"
        )
    except InvalidSpec:
        raise
    except (AttributeError, LookupError, TypeError):  # the library's answers to `!!bool maybe`
        raise InvalidSpec("The YAML is not valid: a value is not what its tag (`!!`) says.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InvalidSpec(f"The YAML is not valid: {_one_line(str(error))}.") from None
    filled = [document for document in documents if document is not None]
    return {DOCUMENTS: filled} if len(filled) > 1 else next(iter(filled), None)


def _count_nodes(node: yaml.Node, known: dict[int, float]) -> float:
    """Return how many values a node stands for, with all that its aliases repeat; a node within itself is endless."""
    if id(node) not in known:
        known[id(node)] = math.inf
        pairs = node.value if isinstance(node.value, list) else ()
        inner = (part for pair in pairs for part in (pair if isinstance(pair, tuple) else (pair,)))
        known[id(node)] = 1 + sum(_count_nodes(part, known) for part in inner)
    return known[id(node)]


def _decoded(text: str | bytes) -> str:
    if isinstance(text, str):
        return text.removeprefix("\ufeff")
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidSpec(
            f"The text is not UTF-8: byte {error.start} is 0x{text[error.start]:02x}.", hint="Send UTF-8."
        ) from None


def _loads(text: str) -> Any:
    try:
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
        # An escaped half of a surrogate pair is legal JSON but can be written to no file or database.
        if "\\u" in text:
            json.dumps(data, ensure_ascii=False).encode()
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise InvalidSpec("The JSON is nested too deeply.") from None
    except UnicodeEncodeError:
        raise InvalidSpec("The JSON contains half of a surrogate pair (\\ud800 to \\udfff).") from None
    except InvalidSpec:
        raise
    except ValueError as error:
        raise InvalidSpec(f"The JSON is not valid: {_one_line(str(error))}.") from None
    return data


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            name = key.encode("utf-8", "replace").decode()[:_SHOWN_LINE]
            raise InvalidSpec(f"The key {name!r} is given twice.", field=name, hint="Keep one of the two.")
        result[key] = value
    return result


def _no_constant(name: str) -> NoReturn:
    raise InvalidSpec(f"{name} is not a JSON number.", hint="Use a finite number or null.")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise InvalidSpec(f"The number {text[:40]} is too large.", hint="Use a finite number or null.")
    return number


def _with_missing_commas(text: str) -> tuple[str, list[int]]:
    """Return ``text`` with the commas that its arrays lack, and where in the new text these are."""
    pieces: list[str] = []
    inserted: list[int] = []
    brackets: list[str] = []
    copied = 0
    value_end: int | None = None
    for token in _TOKEN.finditer(text):
        first = token.group()[0]
        starts_value = first not in "]},:"
        if starts_value and value_end is not None and brackets and brackets[-1] == "[":
            pieces += [text[copied:value_end], ","]
            inserted.append(value_end + len(inserted))
            copied = value_end
        if first in "[{":
            brackets.append(first)
        elif first in "]}" and brackets:
            brackets.pop()
        value_end = token.end() if first not in "[{,:" else None
    return "".join([*pieces, text[copied:]]), inserted


def _offset(text: str, line: int, column: int) -> int:
    return sum(len(row) for row in text.splitlines(keepends=True)[:line]) + column


def _refuse(text: str, position: int, reason: str, language: str = "JSON") -> NoReturn:
    """Raise the InvalidSpec of a syntax error at ``position`` in ``text``."""
    start = text.rfind("\n", 0, position) + 1
    end = text.find("\n", position)
    line, column = text.count("\n", 0, position) + 1, position - start
    shown_from = max(0, column - _SHOWN_LINE // 2)
    shown = text[start : end if end >= 0 else len(text)][shown_from : shown_from + _SHOWN_LINE].strip()
    raise InvalidSpec(
        f"The {language} is not valid at line {line}, column {column + 1}: {_one_line(reason)}.",
        hint=f"The line reads: {shown}" if shown else "The text ends too early.",
    ) from None


def _one_line(reason: str) -> str:
    reason = " ".join(reason.split()).rstrip(".")
    return reason[:1].lower() + reason[1:]
