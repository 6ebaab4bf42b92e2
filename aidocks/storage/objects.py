"""A store of objects behind a URL: whole objects in, whole objects out, whatever fsspec can reach.

An object is there whole or not at all: stores such as S3 keep that promise themselves, and on a file system we
write aside and rename. What goes wrong on the way becomes one of two errors: not there, or not reachable.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from aidocks.checkpoints.files import StagedFile, sync_directory, unfinished, write_bytes
from aidocks.errors import AIDocksError, CorruptCheckpoint, InvalidSpec, MissingExtra, ServiceUnreachable

#: One request for a part of a large object, and how many are under way at once.
_PART_BYTES = 16 << 20
_AT_ONCE = 8
_COPY_BYTES = 4 << 20
_SECRET = re.compile(r"(?<=://)[^/@\s]*(?=@)|(?<=[?&])[^&\s]+")
#: Of S3: soon rather than after minutes, as whoever waits tries again himself.
_S3_OPTIONS = {"connect_timeout": 5, "read_timeout": 60, "retries": {"max_attempts": 3, "mode": "standard"}}


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


class ObjectStore:
    """Objects below a URL. Safe for threads.

    Args:
        url: That fsspec knows, such as ``s3://bucket/prefix``, ``file:///mnt/shared`` or ``memory://name``.

    Raises:
        MissingExtra: What fsspec needs for such a URL is not installed.
        InvalidSpec: It is no such URL.
    """

    def __init__(self, url: str) -> None:
        self.url = redacted(url)
        self._fs, self._root = _open(url)
        self._is_disk = "file" in _protocols(self._fs)
        self._root = self._root.rstrip("/")

    def read(self, key: str) -> bytes | None:
        """Return an object's content; None where there is none."""
        with self._reaching("read", key):
            try:
                content: bytes = self._fs.cat_file(self._place(key))
            except (FileNotFoundError, IsADirectoryError):
                return None
            return content

    def write(self, key: str, content: bytes) -> None:
        """Write an object, also over one that is there."""
        with self._reaching("write", key):
            if self._is_disk:
                write_bytes(Path(self._place(key)), content)
            else:
                self._fs.pipe_file(self._place(key), content)

    def create(self, key: str, content: bytes) -> bool:
        """Write an object unless there is one; return whether it was written.

        On a file system, in memory and on stores with conditional writes (S3's ``If-None-Match``) exactly one of
        several that try at once succeeds. Elsewhere it is looked first: the caller needs a guard of its own.
        """
        with self._reaching("write", key):
            if self._is_disk:
                return _create_on_disk(Path(self._place(key)), content)
            if self._fs.exists(self._place(key)):
                return False
            try:
                self._fs.pipe_file(self._place(key), content, mode="create")
            except FileExistsError:
                return False
            except TypeError:  # a store whose fsspec does not know the mode
                self._fs.pipe_file(self._place(key), content)
            except OSError as error:
                if _is_refused_condition(error):
                    return False
                raise
            return True

    def look(self, key: str) -> Listed | None:
        """Return what is known of an object without its content; None where there is none."""
        with self._reaching("look for", key):
            self._fs.invalidate_cache()
            try:
                row = self._fs.info(self._place(key))
            except FileNotFoundError:
                return None
            return _listed(key, row) if row["type"] == "file" else None

    def list(self, prefix: str) -> list[Listed]:
        """Return all objects whose names begin with ``prefix/``, sorted by name."""
        with self._reaching("list", prefix):
            self._fs.invalidate_cache()
            place = self._place(prefix)
            try:
                found: dict[str, Any] = self._fs.find(place, detail=True)
            except FileNotFoundError:
                return []
        begin = len(self._strip(place)) + 1
        rows = [
            _listed(f"{prefix}/{self._strip(name)[begin:]}", row)
            for name, row in found.items()
            if row["type"] == "file" and len(self._strip(name)) >= begin
        ]
        return sorted((row for row in rows if ".tmp-" not in row.key), key=lambda row: row.key)

    def remove(self, key: str) -> None:
        """Remove an object, if it is there."""
        with self._reaching("remove", key):
            try:
                self._fs.rm_file(self._place(key))
            except FileNotFoundError:
                return
            if self._is_disk:
                sync_directory(Path(self._place(key)).parent)

    def remove_all(self, prefix: str) -> None:
        """Remove all objects whose names begin with ``prefix/``."""
        if self._is_disk:
            shutil.rmtree(self._place(prefix), ignore_errors=True)
            return
        keys = [found.key for found in self.list(prefix)]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(self.remove, keys))

    def touch(self, key: str, source: Path, sha256: str) -> None:
        """Make an object that is there as young as if it had been written now."""
        with self._reaching("touch", key):
            if self._is_disk:
                os.utime(self._place(key))
            else:
                self.put(key, source, sha256)

    def put(self, key: str, source: Path, sha256: str) -> None:
        """Write a file as an object.

        Raises:
            CorruptCheckpoint: The file has, or got meanwhile, another content than it is said to have.
        """
        before = _stamp(source)
        with self._reaching("write", key):
            if self._is_disk:
                _copy_checked(source, Path(self._place(key)), sha256)
                return
            self._fs.put_file(str(source), self._place(key))
        if _stamp(source) != before:
            self.remove(key)
            raise changed(source)

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
            with self._reaching("read", key):
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

    def _chunks(self, key: str, size: int) -> Iterator[tuple[int, bytes]]:
        """Yield an object's content in order; of a large one, several parts are under way at once."""
        place = self._place(key)
        if self._is_disk:
            yield from _chunks_on_disk(Path(place), size)
            return
        if size <= _PART_BYTES:
            content = self._fs.cat_file(place)
            _require_size(len(content), size, key)
            yield 0, content
            return
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            offsets = iter(range(0, size, _PART_BYTES))
            waiting: list[tuple[int, Future[bytes]]] = []

            def ask() -> None:
                offset = next(offsets, None)
                if offset is not None:
                    end = min(size, offset + _PART_BYTES)
                    waiting.append((offset, pool.submit(self._fs.cat_file, place, start=offset, end=end)))

            for _ in range(_AT_ONCE):
                ask()
            while waiting:
                offset, part = waiting.pop(0)
                content = part.result()
                ask()
                _require_size(len(content), min(_PART_BYTES, size - offset), key)
                yield offset, content

    def _place(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _strip(self, place: str) -> str:
        stripped: str = self._fs._strip_protocol(place)
        return stripped

    @contextmanager
    def _reaching(self, verb: str, key: str) -> Iterator[None]:
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


def changed(source: Path) -> CorruptCheckpoint:
    """Return the error of a file that changed while it was being kept."""
    return CorruptCheckpoint(
        f"{source.name} changed while it was being kept in the shared storage.", value=source.name
    )


_opened: dict[str, ObjectStore] = {}
_opening = threading.Lock()


def open_store(url: str) -> ObjectStore:
    """Return the store behind a URL: for each URL, one in a process. Raises as :class:`ObjectStore` does."""
    with _opening:
        if url not in _opened:
            _opened[url] = ObjectStore(url)
        return _opened[url]


def _open(url: str) -> tuple[Any, str]:
    core = import_module("fsspec.core")
    options: dict[str, Any] = {}
    if url.startswith(("s3://", "s3a://")):
        options = {"config_kwargs": _S3_OPTIONS}
    hint = "It is a URL such as s3://bucket/prefix or file:///mnt/shared."
    try:
        fs, root = core.url_to_fs(url, use_listings_cache=False, **options)
    except ImportError as error:
        extra = "s3" if url.startswith("s3") else "(see fsspec's documentation)"
        raise MissingExtra(
            f"The storage {redacted(url)} needs a library that is not installed ({error.name or error}).",
            hint=f"Install aidocks[{extra}]." if extra == "s3" else f"Install what it names {extra}.",
        ) from error
    except ValueError as error:
        raise InvalidSpec(
            f"{redacted(url)!r} is no URL of a storage.", field="AIDOCKS_STORAGE_URL", hint=hint
        ) from error
    if "://" not in url or ("file" in _protocols(fs) and not root.startswith("/")):
        raise InvalidSpec(
            f"{redacted(url)!r} is no URL of a storage.", field="AIDOCKS_STORAGE_URL", hint=hint
        )
    return fs, root


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _is_of_a_store(error: Exception) -> bool:
    """Tell whether an error comes from a store or the way there, not from a fault of ours."""
    library = type(error).__module__.partition(".")[0]
    known = ("botocore", "aiobotocore", "aiohttp", "fsspec", "s3fs", "gcsfs", "adlfs", "google", "azure")
    return isinstance(error, OSError) or library in known


def _is_refused_condition(error: OSError) -> bool:
    """Tell whether S3 refused a write because the object was there, or was being written, by somebody else."""
    said = f"{error} {error.__cause__}"
    return any(
        code in said for code in ("PreconditionFailed", "pre-conditions", "412", "ConditionalRequestConflict")
    )


def _listed(key: str, row: dict[str, Any]) -> Listed:
    when = row.get("LastModified") or row.get("mtime") or row.get("created") or 0.0
    changed_s = when.timestamp() if isinstance(when, datetime) else float(when)
    facts = (row.get("ETag"), str(when), row.get("ino"), row["size"])
    return Listed(key, int(row["size"]), repr(facts), changed_s)


def _create_on_disk(path: Path, content: bytes) -> bool:
    """Write a file aside and give it its name, unless something has that: linking never replaces."""
    aside = unfinished(path)
    write_bytes(aside, content)
    try:
        os.link(aside, path)
    except FileExistsError:
        return False
    finally:
        aside.unlink(missing_ok=True)
    sync_directory(path.parent)
    return True


def _copy_checked(source: Path, target: Path, sha256: str) -> None:
    size = source.stat().st_size
    staged = StagedFile(target, size)
    staged.create()
    try:
        staged.copy(0, source, 0, size)
        staged.publish(sha256)
    finally:
        staged.discard()


def _chunks_on_disk(path: Path, size: int) -> Iterator[tuple[int, bytes]]:
    with path.open("rb", buffering=0) as stream:
        _require_size(os.fstat(stream.fileno()).st_size, size, path.name)
        offset = 0
        while chunk := stream.read(_COPY_BYTES):
            yield offset, chunk
            offset += len(chunk)


def _require_size(found: int, wanted: int, key: str) -> None:
    if found != wanted:
        raise CorruptCheckpoint(
            f"The object {key} of the shared storage has {found} bytes where {wanted} are expected.",
            value=key,
        )


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino
