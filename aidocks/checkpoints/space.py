"""Is there room? Asked before work begins, answered in units that people read."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from aidocks.errors import InsufficientDisk

#: What the system says where a disk, or what somebody may have of it, is used up.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def require_space(directory: Path, needed_bytes: int) -> None:
    """Refuse when less than ``needed_bytes`` are free for ``directory``, which need not exist yet.

    Raises:
        InsufficientDisk: Naming both numbers.
    """
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise InsufficientDisk(
            f"{format_bytes(needed_bytes)} are needed below {directory}, {format_bytes(free)} are free.",
            value=needed_bytes,
            hint="Free some space, or put the data directory on a larger disk (AIDOCKS_HOME).",
        )


def format_bytes(count: int) -> str:
    """Write a number of bytes in decimal units: ``1.5 GB``."""
    if count < 1000:
        return f"{count} bytes"
    amount = float(count)
    for unit in ("kB", "MB", "GB"):
        amount /= 1000
        if amount < 999.95:
            return f"{amount:.1f} {unit}"
    return f"{amount / 1000:.1f} TB"
