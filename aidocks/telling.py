"""How a unit that runs for long tells how it goes: lines in a file of the job's workspace.

Whoever runs the unit reads along and makes events of the lines. A file reaches every executor alike, from a thread of
this process to processes on other nodes, and whoever debugs a training can read it, too.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aidocks.checkpoints.space import FULL


class Told(BaseModel):
    """One line of a story.

    Attributes:
        kind: ``progress`` moves the bar, ``metrics`` is a point of a curve, ``message`` is a sentence for people.
        fraction: Of the unit's work that is done, 0 to 1 (``progress``).
        label: What is going on (``progress``), such as ``step 34/200, loss 1.23, 812 tokens/s``.
        text: The sentence (``message``).
        data: The figures (``metrics``), or what a ``message`` is about.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["progress", "metrics", "message"]
    fraction: float | None = Field(None, ge=0, le=1)
    label: str | None = None
    text: str | None = None
    data: dict[str, Any] = Field(default_factory=dict)


def tell(story: Path, told: Told) -> None:
    """Append a line. One process writes a story at a time."""
    line = json.dumps(told.model_dump(mode="json", exclude_defaults=True)) + "\n"
    descriptor = os.open(story, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


class StoryReader:
    """Reads on where it stopped; a line that is still being written is left for the next time.

    Args:
        story: The file; it need not exist yet.
        resume: Read on where whoever last called :meth:`keep_place` stopped, an earlier process for example.
    """

    def __init__(self, story: Path, *, resume: bool = False) -> None:
        self._story = story
        self._place = story.with_name(f"{story.name}.read")
        self._offset = 0
        if resume:
            with suppress(FileNotFoundError, ValueError):
                self._offset = min(int(self._place.read_text()), story.stat().st_size)

    def keep_place(self) -> None:
        """Have the next reader begin after what this one has read; on a full disk, where it would have begun."""
        aside = self._place.with_name(f".{self._place.name}")
        try:
            aside.write_text(str(self._offset))
        except OSError as error:
            if error.errno not in FULL:
                raise
        else:
            aside.replace(self._place)

    def read(self) -> list[Told]:
        """Return the lines since the last call."""
        try:
            with self._story.open("rb") as stream:
                stream.seek(self._offset)
                whole, newline, _ = stream.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        self._offset += len(whole) + len(newline)
        return [told for line in whole.splitlines() if (told := _parse(line)) is not None]


def last_words(log: Path, most: int = 4000) -> str:
    """Return the end of a log, at most so many bytes; of one that does not exist, nothing."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - most))
            return stream.read().decode(errors="replace").strip()
    except FileNotFoundError:
        return ""


def _parse(line: bytes) -> Told | None:
    try:
        return Told.model_validate_json(line)
    except ValidationError:
        return None  # a process died within it
