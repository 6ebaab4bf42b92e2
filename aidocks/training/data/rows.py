"""What a data set consists of before it is understood: its files, its rows as they stand there, and what is bad."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from aidocks.errors import InvalidSpec
from aidocks.specs.train_data import INLINE, SkippedRows

#: Numbers of bad rows that are told, of each reason.
_SHOWN_LINES = 5


class DataFile(BaseModel):
    """A file as it was when the work was planned; with other content it is other work."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path
    bytes: int
    modified: int = Field(description="Time of the last change, in nanoseconds.")


class DataSource(BaseModel):
    """A data set as a unit names it: by its files, or by its rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="As the request names it; `inline` for rows within the request.")
    files: tuple[DataFile, ...] = ()
    rows: tuple[dict[str, Any], ...] = ()
    revision: str | None = Field(None, description="Commit of a hub data set.")
    part: str | None = Field(
        None, description="Rows that are taken, such as `:1000` or `10%:20%`; None for all."
    )
    beir: bool = Field(
        False, description="Whether the files are those of a BEIR folder: passages, queries, judgements."
    )

    @property
    def bytes(self) -> int:
        """Size of the files."""
        return sum(file.bytes for file in self.files)


def source_of_files(name: str, paths: Sequence[Path], revision: str | None = None) -> DataSource:
    """Return the data set that files are together, in this order."""
    files = []
    for path in paths:
        stat = path.stat()
        files.append(DataFile(path=path, bytes=stat.st_size, modified=stat.st_mtime_ns))
    return DataSource(name=name, files=tuple(files), revision=revision)


def source_of_rows(rows: Sequence[Mapping[str, Any]]) -> DataSource:
    """Return the data set that the rows of a request are."""
    return DataSource(name=INLINE, rows=tuple(map(dict, rows)))


class BadRow(Exception):
    """A row that cannot be used.

    Args:
        reason: What is wrong, the same words for every row of which the same is wrong.
        field: Column to blame.
        detail: What this row has there.
    """

    def __init__(self, reason: str, *, field: str | None = None, detail: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.field = field
        self.detail = detail


class RawRow(NamedTuple):
    """A row as it stands in its file.

    Attributes:
        number: Line of a text file, else row, counted from 1.
        values: Column -> value; None where the row cannot be read.
        fault: Why it cannot be read.
    """

    number: int
    values: Mapping[str, Any] | None
    fault: BadRow | None = None


class Faults:
    """Counts bad rows by reason, and refuses a data set of which too much is bad.

    Args:
        name: Of the data set.
        place: What its numbers count: ``line`` or ``row``.
        field: Spec field to blame.
    """

    def __init__(self, name: str, place: str, field: str = "dataset") -> None:
        self._name, self._place, self._field = name, place, field
        self._counts: Counter[tuple[str, str | None]] = Counter()
        self._lines: dict[tuple[str, str | None], list[int]] = {}
        self._first: tuple[int, BadRow] | None = None
        self.bad = 0

    def add(self, number: int, fault: BadRow) -> None:
        """Record a row that cannot be used."""
        self._first = self._first or (number, fault)
        self.bad += 1
        self.leave_out(number, fault.reason, fault.field)

    def leave_out(self, number: int, reason: str, field: str | None = None) -> None:
        """Record a row that is good, but not used."""
        key = (reason, field)
        self._counts[key] += 1
        lines = self._lines.setdefault(key, [])
        if len(lines) < _SHOWN_LINES and number not in lines:
            lines.append(number)

    def summary(self) -> tuple[SkippedRows, ...]:
        """Return the reasons, the most frequent first."""
        return tuple(
            SkippedRows(reason=reason, field=field, count=count, lines=tuple(self._lines[reason, field]))
            for (reason, field), count in self._counts.most_common()
        )

    def require_enough(self, rows: int) -> None:
        """Refuse an empty data set, and one of which more than half is bad.

        Args:
            rows: That were read, bad ones included.

        Raises:
            InvalidSpec: Naming the first bad row, its column, and how many there are.
        """
        if rows == 0:
            raise InvalidSpec(
                f"The data set {self._name!r} is empty.",
                field=self._field,
                value=self._name,
                hint="One row is one example.",
            )
        if 2 * self.bad <= rows or self._first is None:
            return
        number, fault = self._first
        detail = f" ({fault.detail})" if fault.detail else ""
        raise InvalidSpec(
            f"{self._place.capitalize()} {number} of {self._name}: {fault.reason}{detail}. "
            f"{self.bad} of {rows} rows cannot be used.",
            field=self._field,
            value=self._name,
            hint="Rows that cannot be used are left out and counted, but not more than half of them. "
            + describe_skipped(self.summary(), self._place),
        )


def describe_skipped(skipped: Sequence[SkippedRows], place: str = "line") -> str:
    """Say in words what was left out: ``2 rows: output is empty (lines 3, 7)``."""
    parts = []
    for entry in skipped:
        more = ", …" if entry.count > len(entry.lines) else ""
        lines = f"{place}{'s' if len(entry.lines) > 1 else ''} {', '.join(map(str, entry.lines))}{more}"
        parts.append(f"{entry.count} row{'s' if entry.count > 1 else ''}: {entry.reason} ({lines})")
    return "; ".join(parts) + "." if parts else ""
