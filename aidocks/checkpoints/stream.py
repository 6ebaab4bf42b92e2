"""A file's bytes one after another: read by the caller, hashed and stored by two threads behind it.

What is stored passes the page cache by where the file system allows it. Copying into that cache costs as much
processor time as hashing does, which made a copy with its hash half as fast as without, and a weight file pushes
out of it what others are using, the sources among it.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

#: A multiple of every block size: what a buffer holds is stored at such an offset, too.
BUFFER_BYTES = 4 << 20
#: One is filled, one hashed, one stored; the others keep a slow moment of one from stopping the rest.
BUFFERS = 6
# What a file system says that cannot, or not at these addresses, store past the cache.
_CANNOT_PASS_CACHE = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}


class HashingStream:
    """Appends to a file that exists and is empty, and hashes what it appends.

    Errors of storing are raised by any later call, at the latest by :meth:`finish`.

    Args:
        path: The file.
        descriptor: The same file, opened for reading and writing; it stays the caller's.

    Attributes:
        position: Bytes appended so far.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.position = 0
        self._path = path
        self._descriptor = descriptor
        self._direct: int | None = None
        self._digest = hashlib.sha256()
        self._buffer: memoryview | None = None
        self._filled = 0
        self._buffers = 0
        self._under_way: deque[tuple[memoryview, Future[Any], Future[Any]]] = deque()
        self._hasher: ThreadPoolExecutor | None = None
        self._storer: ThreadPoolExecutor | None = None

    def append(self, content: bytes | memoryview) -> None:
        """Append bytes at hand; they are copied, and may be changed afterwards."""
        rest = memoryview(content).cast("B")
        while rest:
            room = self._room()
            count = min(len(room), len(rest))
            room[:count] = rest[:count]
            self._advance(count)
            rest = rest[count:]

    def append_from(self, source: int, begin: int, count: int) -> int:
        """Append ``count`` bytes of an open file, from its byte ``begin`` on; return how many it had."""
        copied = 0
        while copied < count:
            read = os.preadv(source, [self._room()[: count - copied]], begin + copied)
            if read == 0:
                break
            self._advance(read)
            copied += read
        return copied

    def finish(self) -> hashlib._Hash:
        """Store the rest, wait for all of it, and return the SHA-256 so far, to which more may be added."""
        try:
            while self._under_way:
                self._wait_for_oldest()
            if self._buffer is not None and self._filled:
                rest = self._buffer[: self._filled]
                write_all(self._descriptor, rest, self.position - self._filled)
                self._digest.update(rest)
        finally:
            self.close()
        return self._digest

    def close(self) -> None:
        """Stop; what was not stored yet may not be stored. Nothing can be appended afterwards."""
        for pool in (self._hasher, self._storer):
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)
        self._hasher = self._storer = self._buffer = None
        self._under_way.clear()
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None

    def _room(self) -> memoryview:
        """Return the free part of the buffer that is being filled; never empty."""
        if self._buffer is None:
            if self._buffers < BUFFERS:
                self._buffers += 1
                # A map of its own is aligned, as storing past the cache asks.
                self._buffer = memoryview(mmap.mmap(-1, BUFFER_BYTES))
            else:
                self._buffer = self._wait_for_oldest()
            self._filled = 0
        return self._buffer[self._filled :]

    def _advance(self, count: int) -> None:
        self._filled += count
        self.position += count
        if self._filled == BUFFER_BYTES:
            self._send()

    def _send(self) -> None:
        """Hand the full buffer to the two threads."""
        assert self._buffer is not None
        if self._hasher is None or self._storer is None:
            self._hasher = ThreadPoolExecutor(1, "aidocks-hash")
            self._storer = ThreadPoolExecutor(1, "aidocks-store")
            self._direct = _open_past_cache(self._path)
        hashed = self._hasher.submit(self._digest.update, self._buffer)
        stored = self._storer.submit(self._store, self._buffer, self.position - BUFFER_BYTES)
        self._under_way.append((self._buffer, hashed, stored))
        self._buffer = None

    def _wait_for_oldest(self) -> memoryview:
        buffer, hashed, stored = self._under_way.popleft()
        hashed.result()
        stored.result()
        return buffer

    def _store(self, buffer: memoryview, offset: int) -> None:
        if self._direct is not None:
            try:
                return write_all(self._direct, buffer, offset)
            except OSError as error:
                if error.errno not in _CANNOT_PASS_CACHE:
                    raise
                os.close(self._direct)
                self._direct = None
        write_all(self._descriptor, buffer, offset)


def write_all(descriptor: int, content: bytes | memoryview, offset: int) -> None:
    """Write all of ``content`` at ``offset``; one call of the system writes 2 GiB at most."""
    rest = memoryview(content).cast("B")
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest = rest[written:]
        offset += written


def _open_past_cache(path: Path) -> int | None:
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC | flag)
    except OSError as error:
        if error.errno not in _CANNOT_PASS_CACHE:
            raise
        return None
