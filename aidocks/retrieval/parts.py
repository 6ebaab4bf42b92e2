"""Rows worked on in parts: which rows a part has, reading some lines of a file, and putting written parts together.

How rows are divided depends on their number alone, never on the workers, so that a part is the same work everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from aidocks.checkpoints.files import OutputFile, StagedFile, write_bytes
from aidocks.plan import Unit, UnitContext
from aidocks.training.run import Rows

#: Parts of any work, about: enough for the workers that there are, with some to spare for the slow ones.
_PARTS = 16


def parts_of(count: int, *, least: int, most: int) -> tuple[tuple[int, int], ...]:
    """Return ``begin`` and ``end`` of the parts of ``count`` rows, each of ``least`` to ``most`` rows.

    The last one may be smaller.
    """
    size = min(most, max(least, ceil(count / _PARTS)))
    return tuple((begin, min(begin + size, count)) for begin in range(0, count, size))


def read_lines(path: Path, wanted: Collection[int]) -> dict[int, dict[str, Any]]:
    """Return some rows of a JSONL file by their lines, from 0. Only these are held; the others are not even parsed.

    Raises:
        KeyError: The file has fewer lines.
    """
    left = set(wanted)
    found: dict[int, dict[str, Any]] = {}
    with path.open("rb") as stream:
        for number, line in enumerate(stream):
            if not left:
                break
            if number in left:
                left.discard(number)
                found[number] = json.loads(line)
    if left:
        raise KeyError(f"{path.name} has no line {min(left)}")
    return found


def each_row(rows: Rows) -> Iterator[dict[str, Any]]:
    """Yield every row, one at a time."""
    with rows.path.open("rb") as stream:
        yield from map(json.loads, stream)


def texts_of(rows: Rows, field: str = "text") -> Iterator[str]:
    """Yield one text of every row, one at a time."""
    return (str(row[field]) for row in each_row(rows))


class WrittenPart(BaseModel):
    """Rows that a unit wrote.

    Attributes:
        file: JSONL.
        count: Rows in it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: OutputFile
    count: int


def write_part(path: Path, rows: Iterable[Mapping[str, Any]]) -> WrittenPart:
    """Write rows as JSONL; the file appears whole or not at all."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    # Lone surrogates are JSON, but no UTF-8.
    content = "".join(lines).encode("utf-8", "backslashreplace")
    return WrittenPart(file=write_bytes(path, content), count=len(lines))


class JoinedRows(BaseModel):
    """Rows of several parts in one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: Rows
    file: OutputFile


class JoinRows(Unit[JoinedRows]):
    """One file of rows made of several, in their order."""

    result_type: ClassVar[type[BaseModel]] = JoinedRows

    parts: tuple[WrittenPart, ...]
    path: Path = Field(description="Where the rows are written.")

    @property
    def label(self) -> str:
        return self.path.name

    @property
    def computes(self) -> bool:
        return False

    def run(self, context: UnitContext) -> JoinedRows:
        file = join_files(self.path, [part.file for part in self.parts])
        count = sum(part.count for part in self.parts)
        return JoinedRows(rows=Rows(path=self.path, sha256=file.sha256, count=count), file=file)

    def outputs(self, result: JoinedRows) -> Sequence[OutputFile]:
        return (result.file,)


def join_files(path: Path, files: Sequence[OutputFile]) -> OutputFile:
    """Write what several files hold, one after another; the file appears whole or not at all.

    Raises:
        CorruptCheckpoint: One of them has become shorter.
        InsufficientDisk: It does not fit.
    """
    staged = StagedFile(path, sum(file.bytes for file in files))
    staged.create()
    try:
        offset = 0
        for file in files:
            staged.copy(offset, file.path, 0, file.bytes)
            offset += file.bytes
        return staged.publish()
    finally:
        staged.discard()
