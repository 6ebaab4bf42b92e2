"""What a check has found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        state: ``good``, ``note`` (worth knowing) or ``bad`` (AIDocks will not work).
        text: What was found and, if it is bad, what to do.
    """

    subject: str
    state: Literal["good", "note", "bad"]
    text: str


def good(subject: str, text: str) -> Finding:
    return Finding(subject, "good", text)


def note(subject: str, text: str) -> Finding:
    return Finding(subject, "note", text)


def bad(subject: str, text: str) -> Finding:
    return Finding(subject, "bad", text)


def existing(path: Path) -> Path:
    """Return ``path`` or the nearest directory above it that is there."""
    return next(place for place in (path, *path.parents) if place.exists())
