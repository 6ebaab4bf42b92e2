"""A store of objects behind a URL: whole objects in, whole objects out.

An object is there whole or not at all. What goes wrong on the way becomes one of two errors: not there, or not
reachable.
"""

from __future__ import annotations

import os
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from aidocks.checkpoints.files import StagedFile
from aidocks.errors import AIDocksError, CorruptCheckpoint, ServiceUnreachable

_SECRET = re.compile(r"(?<=://)[^/@\s]*(?=@)|(?<=[?&])[^&\s]+")
_STORE_LIBRARIES = (
    "botocore",
    "aiobotocore",
    "aiohttp",
    "fsspec",
    "s3fs",
    "gcsfs",
    "adlfs",
    "google",
    "azure",
)


@dataclass(frozen=True)
class Listed:
    """An object as a listing shows it.

    Attributes:
        key: Its name.
        size: In bytes.
        version: Another text whenever the object was written anew.
        changed_s: When it was written, seconds since the epoch by the store's clock; 0 where it does not say.
    """

    key: str
    size: int
    version: str
    changed_s: float


def redacted(url: str) -> str:
    """Return a URL as people may see it: without user, password and parameters."""
    return _SECRET.sub("…", url)


class ObjectStore(ABC):
    """Objects below a URL. Safe for threads. All methods raise ServiceUnreachable where it does not answer.

    Args:
        url: As people may see it.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    @abstractmethod
    def read(self, key: str) -> bytes | None:
        """Return an object's content; None where there is none."""

    @abstractmethod
    def write(self, key: str, content: bytes) -> None:
        """Write an object, also over one that is there."""

    @abstractmethod
    def create(self, key: str, content: bytes) -> bool:
        """Write an object unless there is one; return whether it has this content now.

        Of several that try at once exactly one succeeds, where the store can see to it. Elsewhere it is looked first:
        the caller needs a guard of its own.
        """

    @abstractmethod
    def look(self, key: str) -> Listed | None:
        """Return what is known of an object without its content; None where there is none."""

    @abstractmethod
    def list(self, prefix: str) -> list[Listed]:
        """Return all objects whose names begin with ``prefix/``, sorted by name."""

    @abstractmethod
    def remove(self, key: str) -> None:
        """Remove an object, if it is there."""

    @abstractmethod
    def remove_all(self, prefix: str) -> None:
        """Remove all objects whose names begin with ``prefix/``."""

    @abstractmethod
    def put(self, key: str, source: Path, sha256: str, since: os.stat_result) -> None:
        """Write a file as an object.

        Args:
            key: Of the object.
            source: The file.
            sha256: Of its content.
            since: Its state when that was computed, or before.

        Raises:
            CorruptCheckpoint: The file has, or got meanwhile, another content.
        """

    @abstractmethod
    def touch(self, key: str, source: Path, sha256: str, since: os.stat_result) -> None:
        """Make an object that is there as young as if it had been written now; otherwise as :meth:`put`."""

    def remove_unfinished(self, older_than_s: float) -> None:  # noqa: B027 - most stores do that themselves
        """Remove what writers that were killed have left behind, where it is left to us."""

    def get(self, key: str, target: Path, size: int, sha256: str, name: str) -> None:
        """Write an object to a file, which appears whole and checked, or not at all.

        Args:
            key: Of the object.
            target: Its directory is made when it does not exist.
            size: In bytes.
            sha256: Of its content.
            name: What the object is called in errors.

        Raises:
            CorruptCheckpoint: There is no such object, or it has another content.
            InsufficientDisk: It does not fit.
        """
        staged = StagedFile(target, size)
        staged.create()
        try:
            with self.reaching("read", key):
                try:
                    for offset, chunk in self._chunks(key, size):
                        staged.write(offset, chunk)
                except FileNotFoundError:
                    raise CorruptCheckpoint(
                        f"{name} is not in the storage any more ({key}).", value=name
                    ) from None
            staged.publish(sha256)
        finally:
            staged.discard()

    @abstractmethod
    def _chunks(self, key: str, size: int) -> Iterator[tuple[int, bytes]]:
        """Yield offset and content of an object's parts, in order.

        Raises:
            FileNotFoundError: There is no such object.
            CorruptCheckpoint: It has another size.
        """

    @contextmanager
    def reaching(self, verb: str, key: str) -> Iterator[None]:
        """Turn what a store raises into one error that says what was tried; our own pass."""
        try:
            yield
        except AIDocksError:
            raise
        except Exception as error:
            if not _is_of_a_store(error):
                raise
            what = redacted(f"{type(error).__name__}: {error}".splitlines()[0][:300])
            raise ServiceUnreachable(
                f"The shared storage {self.url} does not answer: could not {verb} {key!r} ({what}).",
                value=self.url,
                hint="Check AIDOCKS_STORAGE_URL, the network, and the store's credentials in the environment.",
            ) from error


def require_size(found: int, wanted: int, key: str) -> None:
    """Refuse an object of another size than it should have.

    Raises:
        CorruptCheckpoint: It has.
    """
    if found != wanted:
        raise CorruptCheckpoint(
            f"The object {key} of the shared storage has {found} bytes where {wanted} are expected.",
            value=key,
        )


_opened: dict[str, ObjectStore] = {}
_opening = threading.Lock()


def open_store(url: str) -> ObjectStore:
    """Return the store behind a URL: for each URL, one in a process.

    Args:
        url: ``file:///mnt/shared``, or one that fsspec knows, such as ``s3://bucket/prefix``.

    Raises:
        MissingExtra: What fsspec needs for such a URL is not installed.
        InvalidSpec: It is no such URL.
    """
    with _opening:
        if url not in _opened:
            _opened[url] = _open(url)
        return _opened[url]


def _open(url: str) -> ObjectStore:
    if url.startswith("file:///"):
        from aidocks.storage.disk import DirectoryStore

        return DirectoryStore(Path(url.removeprefix("file://")))
    from aidocks.storage.remote import RemoteStore

    return RemoteStore(url)


def _is_of_a_store(error: Exception) -> bool:
    """Tell whether an error comes from a store or the way there, not from a fault of ours."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _STORE_LIBRARIES
