"""Fair timing of two ways to do one thing: in turns, so that a drifting machine hurts both alike."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

Timed = Callable[[], float | None]


@dataclass(frozen=True)
class Comparison:
    """What one benchmark measured.

    Attributes:
        name: What was done.
        ours: Seconds (or ``unit``) of each run of AIDocks.
        other: The same of the limit or peer.
        other_name: What the other one is.
        facts: Sizes and settings that a reader needs to judge the figures.
    """

    name: str
    ours: tuple[float, ...]
    other: tuple[float, ...] = ()
    other_name: str = ""
    unit: str = "s"
    facts: dict[str, str | float | int] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """Median of ours over other, pair by pair; below 1 we are faster."""
        if not self.other:
            return None
        return statistics.median(a / b for a, b in zip(self.ours, self.other, strict=True))


def in_turns(
    ours: Timed, other: Timed, runs: int, warm_up: int = 1
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Run A B A B ...; a callable may return its own measure, else its wall time in seconds counts."""
    for _ in range(warm_up):
        ours()
        other()
    pairs = [(timed(ours), timed(other)) for _ in range(runs)]
    return tuple(a for a, _ in pairs), tuple(b for _, b in pairs)


def timed(work: Timed) -> float:
    """Return what ``work`` measured itself, else its wall time in seconds."""
    begin = time.perf_counter()
    measured = work()
    return time.perf_counter() - begin if measured is None else measured


def machine() -> dict[str, str | int]:
    """Describe this machine in the words that a benchmark report needs."""
    import os

    model = next(
        (line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")),
        platform.processor(),
    )  # fmt: skip
    return {"cpu": model, "cores": os.cpu_count() or 0, "python": platform.python_version()}
