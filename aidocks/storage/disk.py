"""A store of objects in a directory, which all nodes mount: written aside and renamed."""

from __future__ import annotations

import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from aidocks.checkpoints.files import StagedFile, sync_directory, unfinished, write_bytes
from aidocks.storage.objects import Listed, ObjectStore, require_size

_COPY_BYTES = 4 << 20
#: What is being written, or what somebody who was killed has left (see `unfinished`).
_ASIDE = re.compile(r".+\.tmp-[0-9a-f]{12}")


class DirectoryStore(ObjectStore):
    """Objects as files below a directory.

    Args:
        root: The directory; made when something is written.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(f"file://{root}")
        self._root = root

    def read(self, key: str) -> bytes | None:
        with self.reaching("read", key):
            try:
                return self._path(key).read_bytes()
            except (FileNotFoundError, IsADirectoryError):
                return None

    def write(self, key: str, content: bytes) -> None:
        with self.reaching("write", key):
            write_bytes(self._path(key), content)

    def create(self, key: str, content: bytes) -> bool:
        """Write it aside and give it its name, unless something has that: linking never replaces."""
        path = self._path(key)
        with self.reaching("write", key):
            aside = unfinished(path)
            write_bytes(aside, content)
            try:
                os.link(aside, path)
            except FileExistsError:
                return path.read_bytes() == content
            finally:
                aside.unlink(missing_ok=True)
            sync_directory(path.parent)
            return True

    def look(self, key: str) -> Listed | None:
        with self.reaching("look for", key):
            return _look(self._path(key), key)

    def list(self, prefix: str) -> list[Listed]:
        with self.reaching("list", prefix):
            found = (
                _look(path, f"{prefix}/{path.relative_to(self._path(prefix)).as_posix()}")
                for path in _files(self._path(prefix))
                if not _ASIDE.fullmatch(path.name)
            )
            return sorted((row for row in found if row is not None), key=lambda row: row.key)

    def remove(self, key: str) -> None:
        with self.reaching("remove", key):
            try:
                self._path(key).unlink()
            except FileNotFoundError:
                return
            sync_directory(self._path(key).parent)

    def remove_all(self, prefix: str) -> None:
        with self.reaching("remove", prefix), suppress(FileNotFoundError):
            # Somebody else may be removing the same.
            shutil.rmtree(self._path(prefix))

    def put(self, key: str, source: Path, sha256: str, since: os.stat_result) -> None:
        with self.reaching("write", key):
            staged = StagedFile(self._path(key), since.st_size)
            staged.create()
            try:
                staged.copy(0, source, 0, since.st_size)
                staged.publish(sha256)
            finally:
                staged.discard()

    def touch(self, key: str, source: Path, sha256: str, since: os.stat_result) -> None:
        with self.reaching("touch", key):
            os.utime(self._path(key))

    def remove_unfinished(self, older_than_s: float) -> None:
        until = time.time() - older_than_s
        with self.reaching("list", "."):
            for path in _files(self._root):
                with suppress(FileNotFoundError):
                    if _ASIDE.fullmatch(path.name) and path.lstat().st_mtime < until:
                        path.unlink()

    def _chunks(self, key: str, size: int) -> Iterator[tuple[int, bytes]]:
        with self._path(key).open("rb", buffering=0) as stream:
            require_size(os.fstat(stream.fileno()).st_size, size, key)
            offset = 0
            while chunk := stream.read(_COPY_BYTES):
                yield offset, chunk
                offset += len(chunk)

    def _path(self, key: str) -> Path:
        return self._root / key


def _files(directory: Path) -> Iterator[Path]:
    """Yield everything below a directory that is no directory; what goes meanwhile is passed over."""

    def failed(error: OSError) -> None:
        # Of anything else it must not be taken for empty.
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise error

    for parent, _, names in os.walk(directory, onerror=failed):
        for name in names:
            yield Path(parent, name)


def _look(path: Path, key: str) -> Listed | None:
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    version = f"{status.st_mtime_ns}-{status.st_ino}-{status.st_size}"
    return Listed(key, status.st_size, version, status.st_mtime)
