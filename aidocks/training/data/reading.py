"""Rows from files, one at a time: JSON lines, JSON arrays, CSV, Parquet and plain text.

A file is never held as a whole. A row that cannot be read is a row with a fault, so that whoever reads decides how many
of these are too many.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar

from aidocks.errors import InvalidSpec, MissingExtra, PathNotAllowed
from aidocks.evaluate.texts import allowed_file
from aidocks.training.data.rows import BadRow, DataSource, RawRow, source_of_files

RowT = TypeVar("RowT")

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
#: Of one file. What is in memory does not grow with it.
_MOST_BYTES = 1 << 40
#: Of one row; a longer one is no example, but a file of another kind.
_LONGEST_ROW = 64 << 20
_CHUNK = 1 << 20
_PARQUET_BATCH = 8
_SPACE = re.compile(r"\s*")


def source_of_path(reference: str, allowed_roots: Sequence[Path], field: str = "dataset") -> DataSource:
    """Return the data set that a path of a request means.

    Raises:
        InvalidSpec: For another suffix, a missing or an empty file.
        PathNotAllowed: For a file outside the allowed roots, also by way of ``..`` or a symbolic link.
    """
    try:
        path = allowed_file(
            reference, allowed_roots, field, what="data set", suffixes=SUFFIXES, most_bytes=_MOST_BYTES
        )
    except PathNotAllowed as error:
        error.hint = "Move it below a directory of AIDOCKS_ALLOWED_ROOTS, or upload it as a data set."
        raise
    return source_of_files(reference, [path])


def place_of(source: DataSource) -> str:
    """Return what the numbers of a source's rows count: lines of one text file, else rows."""
    if len(source.files) != 1:
        return "row"
    return "line" if _kind_of(source.files[0].path) in ("jsonl", "csv", "tsv", "txt") else "row"


def read_rows(source: DataSource, *, field: str = "dataset") -> Iterator[RawRow]:
    """Yield the rows of a data set in order.

    Args:
        source: The data set.
        field: Spec field to blame.

    Raises:
        InvalidSpec: For a file that cannot be read at all.
        MissingExtra: For Parquet where pyarrow is not installed.
    """
    yield from taken(source.part, lambda: _all_rows(source, field))


def taken(part: str | None, read: Callable[[], Iterable[RowT]]) -> Iterator[RowT]:
    """Yield the rows of a part.

    Args:
        part: As in :class:`DataSource`; None for all.
        read: Begins to read all rows; called twice where the part depends on how many there are.

    Raises:
        InvalidSpec: It is no part.
    """
    if part is None:
        yield from read()
    else:
        yield from islice(read(), *_bounds(part, lambda: sum(1 for _ in read())))


def _bounds(part: str, count: Callable[[], int]) -> tuple[int, int | None]:
    """Return the numbers of the first row that is taken, and of the first behind it."""
    ends = part.split(":")
    rows = count() if "%" in part or "-" in part else 0
    found: list[int | None] = []
    for end in ends:
        try:
            number = round(float(end[:-1]) / 100 * rows) if end.endswith("%") else int(end) if end else None
        except ValueError as error:
            raise InvalidSpec(
                f"[{part}] is no part of a split.", field="dataset_split", value=part
            ) from error
        found.append(number if number is None or number >= 0 else max(0, rows + number))
    return found[0] or 0, found[1]


def _all_rows(source: DataSource, field: str) -> Iterator[RawRow]:
    if not source.files:
        for number, values in enumerate(source.rows, start=1):
            yield RawRow(number, values)
        return
    count = 0
    for file in source.files:
        for row in _read_file(file.path, source.name, field):
            count += 1
            # Lines of several files would be the same numbers again.
            yield row if len(source.files) == 1 else row._replace(number=count)


def first_rows(source: DataSource, count: int = 100, *, field: str = "dataset") -> list[Mapping[str, Any]]:
    """Return the first rows that can be read."""
    readable = (row.values for row in read_rows(source, field=field) if row.values is not None)
    return list(islice(readable, count))


