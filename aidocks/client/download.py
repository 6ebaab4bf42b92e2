"""Copying a registry model from a service: file by file into a directory that is renamed when it is whole."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import httpx
from pydantic import BaseModel, ConfigDict

from aidocks.errors import Conflict, CorruptCheckpoint, PathNotAllowed


class ModelFile(BaseModel):
    """One file of a registry model, as the service lists it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    path: str
    bytes: int
    sha256: str | None = None


class PartialFile:
    """A file on its way; what has arrived is kept, so a broken connection costs only what was missing."""

    def __init__(self, file: ModelFile, target: Path) -> None:
        self.path = file.path
        self._file = file
        self._target = target

    @property
    def missing(self) -> bool:
        return not self._target.is_file() or self._target.stat().st_size != self._file.bytes

    def headers(self) -> dict[str, str]:
        """Return the headers that ask for the bytes that are missing."""
        have = self._target.stat().st_size if self._target.is_file() else 0
        return {"Range": f"bytes={have}-"} if 0 < have < self._file.bytes else {}

    @contextmanager
    def sink(self, response: httpx.Response) -> Iterator[BinaryIO]:
        """Open the file for the body of ``response``: behind what is there, or anew when all of it comes.

        Raises:
            CorruptCheckpoint: A whole body arrived, yet the file has not the size that the service lists.
        """
        self._target.parent.mkdir(parents=True, exist_ok=True)
        with self._target.open(
            "ab" if response.status_code == httpx.codes.PARTIAL_CONTENT else "wb"
        ) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if self.missing:
            size = self._target.stat().st_size
            self._target.unlink()
            raise CorruptCheckpoint(
                f"{self.path} arrived with {size} bytes; the service lists {self._file.bytes}.",
                hint="Has the model just been replaced? Download again.",
            )

    def check(self) -> None:
        """Compare with the manifest; a file that differs is removed, so that the next attempt fetches it.

        Raises:
            CorruptCheckpoint: It differs.
        """
        if self._file.sha256 is None:
            return
        with self._target.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != self._file.sha256:
            self._target.unlink()
            raise CorruptCheckpoint(
                f"{self.path} arrived with sha256 {found}; the manifest says {self._file.sha256}.",
                hint="Download again: this file was removed, the others are kept.",
            )


class Download:
    """The local side of a download.

    Args:
        name: Of the model.
        files: All its files; those with a ``sha256`` are verified.
        directory: Where ``directory / name`` shall appear.

    Raises:
        Conflict: It is there already.
        PathNotAllowed: A file's path leads out of it.
    """

    def __init__(self, name: str, files: Sequence[ModelFile], directory: Path) -> None:
        self._target = directory / name
        self._staged = directory / f".{name}.partial"
        if self._target.exists():
            raise Conflict(
                f"{str(self._target)!r} exists already.", hint="Remove it, or choose another directory."
            )
        for file in files:
            path = PurePosixPath(file.path)
            if path.is_absolute() or ".." in path.parts:
                raise PathNotAllowed(f"The service offers a file outside the model: {file.path!r}.")
        self._files = [PartialFile(file, self._staged / file.path) for file in files]
        self._staged.mkdir(parents=True, exist_ok=True)

    def next_file(self) -> PartialFile | None:
        """Return the next file of which something is missing."""
        return next((file for file in self._files if file.missing), None)

    def publish(self) -> Path:
        """Verify all files, drop what an earlier version of the model left, and rename the directory."""
        for file in self._files:
            file.check()
        expected = {file._target for file in self._files}
        for left in [path for path in self._staged.rglob("*") if path.is_file() and path not in expected]:
            left.unlink()
        for entry in self._staged.rglob("*"):
            if entry.is_dir() and not any(entry.iterdir()):
                shutil.rmtree(entry)
        self._staged.rename(self._target)
        return self._target
