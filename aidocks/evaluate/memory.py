"""How much memory loading a model takes: read from the sizes of its files, for those who place the work."""

from __future__ import annotations

from pathlib import Path

from aidocks.storage import sizes_of

#: Files of fewer bytes in all are held by any worker.
SMALL = 1 << 30
#: The libraries, the texts, and what a few thousand tokens leave behind in the layers.
_BESIDE = 1 << 30


def memory_to_load(*models: Path) -> int | None:
    """Return the bytes of main memory that a worker needs to load a model and run texts through it.

    An upper bound: weights are mostly stored in 16 bits and, on processors without instructions for that, computed in
    32, hence twice their files' size; besides, 1 GiB for everything else. Of several models their average is loaded,
    which has the size of the largest one; the others are read from their files.

    Args:
        models: Checkpoint directories.

    Returns:
        None for models that any worker holds, and for those that are not there.
    """
    largest = max((_weights(model) for model in models), default=0)
    return None if largest < SMALL else 2 * largest + _BESIDE


def _weights(model: Path) -> int:
    try:
        return sum(size for name, size in sizes_of(model).items() if name.endswith(".safetensors"))
    except OSError:
        return 0