def _read_file(path: Path, name: str, field: str) -> Iterator[RawRow]:
    kind = _kind_of(path)
    readers: dict[str, Callable[[IO[bytes]], Iterator[RawRow]]] = {
        "jsonl": _json_lines,
        "json": _json_array,
        "csv": lambda stream: _table(stream, ","),
        "tsv": lambda stream: _table(stream, "\t"),
        "parquet": _parquet,
        "txt": _documents,
    }
    try:
        with path.open("rb") as stream:
            yield from readers[kind](stream)
    except _Unreadable as error:
        raise InvalidSpec(
            f"{path.name} cannot be read as {kind}: {error}.", field=field, value=name, hint=error.hint
        ) from error
    except OSError as error:
        raise InvalidSpec(f"{path.name} cannot be read: {error}.", field=field, value=name) from error


class _Unreadable(Exception):
    def __init__(self, reason: str, hint: str | None = None) -> None:
        super().__init__(reason)
        self.hint = hint


def _kind_of(path: Path) -> str:
    """Return what a file is: by its suffix, and by its beginning where that is another thing or there is none."""
    suffix = path.suffix.lower().lstrip(".")
    if suffix in ("csv", "tsv", "parquet", "txt"):
        return suffix
    with path.open("rb") as stream:
        beginning = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if beginning.startswith(b"PAR1"):
        return "parquet"
    # What is called .json is often JSON lines, and the other way round.
    return "json" if beginning.startswith(b"[") else "jsonl"


def _json_lines(stream: IO[bytes]) -> Iterator[RawRow]:
    for number, line in enumerate(iter(lambda: stream.readline(_LONGEST_ROW + 1), b""), start=1):
        if len(line) > _LONGEST_ROW:
            raise _Unreadable(
                f"line {number} is longer than {_LONGEST_ROW >> 20} MiB",
                "A file of one long line may be a JSON array: it begins with '['.",
            )
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield _parse(number, line)


def _parse(number: int, line: bytes) -> RawRow:
    try:
        value = json.loads(line.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        return RawRow(number, None, BadRow("it is not UTF-8", detail=f"byte {error.start + 1}"))
    except json.JSONDecodeError as error:
        return RawRow(number, None, BadRow("it is not JSON", detail=f"column {error.colno}: {error.msg}"))
    except (ValueError, RecursionError) as error:
        return RawRow(number, None, BadRow("it is not JSON", detail=str(error)[:80]))
    return _object(number, value)


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def _object(number: int, value: Any) -> RawRow:
    if not isinstance(value, dict):
        return RawRow(number, None, BadRow("it is not a JSON object", detail=type(value).__name__))
    return RawRow(number, value)


def _json_array(stream: IO[bytes]) -> Iterator[RawRow]:
    """Yield the elements of one array, parsed as they come."""
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    number = 0
    try:
        text = _Window(io.TextIOWrapper(stream, encoding="utf-8-sig"))
        text.take("[")
        if text.take("]"):
            return
        while True:
            number += 1
            yield _object(number, text.element(decoder))
            if text.take("]"):
                return
            if not text.take(","):
                raise ValueError("a comma is missing behind it")
    except (ValueError, RecursionError) as error:
        raise _Unreadable(
            f"row {number} is not JSON ({str(error)[:80]})", "A list of objects is expected."
        ) from error


class _Window:
    """The part of a text that is being parsed."""

    def __init__(self, text: IO[str]) -> None:
        self._text = text
        self._held = text.read(_CHUNK)
        self._at = 0

    def take(self, character: str) -> bool:
        """Go past ``character``, if it is what comes next behind white space."""
        self._skip_space()
        found = self._held.startswith(character, self._at)
        self._at += found
        return found

    def element(self, decoder: json.JSONDecoder) -> Any:
        """Parse what comes next.

        Raises:
            ValueError: It is not JSON, or the text ends within it.
        """
        self._skip_space()
        while True:
            try:
                value, end = decoder.raw_decode(self._held, self._at)
            except ValueError:
                if not self._read_on():
                    raise
                continue
            # A number at the end of what was read may go on.
            if end < len(self._held) or isinstance(value, dict | list | str) or not self._read_on():
                self._at = end
                return value

    def _skip_space(self) -> None:
        while True:
            found = _SPACE.match(self._held, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._held) or not self._read_on():
                return

    def _read_on(self) -> bool:
        """Hold twice as much of what is not parsed yet: parsing again costs no more than parsing once."""
        rest = len(self._held) - self._at
        if rest > _LONGEST_ROW:
            return False
        more = self._text.read(max(_CHUNK, rest))
        self._held, self._at = self._held[self._at :] + more, 0
        return bool(more)


def _lines(text: IO[str]) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: text.readline(_LONGEST_ROW + 1), ""), start=1):
        if len(line) > _LONGEST_ROW:
            raise _Unreadable(f"line {number} is longer than {_LONGEST_ROW >> 20} MiB")
        yield line


