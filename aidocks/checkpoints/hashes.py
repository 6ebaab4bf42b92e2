"""Exact hashes of large files, computed once per content: kept by path, size and time of change."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from aidocks.checkpoints.files import hash_file, write_text

_FILE = "file-hashes.json"
# A file changed within this time might change again within the clock's granularity, unseen.
_SETTLED_NS = 2_000_000_000
_MAX_KEPT = 10_000
# Of this process: the files that are being read, and the writing of the store.
_in_hand: dict[str, threading.Lock] = {}
_keeping = threading.Lock()


class FileHashes:
    """SHA-256 of files, remembered in a small JSON file that may be deleted at any time.

    Args:
        cache_dir: Directory of that file; made when it does not exist.
    """

    def __init__(self, cache_dir: Path) -> None:
        self._store = cache_dir / _FILE

    def compute(self, paths: Sequence[Path]) -> dict[str, str]:
        """Return file name -> SHA-256, reading only what has changed since it was last asked for."""
        known = self._load()
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            digests = list(pool.map(lambda path: self._hash_unless_known(path, known), paths))
        return {path.name: digest for path, digest in zip(paths, digests, strict=True)}

    def compute_ahead(self, paths: Sequence[Path]) -> None:
        """Begin to compute the hashes of files in a thread, for whoever asks for them later.

        One after another, so that the other cores stay free; the thread ends with the process. Whoever asks for
        the file at hand waits for it rather than read it, too.
        """

        def work() -> None:
            known = self._load()
            for path in paths:
                with contextlib.suppress(OSError):
                    self._hash_unless_known(path, known)

        threading.Thread(target=work, name="aidocks-hash-ahead", daemon=True).start()

    def remember(self, digests: Mapping[Path, str]) -> None:
        """Note hashes that are known from writing the files, which nobody will change."""
        self._keep({_key(path): [*_stamp(path), digest] for path, digest in digests.items()})

    def _load(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError, RecursionError):
            rows = json.loads(self._store.read_text())
            if isinstance(rows, dict):
                return rows
        return {}

    def _hash_unless_known(self, path: Path, known: Mapping[str, Any]) -> str:
        key = _key(path)
        digest = _look_up(known, key, _stamp(path))
        if digest is not None:
            return digest
        with _in_hand.setdefault(key, threading.Lock()):
            stamp = _stamp(path)
            digest = _look_up(self._load(), key, stamp)
            if digest is None:
                digest = hash_file(path)
                if stamp == _stamp(path) and time.time_ns() - stamp[1] > _SETTLED_NS:
                    self._keep({key: [*stamp, digest]})
        return digest

    def _keep(self, rows: Mapping[str, list[Any]]) -> None:
        # Two processes may overwrite each other's rows; what is lost is computed again.
        with _keeping:
            merged = {**self._load(), **rows}
            if len(merged) > _MAX_KEPT:
                merged = {key: row for key, row in merged.items() if os.path.exists(key)}
            with contextlib.suppress(OSError):
                write_text(self._store, json.dumps(merged))


def combine_hashes(digests: Mapping[str, str]) -> str:
    """Return one hash for a set of named files."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _look_up(known: Mapping[str, Any], key: str, stamp: list[int]) -> str | None:
    row = known.get(key)
    return str(row[2]) if isinstance(row, list) and len(row) == 3 and row[:2] == stamp else None


def _key(path: Path) -> str:
    return os.path.realpath(path)


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
