"""A JSONL file of prepared rows, written aside and counted, that appears whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from aidocks.checkpoints.files import OutputFile, sync_directory, unfinished
from aidocks.training.run import Rows


class RowsFile:
    """A JSONL file that appears whole or not at all.

    Attributes:
        count: Rows that are written so far.
        bytes: Their size, line ends included.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._aside = path, unfinished(path)
        self._digest = hashlib.sha256()
        self._stream: IO[bytes] | None = self._aside.open("w+b")
        self._flushed = 0
        self.count = 0
        self.bytes = 0

    def write(self, line: bytes) -> None:
        """Append a row, given without a line's end."""
        assert self._stream is not None, "the file is written before it is published"
        self._stream.write(line + b"\n")
        self._digest.update(line + b"\n")
        self.count += 1
        self.bytes += len(line) + 1

    def publish(self) -> tuple[Rows, OutputFile]:
        """Bring the file to its place, durably, and describe it."""
        assert self._stream is not None, "a file is published once"
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._stream = None
        os.replace(self._aside, self._path)
        sync_directory(self._path.parent)
        sha256 = self._digest.hexdigest()
        return Rows(path=self._path, sha256=sha256, count=self.count), OutputFile(
            path=self._path, bytes=self.bytes, sha256=sha256
        )

    def lines(self) -> Iterator[bytes]:
        """Yield what was written, before it is published."""
        assert self._stream is not None, "the file is read before it is published"
        self._stream.flush()
        with self._aside.open("rb") as written:
            for line in written:
                yield line.rstrip(b"\n")

    def line_at(self, begin: int, end: int) -> bytes:
        """Return the row that lies between two positions of the file, before it is published."""
        assert self._stream is not None, "the file is read before it is published"
        if self._flushed < end:
            self._stream.flush()
            self._flushed = self.bytes
        return os.pread(self._stream.fileno(), end - begin, begin).rstrip(b"\n")

    def discard(self) -> None:
        """Close the file, and remove it if it was not published."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        self._aside.unlink(missing_ok=True)


@contextmanager
def rows_file(path: Path) -> Iterator[RowsFile]:
    """Give a file to write, which is removed unless it was published; its directory is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = RowsFile(path)
    try:
        yield file
    finally:
        file.discard()