def _table(stream: IO[bytes], delimiter: str) -> Iterator[RawRow]:
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    csv.field_size_limit(_LONGEST_ROW)
    try:
        header = text.readline(_LONGEST_ROW)
        if delimiter == "," and ";" in header and "," not in header:
            delimiter = ";"
        text.seek(0)
        table = csv.DictReader(_lines(text), delimiter=delimiter, strict=True)
        names = table.fieldnames or []
        if len(set(names)) < len(names) or not all(names):
            raise _Unreadable(
                "its first line must name every column, each once", f"It has: {', '.join(names)}."[:300]
            )
        for row in table:
            # A row of several lines ends here; where it began is of no use to someone with an editor either.
            number = table.line_num
            if None in row or None in row.values():
                found = sum(value is not None for value in row.values())
                detail = f"{'more than ' if None in row else ''}{len(names) if None in row else found} of {len(names)}"
                yield RawRow(number, None, BadRow("it has another number of columns", detail=detail))
            else:
                yield RawRow(number, row)
    except (csv.Error, UnicodeDecodeError) as error:
        raise _Unreadable(str(error)) from error


def _parquet(stream: IO[bytes]) -> Iterator[RawRow]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise MissingExtra(
            "Reading Parquet needs pyarrow, which is not installed.",
            field="dataset",
            hint="pip install 'aidocks[train]', or give the data set as JSONL.",
        ) from error
    number = 0
    try:
        file = ParquetFile(stream)
        groups = map(file.metadata.row_group, range(file.num_row_groups))
        largest = max((group.total_byte_size for group in groups), default=1)
        # A value that stands in the file once may be that of every row: no value is larger than its group.
        size = max(1, min(_PARQUET_BATCH, 4 * _LONGEST_ROW // max(1, largest)))
        for batch in file.iter_batches(batch_size=size):
            for row in batch.to_pylist():
                number += 1
                yield RawRow(number, row)
    except (ArrowException, OSError, ValueError, OverflowError) as error:  # the latter: times beyond Python's
        raise _Unreadable(str(error)[:200]) from error


def _documents(stream: IO[bytes]) -> Iterator[RawRow]:
    """Yield the blocks of a text that blank lines part, each under the number of its first line."""
    block: list[str] = []
    start, size = 1, 0
    try:
        for number, line in enumerate(_lines(io.TextIOWrapper(stream, encoding="utf-8-sig")), start=1):
            if line.strip():
                start = start if block else number
                block.append(line)
                size += len(line)
                if size > _LONGEST_ROW:
                    raise _Unreadable(f"the text from line {start} on has no blank line for 64 MiB")
            elif block:
                yield RawRow(start, {"text": "".join(block).rstrip("\n")})
                block, size = [], 0
    except UnicodeDecodeError as error:
        raise _Unreadable(f"it is not UTF-8 ({error.reason})") from error
    if block:
        yield RawRow(start, {"text": "".join(block).rstrip("\n")})
