"""One file of examples on its way to the disk: written as it comes, hashed, its lines counted, and looked at."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from aidocks.checkpoints.space import FULL
from aidocks.errors import InsufficientDisk, InvalidSpec

#: Ending -> the ending under which the file is stored.
SUFFIXES = {
    ".jsonl": ".jsonl",
    ".ndjson": ".jsonl",
    ".json": ".json",
    ".csv": ".csv",
    ".parquet": ".parquet",
    ".txt": ".txt",
}
_PARQUET = b"PAR1"
_MAX_FILENAME = 255
_READ_BYTES = 4 << 20
_BLANK = re.compile(rb"\n[ \t\r\f\v]*(?=\n)")


def checked_filename(filename: str) -> str:
    """Return a file's name without the directories before it.

    Raises:
        InvalidSpec: It is no name, or has an ending of no format that can be read.
    """
    name = re.split(r"[/\\]", filename)[-1]
    if not name or len(name) > _MAX_FILENAME or not name.isprintable():
        raise InvalidSpec(
            "The name of the file is empty, too long, or has characters that cannot be shown.",
            field="filename",
            value=name[:80],
            hint="Send a name such as examples.jsonl.",
        )
    if PurePosixPath(name).suffix.lower() not in SUFFIXES:
        raise InvalidSpec(
            f"{name!r} has none of the endings that say what a data set is written in.",
            field="filename",
            value=name,
            hint=f"Known are {', '.join(SUFFIXES)}; compressed files are not.",
        )
    return name


def data_file(filename: str) -> str:
    """Return the name under which a file is stored: always the same, but for its ending."""
    return f"data{SUFFIXES[PurePosixPath(filename).suffix.lower()]}"


class StagedUpload:
    """A file of unknown size, written from its beginning to its end.

    Args:
        path: Where it is written, in a directory that nobody reads yet. It must not exist.
        filename: Its name where it comes from, for errors.
        written: It does exist: what is there is its beginning, and is looked at as if it came now.

    Attributes:
        size: Bytes so far.

    Raises:
        InvalidSpec: As :meth:`write` does, of what is there.
    """

    def __init__(self, path: Path, filename: str, *, written: bool = False) -> None:
        self.size = 0
        self._path = path
        self._filename = filename
        self._digest = hashlib.sha256()
        self._head = b""
        self._lines = _Lines() if path.suffix == ".jsonl" else None
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (0 if written else os.O_CREAT | os.O_EXCL)
        self._stream = os.fdopen(os.open(path, flags, 0o644), "r+b", buffering=0)
        try:
            while chunk := self._stream.read(_READ_BYTES):
                self._look(chunk)
        except BaseException:
            self._stream.close()
            raise

    def write(self, chunk: bytes | memoryview) -> None:
        """Append bytes.

        Raises:
            InvalidSpec: They are no text, where the file's ending promises text.
            InsufficientDisk: The disk is full.
        """
        chunk = bytes(chunk)
        self._look(chunk)
        with explaining_full_disk(self._path):
            rest = memoryview(chunk)
            while rest:
                rest = rest[self._stream.write(rest) or 0 :]

    def _look(self, chunk: bytes) -> None:
        if self._path.suffix != ".parquet" and b"\0" in chunk:
            raise self._refused(
                f"The file is not the text that its ending {self._path.suffix!r} promises.",
                "Send UTF-8 text that is not compressed; the ending of Parquet files is .parquet.",
            )
        self._head += chunk[: len(_PARQUET) - len(self._head)]
        self._digest.update(chunk)
        if self._lines is not None:
            self._lines.feed(chunk)
        self.size += len(chunk)

    def finish(self) -> tuple[str, int | None]:
        """Bring all of it to the disk; return its SHA-256 and, of JSON Lines, how many are not blank.

        Raises:
            InvalidSpec: It is empty, or not what its ending promises.
        """
        if self._path.suffix == ".parquet" and self._head != _PARQUET:
            raise self._refused("The file is not Parquet.", "Is its ending the right one?")
        rows = self._lines.count() if self._lines is not None else None
        if self.size == 0 or rows == 0:
            raise self._refused("The file is empty.", "Send at least one example.")
        with explaining_full_disk(self._path):
            os.fsync(self._stream.fileno())
        self._stream.close()
        return self._digest.hexdigest(), rows

    def _refused(self, message: str, hint: str) -> InvalidSpec:
        return InvalidSpec(message, field="file", value=self._filename, hint=hint)

    def close(self) -> None:
        """Close the file. Whoever made its directory removes it."""
        self._stream.close()


class _Lines:
    """Counts the lines that are not blank, over chunks that end anywhere."""

    def __init__(self) -> None:
        self._count = 0
        self._open = False

    def feed(self, chunk: bytes) -> None:
        first, last = chunk.find(b"\n"), chunk.rfind(b"\n")
        if first >= 0:
            self._count += self._open or _has_text(chunk[:first])
            between = chunk[first : last + 1]
            self._count += between.count(b"\n") - 1 - len(_BLANK.findall(between))
            self._open = False
        self._open = self._open or _has_text(chunk[last + 1 :])

    def count(self) -> int:
        return self._count + self._open


def _has_text(line: bytes) -> bool:
    return bool(line) and not line.isspace()


@contextlib.contextmanager
def explaining_full_disk(path: Path) -> Iterator[None]:
    """Let a write to a staged file that meets a full disk raise :class:`InsufficientDisk`."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise InsufficientDisk(
            "The disk is full: the data set could not be stored.",
            hint=f"Free some space below {path.parents[2]}, or put the data directory on a larger disk (AIDOCKS_HOME).",
        ) from error
