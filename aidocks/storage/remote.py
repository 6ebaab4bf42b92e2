"""A store of objects over the network: whatever fsspec can reach. Such stores write whole objects themselves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from aidocks.errors import CorruptCheckpoint, InvalidSpec, MissingExtra
from aidocks.storage.objects import Listed, ObjectStore, redacted, require_size

#: One request for a part of a large object, and how many are under way at once.
_PART_BYTES = 16 << 20
_AT_ONCE = 8
#: Of S3: soon rather than after minutes, as whoever waits tries again himself.
_S3_OPTIONS = {"connect_timeout": 5, "read_timeout": 60, "retries": {"max_attempts": 3, "mode": "standard"}}
#: What S3 says when a write was refused because the object was there, or was being written, by somebody else.
_REFUSED = ("PreconditionFailed", "pre-conditions", "412", "ConditionalRequestConflict")


class RemoteStore(ObjectStore):
    """Objects below a URL.

    Args:
        url: That fsspec knows, such as ``s3://bucket/prefix`` or ``memory://name``.

    Raises:
        MissingExtra: What fsspec needs for such a URL is not installed.
        InvalidSpec: It is no such URL.
    """

    def __init__(self, url: str) -> None:
        super().__init__(redacted(url))
        self._fs, root = _open(url)
        self._root = root.rstrip("/")

    def read(self, key: str) -> bytes | None:
        with self.reaching("read", key):
            try:
                content: bytes = self._fs.cat_file(self._place(key))
            except (FileNotFoundError, IsADirectoryError):
                return None
            return content

    def write(self, key: str, content: bytes) -> None:
        with self.reaching("write", key):
            self._fs.pipe_file(self._place(key), content)

    def create(self, key: str, content: bytes) -> bool:
        """Write it unless it is there: where writes can be conditional (S3's ``If-None-Match``), by one alone."""
        with self.reaching("write", key):
            found = self.read(key)
            if found is not None:
                return found == content
            try:
                self._fs.pipe_file(self._place(key), content, mode="create")
            except FileExistsError:
                return self.read(key) == content
            except TypeError:  # a store whose fsspec does not know the mode
                self._fs.pipe_file(self._place(key), content)
            except OSError as error:
                # Refused may also be one's own second try, after an answer that was lost.
                found = (
                    self.read(key) if any(code in f"{error} {error.__cause__}" for code in _REFUSED) else None
                )
                if found is None:
                    raise
                return found == content
            return True

    def look(self, key: str) -> Listed | None:
        with self.reaching("look for", key):
            self._fs.invalidate_cache()
            try:
                row = self._fs.info(self._place(key))
            except FileNotFoundError:
                return None
            return _listed(key, row) if row["type"] == "file" else None

    def list(self, prefix: str) -> list[Listed]:
        with self.reaching("list", prefix):
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
        return sorted(rows, key=lambda row: row.key)

    def remove(self, key: str) -> None:
        with self.reaching("remove", key):
            try:
                self._fs.rm_file(self._place(key))
            except FileNotFoundError:
                return

    def remove_all(self, prefix: str) -> None:
        keys = [found.key for found in self.list(prefix)]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(self.remove, keys))

    def put(self, key: str, source: Path, sha256: str, since: os.stat_result) -> None:
        with self.reaching("write", key):
            self._fs.put_file(str(source), self._place(key))
        if _stamp(source.stat()) != _stamp(since):
            self.remove(key)
            raise CorruptCheckpoint(
                f"{source.name} changed while it was being kept in the shared storage.", value=source.name
            )

    def touch(self, key: str, source: Path, sha256: str, since: os.stat_result) -> None:
        self.put(key, source, sha256, since)

    def _chunks(self, key: str, size: int) -> Iterator[tuple[int, bytes]]:
        """Yield the parts in order; of a large object, several are under way at once."""
        place = self._place(key)
        if size <= _PART_BYTES:
            content = self._fs.cat_file(place)
            require_size(len(content), size, key)
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
                require_size(len(content), min(_PART_BYTES, size - offset), key)
                yield offset, content

    def _place(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _strip(self, place: str) -> str:
        stripped: str = self._fs._strip_protocol(place)
        return stripped


def _open(url: str) -> tuple[Any, str]:
    options: dict[str, Any] = {}
    if url.startswith(("s3://", "s3a://")):
        options = {"config_kwargs": _S3_OPTIONS}
    wrong = InvalidSpec(
        f"{redacted(url)!r} is no URL of a storage.",
        field="AIDOCKS_STORAGE_URL",
        hint="It is a URL such as s3://bucket/prefix or file:///mnt/shared.",
    )
    if "://" not in url or url.startswith(("file:", "local:")):
        raise wrong
    try:
        fs, root = import_module("fsspec.core").url_to_fs(url, use_listings_cache=False, **options)
    except ImportError as error:
        of_s3 = url.startswith("s3")
        raise MissingExtra(
            f"The storage {redacted(url)} needs a library that is not installed ({error.name or error}).",
            hint="Install aidocks[s3]." if of_s3 else "Install what fsspec's documentation names for it.",
        ) from error
    except ValueError as error:
        raise wrong from error
    return fs, root


def _listed(key: str, row: dict[str, Any]) -> Listed:
    when = row.get("LastModified") or row.get("mtime") or row.get("created") or 0.0
    changed_s = when.timestamp() if isinstance(when, datetime) else float(when)
    facts = (row.get("ETag"), str(when), row["size"])
    return Listed(key, int(row["size"]), repr(facts), changed_s)


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino
