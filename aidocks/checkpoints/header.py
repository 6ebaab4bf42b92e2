"""Headers of safetensors files, read and checked without the library and without torch.

A file is: the length N of the header (8 bytes, little-endian), N bytes of JSON, the data. The JSON maps each
tensor's name to its type, shape and byte range within the data, and ``__metadata__`` to a map of strings.
Here every invariant of the format is checked before anything is read or mapped: ranges that overlap or leave
holes would let one file mean two things to two readers, and a length that is believed blindly is an
allocation that an attacker chooses.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any

from aidocks.checkpoints.dtypes import DTYPE_BITS
from aidocks.errors import CorruptCheckpoint

#: The format's own limit.
MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8
#: torch's limit. The format has none, but only an attacker asks for the product of a million sizes.
_MAX_AXES = 64
#: The longest in use have about 120. What is done with names, such as a search in them, is sized for this.
_MAX_NAME = 512
_METADATA = "__metadata__"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies.

    Attributes:
        name: Full parameter name.
        dtype: Element type in safetensors' spelling, such as ``BF16``.
        shape: Shape; empty for a scalar.
        file: The file that holds it.
        begin: First byte, counted from the start of the file.
        end: First byte after it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def numel(self) -> int:
        return prod(self.shape)


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Return the entries (in the order of their data) and the metadata of a safetensors file.

    Raises:
        CorruptCheckpoint: Naming the file, the tensor and the invariant that does not hold.
    """
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            raw = _read_json_bytes(path, stream.read(_LENGTH_BYTES), size, stream.read)
    except OSError as error:
        raise _corrupt(path, f"it cannot be read ({error.strerror})") from error
    header = _parse_object(path, raw)
    metadata = _read_metadata(path, header.pop(_METADATA, None))
    start = _LENGTH_BYTES + len(raw)
    entries = [_read_entry(path, name, fields, start) for name, fields in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_layout(path, entries, start, size)
    return {entry.name: entry for entry in entries}, metadata


def build_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...], int, int]], metadata: Mapping[str, str]
) -> bytes:
    """Return length and header of a file, padded so that the data begins at a multiple of 8 bytes.

    Args:
        tensors: Name -> (dtype, shape, begin, end), offsets in bytes counted from the start of the data.
        metadata: Text for ``__metadata__``.
    """
    document: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    for name, (dtype, shape, begin, end) in tensors.items():
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    assert len(text) <= MAX_HEADER_BYTES, "a file with so many tensors cannot be read back"
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _read_json_bytes(path: Path, prefix: bytes, size: int, read: Any) -> bytes:
    if len(prefix) < _LENGTH_BYTES:
        raise _corrupt(path, f"it has {len(prefix)} bytes; the header's length alone needs {_LENGTH_BYTES}")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise _corrupt(path, f"its header claims {length} bytes, above the limit of {MAX_HEADER_BYTES}")
    if _LENGTH_BYTES + length > size:
        raise _corrupt(path, f"its header claims {length} bytes, but the file has only {size}")
    first: bytes = read(1) if length else b""
    if first != b"{":
        raise _corrupt(path, "its header does not begin with '{'")
    raw: bytes = first + read(length - 1)
    if len(raw) != length:
        raise _corrupt(path, f"its header ends after {len(raw)} of {length} bytes")
    return raw


def _parse_object(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in found if names.count(name) > 1)
            raise _corrupt(path, f"the key {_sendable(_shorten(twice))} occurs twice in its header")
        return found

    def refuse(constant: str) -> Any:
        raise _corrupt(path, f"its header holds {constant}, which is not JSON")

    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
        if has_half_characters(raw):
            raise ValueError("it has half of a character")
    except CorruptCheckpoint:
        raise
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"its header is not JSON ({_shorten(str(error))})") from error
    assert isinstance(document, dict), "it begins with a brace"
    return document


def _read_metadata(path: Path, metadata: Any) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _corrupt(path, f"{_METADATA} is not a map of strings to strings")
    return metadata


def has_half_characters(text: bytes) -> bool:
    r"""Tell whether JSON escapes half of a surrogate pair (``\ud800``), which no file and no answer can carry on."""
    if not _SURROGATE.search(text):
        return False
    try:
        json.dumps(json.loads(text), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _read_entry(path: Path, name: str, fields: Any, start: int) -> TensorEntry:
    if len(name) > _MAX_NAME:
        raise _corrupt(path, f"its name has {len(name)} characters, more than {_MAX_NAME}", name)
    if not isinstance(fields, dict) or set(fields) != _FIELDS:
        raise _corrupt(path, f"it is described by something other than {sorted(_FIELDS)}", name)
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _corrupt(path, f"its dtype {_shorten(repr(dtype))} is unknown", name)
    if not _are_sizes(shape) or len(shape) > _MAX_AXES:
        raise _corrupt(path, f"its shape {_shorten(repr(shape))} is not a list of sizes", name)
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _corrupt(path, f"its data_offsets {_shorten(repr(offsets))} are not [begin, end]", name)
    begin, end = offsets
    bits = prod(shape) * DTYPE_BITS[dtype]
    if bits != (end - begin) * 8:
        needed = _shorten(str(Fraction(bits, 8)))
        raise _corrupt(
            path,
            f"shape {_shorten(repr(shape))} of {dtype} needs {needed} bytes, but spans {end - begin}",
            name,
        )
    # Steps between rows are products, too, and must be numbers of 64 bits even where there is no element.
    if prod(size for size in shape if size) * DTYPE_BITS[dtype] >= 1 << 63:
        raise _corrupt(path, f"its shape {_shorten(repr(shape))} is larger than any memory", name)
    return TensorEntry(name, dtype, tuple(shape), path, start + begin, start + end)


def _are_sizes(value: Any) -> bool:
    # bool is an int to Python, and sizes beyond 64 bits are no sizes.
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_layout(path: Path, entries: list[TensorEntry], start: int, size: int) -> None:
    position = start
    for entry in entries:
        if entry.begin != position:
            flaw = "overlaps the tensor before it" if entry.begin < position else "leaves a hole before it"
            raise _corrupt(
                path,
                f"its data {flaw} (begins at {entry.begin - start}, expected {position - start})",
                entry.name,
            )
        if entry.end > size:
            raise _corrupt(path, f"its data ends at byte {entry.end} of a file of {size} bytes", entry.name)
        position = entry.end
    if position != size:
        raise _corrupt(path, f"{size - position} bytes at its end belong to no tensor")


def _corrupt(path: Path, flaw: str, tensor: str | None = None) -> CorruptCheckpoint:
    where = path.name if tensor is None else f"tensor {_sendable(_shorten(tensor))} in {path.name}"
    return CorruptCheckpoint(
        f"The weights are damaged: {where}: {flaw}.", hint="Download or copy the file again."
    )


def _sendable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _shorten(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:100]}… ({len(text)} characters)"
