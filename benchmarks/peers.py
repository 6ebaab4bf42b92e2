"""What benchmarks need and this repository does not hold: peers to compare with, data, room for large files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


class NotAtHand(Exception):
    """What a benchmark needs is not on this machine; it is skipped with this line."""


def peer(program: str) -> Path:
    """Return a program of another project, from the directory that ``AIDOCKS_BENCH_PEER`` names.

    Raises:
        NotAtHand: The variable is not set, or the program is not there.
    """
    return _below("AIDOCKS_BENCH_PEER", "a directory of programs to compare with", program)


def data_dir(inside: str = ".") -> Path:
    """Return the directory of models and texts that ``AIDOCKS_BENCH_DATA`` names, or what lies in it.

    Raises:
        NotAtHand: The variable is not set, or there is no such thing.
    """
    return _below("AIDOCKS_BENCH_DATA", "a directory of models and texts", inside)


def embedding_model() -> Path:
    """Return the sentence-transformers model that ``AIDOCKS_BENCH_EMBEDDER`` names: all-MiniLM-L6-v2 for our figures.

    Raises:
        NotAtHand: The variable is not set, or leads nowhere.
    """
    return _below("AIDOCKS_BENCH_EMBEDDER", "the directory of an embedding model", ".")


def scratch_dir() -> Path:
    """Return where benchmarks put what they make once (``AIDOCKS_BENCH_SCRATCH``, else the system's temporary one)."""
    root = Path(os.environ.get("AIDOCKS_BENCH_SCRATCH") or Path(tempfile.gettempdir()) / "aidocks-bench")
    root.mkdir(parents=True, exist_ok=True)
    return root


def _below(variable: str, what: str, inside: str) -> Path:
    root = os.environ.get(variable)
    if not root:
        raise NotAtHand(f"set {variable} to {what}")
    found = Path(root).absolute() / inside
    if not found.exists():
        raise NotAtHand(f"{variable} leads to no {inside!r}")
    return found
