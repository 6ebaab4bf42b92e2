"""Files that appear whole or not at all: written aside, synced, renamed, and their directory synced."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import uuid
from collections.abc import Iterator
from io import RawIOBase
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from aidocks.checkpoints.space import FULL, format_bytes
from aidocks.checkpoints.stream import HashingStream, write_all
from aidocks.errors import CorruptCheckpoint, InsufficientDisk

#: In the name of every file that is not complete yet.
UNFINISHED = ".tmp-"
# Large, because between two chunks a thread waits for its turn while others run Python.
_CHUNK_BYTES = 4 << 20
_CANNOT_PREALLOCATE = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS}


class OutputFile(BaseModel):
    """A file that a unit wrote, so that a resumed job can tell whether it is still the same file."""

    model_config = ConfigDict(frozen=True)

    path: Path
    bytes: int
    sha256: str


class StagedFile:
    """A file of known size, filled under another name until it is complete.

    What is written in the order of the file is hashed and stored while more is read. After the first write
    elsewhere everything is stored at once, and what was not hashed by then is read again at the end.

    Args:
        path: Its final path. The directory is made when it does not exist.
        size: In bytes.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._path = path.absolute()
        self._aside = unfinished(self._path)
        self._size = size
        self._descriptor: int | None = None
        self._stream: HashingStream | None = None
        self._digest: hashlib._Hash | None = None
        self._hashed = 0
        self._source: tuple[Path, int] | None = None

    def create(self) -> None:
        """Reserve the whole size on disk.

        Raises:
            InsufficientDisk: When it does not fit.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self._aside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._stream = HashingStream(self._aside, self._descriptor)
        try:
            with self._explaining_full_disk():
                preallocate(self._descriptor, self._size)
        except BaseException:
            self.discard()
            raise

    def write(self, offset: int, content: bytes | memoryview) -> None:
        """Store ``content`` at a byte offset."""
        with self._explaining_full_disk():
            stream = self._in_order(offset, len(content))
            if stream is not None:
                stream.append(content)
            else:
                write_all(self._open, content, offset)

    def copy(self, offset: int, source: Path, begin: int, count: int) -> None:
        """Store ``count`` bytes of another file, from its byte ``begin`` on, at a byte offset.

        Raises:
            CorruptCheckpoint: When the other file ends before.
        """
        with self._explaining_full_disk():
            stream = self._in_order(offset, count)
            descriptor = self._opened(source)
            if stream is not None:
                copied = stream.append_from(descriptor, begin, count)
            else:
                copied = copy_range(descriptor, begin, self._open, offset, count)
        if copied != count:
            raise CorruptCheckpoint(
                f"{source.name} ended after {copied} of the {count} bytes expected from byte {begin} on.",
                hint="Something shortened the file while it was being read; restore it and try again.",
            )

    def publish(self, sha256: str | None = None) -> OutputFile:
        """Bring the file to its place, durably, and describe it.

        Args:
            sha256: What its content must have. None: whatever was written.

        Raises:
            CorruptCheckpoint: It has another; nothing came to its place.
        """
        with self._explaining_full_disk():
            digest = self._leave_order()
            with open(self._open, "rb", buffering=0, closefd=False) as stream:
                stream.seek(self._hashed)
                hash_rest(stream, digest)
            if sha256 is not None and digest.hexdigest() != sha256:
                raise CorruptCheckpoint(
                    f"{self._path.name} does not have the content that it should have.",
                    value=self._path.name,
                    hint="Something changed it, or the storage is damaged; make or import it again.",
                )
            os.fsync(self._open)
        os.replace(self._aside, self._path)
        sync_directory(self._path.parent)
        return OutputFile(path=self._path, bytes=self._size, sha256=digest.hexdigest())

    def discard(self) -> None:
        """Close, and remove what was not published."""
        if self._stream is not None:
            self._stream.close()
        if self._source is not None:
            os.close(self._source[1])
            self._source = None
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self._aside.unlink(missing_ok=True)

    @property
    def _open(self) -> int:
        assert self._descriptor is not None, "the file is written between create and discard"
        return self._descriptor

    def _in_order(self, offset: int, count: int) -> HashingStream | None:
        """Return the stream when ``offset`` is where it has come to; leave it for good when not."""
        assert self._stream is not None, "the file is written between create and discard"
        if self._digest is None and offset == self._stream.position:
            return self._stream
        self._leave_order()
        assert offset >= self._hashed or not count, "nothing is written twice"
        return None

    def _leave_order(self) -> hashlib._Hash:
        if self._digest is None:
            assert self._stream is not None, "the file is written between create and discard"
            self._digest = self._stream.finish()
            self._hashed = self._stream.position
        return self._digest

    def _opened(self, source: Path) -> int:
        """Return ``source``, opened: the last one stays open, since the next tensor is mostly in the same file."""
        if self._source is None or self._source[0] != source:
            descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
            if self._source is not None:
                os.close(self._source[1])
            self._source = (source, descriptor)
        return self._source[1]

    @contextlib.contextmanager
    def _explaining_full_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise InsufficientDisk(
                f"The disk is full: {self._path} needs {format_bytes(self._size)}.",
                value=self._size,
                hint="Free some space, or put the data directory on a larger disk (AIDOCKS_HOME).",
            ) from error


def unfinished(path: Path) -> Path:
    """Return a name beside ``path``, unused so far, under which it can be written."""
    return path.with_name(f"{path.name}{UNFINISHED}{uuid.uuid4().hex[:12]}")


def write_text(path: Path, text: str) -> OutputFile:
    """Write a small file so that it appears whole or not at all, and survives a power cut."""
    return write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> OutputFile:
    """Write a small file so that it appears whole or not at all, and survives a power cut."""
    staged = StagedFile(path, len(content))
    staged.create()
    try:
        staged.write(0, content)
        return staged.publish()
    finally:
        staged.discard()


def copy_file(source: Path, target: Path) -> OutputFile:
    """Copy a file so that it appears whole or not at all."""
    size = source.stat().st_size
    staged = StagedFile(target, size)
    staged.create()
    try:
        staged.copy(0, source, 0, size)
        return staged.publish()
    finally:
        staged.discard()


def preallocate(descriptor: int, size: int) -> None:
    """Give a file its size, with its blocks reserved where the file system can do so."""
    if size == 0:
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in _CANNOT_PREALLOCATE:
            raise
        os.ftruncate(descriptor, size)


def copy_range(source: int, begin: int, target: int, offset: int, count: int) -> int:
    """Copy ``count`` bytes between two open files; return how many there were to copy."""
    copied = 0
    while copied < count:
        chunk = os.pread(source, min(_CHUNK_BYTES, count - copied), begin + copied)
        if not chunk:
            break
        write_all(target, chunk, offset + copied)
        copied += len(chunk)
    return copied


def hash_rest(stream: RawIOBase, digest: hashlib._Hash) -> None:
    """Add what is left of a file to a digest."""
    chunk = memoryview(bytearray(_CHUNK_BYTES))
    while count := stream.readinto(chunk):
        digest.update(chunk[:count])


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        hash_rest(stream, digest)
    return digest.hexdigest()


def state_of(directory: Path) -> str:
    """Return what changes whenever a file of a directory is written or replaced, from the directory alone.

    Subdirectories do not count: a model's reports lie in one, and say nothing of what it is.
    """
    stats = sorted((entry.name, entry.stat()) for entry in os.scandir(directory) if not entry.is_dir())
    facts = [(name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a directory against others who ask for it in the same way, until the end of the block.

    On a file system without such locks the block runs all the same.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Bring a file's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Bring a directory's entries to the disk: without it, a rename can be forgotten by a power cut."""
    sync_file(path)
