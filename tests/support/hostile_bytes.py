"""Documents and bytes as nobody's program writes them, made from sound ones by a seeded chance."""

from __future__ import annotations

import json
import random
import struct
from typing import Any


class Raw(str):
    """JSON text that is put into a document as it stands."""

    __slots__ = ()


#: Values that some reader somewhere was not ready for.
_HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 7, 2**31, 2**53, 2**62, 2**63, 2**64, -(2**63), 1e308, -0.0, 0.5,
    "", " ", "\0", "..", "../../secret", "/etc/passwd", "~", "x" * 600, "x" * 70_000, "é" * 40, "\u202e", "{{ 9**9 }}",
    "%s%n", "true", "1e400", "F32", "BF16", "llama", [], {}, [[]], [None], {"": None}, ["a", 1, None], [0] * 70,
    [2**62, 2**62], [2**31, 0, 2**62], {"a": {"b": []}}, {"__class__": "x"},
    Raw("NaN"), Raw("-Infinity"), Raw("1e999"), Raw("9" * 5000), Raw('"\\ud800"'), Raw('"\\u0000"'), Raw("-0"),
    Raw("[" * 90 + "]" * 90), Raw("[" * 30_000 + "]" * 30_000), Raw('{"a":' * 20_000 + "1" + "}" * 20_000),
    Raw('{"a":1,"a":2}'), Raw("01"), Raw("tru"), Raw("'x'"), Raw(""),
)  # fmt: skip
_PIECES = (b"\0", b"\xff\xfe", b"\xc0\xaf", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"{", b"}", b"[", b"]", b'"', b",", b":",
           b"\n", b"\r", b"\\u", b"\\ud800", b"-", b"1e999", b"NaN", b"PAR1", b"GGUF", b"&a ", b"*a ",
           b"!!python/object:os.system ",
           b"!!binary ", b"<<: ", b"---\n", b"\t", b"\x1b[2J")  # fmt: skip


def json_text(value: Any) -> str:
    """Return JSON of plain values, in which :class:`Raw` stands as it is."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{json_text(key)}:{json_text(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(json_text, value)) + "]"
    return json.dumps(value)


def hostile_value(chance: random.Random) -> Any:
    """Return something that does not belong there."""
    return _copied(chance.choice(_HOSTILE))


def changed_document(chance: random.Random, document: Any, edits: int = 2) -> Any:
    """Return a copy of a document of dicts and lists with a few of its parts changed, lost or doubled."""
    root = [_copied(document)]
    for _ in range(chance.randint(1, edits)):
        holders = list(_holders(root))
        holder = chance.choice(holders)
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = chance.choice(keys)
        act = chance.random()
        if act < 0.6 or holder is root:
            holder[key] = hostile_value(chance)
        elif act < 0.7:
            del holder[key]
        elif act < 0.8:
            holder[key] = _near(chance, holder[key])
        elif act < 0.9 and isinstance(holder, dict):
            holder[chance.choice(("", "..", "\0", "x" * 700, f"{key} ", "__proto__", key))] = _copied(
                holder[key]
            )
        elif isinstance(holder, dict):
            # The same key twice: the second stands in the text of the first one's value.
            holder[key] = Raw(f"{json_text(holder[key])},{json_text(key)}:{json_text(hostile_value(chance))}")
        else:
            holder.append(_copied(holder[key]))
    return root[0]


def changed_bytes(chance: random.Random, content: bytes, edits: int = 3) -> bytes:
    """Return bytes with a few of them flipped, lost, doubled or put between."""
    data = bytearray(content)
    for _ in range(chance.randint(1, edits)):
        at = chance.randrange(len(data) + 1)
        act = chance.randrange(7)
        if act == 0:
            del data[at:]
        elif act == 1:
            del data[at : at + chance.choice((1, 2, 8, 64))]
        elif act == 2:
            data[at:at] = chance.choice(_PIECES)
        elif act == 3:
            data[at:at] = data[at : at + chance.choice((1, 16, 256))]
        elif act == 4:
            data[at : at + 8] = struct.pack(
                "<Q", chance.choice((0, 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1))
            )
        elif act == 5:
            data += chance.randbytes(chance.choice((1, 8, 4096)))
        elif at < len(data):
            data[at] ^= 1 << chance.randrange(8)
    return bytes(data)


def _holders(node: Any) -> Any:
    if isinstance(node, dict | list) and node:
        yield node
        for inner in node.values() if isinstance(node, dict) else node:
            yield from _holders(inner)


def _copied(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _copied(inner) for key, inner in node.items()}
    return [_copied(inner) for inner in node] if isinstance(node, list | tuple) else node


def _near(chance: random.Random, value: Any) -> Any:
    """Return a value of the same type, a little off."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + chance.choice((-1, 1, 8, -value, value))
    if isinstance(value, str):
        return chance.choice(
            (value[:-1], value.upper(), value + "\n", value * 2, f"../{value}", f"{value}\0")
        )
    return [value] if isinstance(value, list) else {"a": value}
