"""Checkpoints of a training, as directories of its job: under their name as soon as, and as long as, they are whole."""

from __future__ import annotations

import re
from pathlib import Path

from aidocks.checkpoints.space import require_space

#: Room beside weights and checkpoints: rows, vectors, reports, logs.
_BESIDE_BYTES = 256 << 20
_STATE_BYTES = 12  # of a trained parameter in a checkpoint: float32, and two moments
# Anything else beside them is written, or removed, at the moment (see train/reporter.py).
_NAME = re.compile(r"checkpoint-([0-9]+)")


def checkpoint_name(step: int) -> str:
    """Return the name of the directory of a checkpoint."""
    return f"checkpoint-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Return the optimiser steps that led to a checkpoint.

    Raises:
        ValueError: It is not called like one.
    """
    found = _NAME.fullmatch(checkpoint.name)
    if found is None:
        raise ValueError(f"{checkpoint.name!r} is no name of a checkpoint")
    return int(found[1])


def complete_checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoints in a directory, the oldest first; of one that does not exist, none."""
    try:
        entries = list(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    whole = (
        path for path in entries if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    )
    return sorted(whole, key=step_of)


def newest_checkpoint(directory: Path) -> Path | None:
    """Return the complete checkpoint of the most steps; None where there is none."""
    return next(reversed(complete_checkpoints(directory)), None)


def require_room(workspace: Path, *, whole: int, trained: int, checkpoints: int) -> None:
    """Refuse a training whose result and checkpoints would not fit on the disk of its workspace.

    Args:
        workspace: Of the job.
        whole: Bytes of a result that is a whole model; else 0.
        trained: Parameters that are trained.
        checkpoints: How many are kept; one more is there while it is written.

    Raises:
        InsufficientDisk: They would not.
    """
    kept = (checkpoints + 1) * _STATE_BYTES * trained
    require_space(workspace, whole + 4 * trained + kept + _BESIDE_BYTES)
