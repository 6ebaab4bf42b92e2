"""Asks a service every 100 ms, from a process of its own, whether it is there: one line of JSON for each answer.

``python -m tests.support.probe URL FILE`` runs until it is killed. Requests do not wait for each other, are not
repeated, and open a connection each: what a new caller would meet.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import httpx

INTERVAL_S = 0.1
TIMEOUT_S = 10.0
PATHS = ("/health", "/jobs?limit=1")


@dataclass(frozen=True)
class Answer:
    """What one request met: a status, or 0 and the name of the error."""

    time: float
    path: str
    status: int
    error: str
    seconds: float

    @property
    def good(self) -> bool:
        """Whether a client was told the truth: an answer, or to come again."""
        return 200 <= self.status < 300 or self.status == 503


async def _ask(http: httpx.AsyncClient, path: str, file: TextIO) -> None:
    begun, begin = time.time(), time.perf_counter()
    status, error = 0, ""
    try:
        status = (await http.get(path)).status_code
    except httpx.HTTPError as failure:
        error = type(failure).__name__
    line = {"time": begun, "path": path, "status": status, "error": error}
    file.write(json.dumps(line | {"seconds": round(time.perf_counter() - begin, 4)}) + "\n")
    file.flush()


async def probe(url: str, file: TextIO) -> None:
    """Ask for ever."""
    under_way: set[asyncio.Task[None]] = set()
    # One client, as to make one takes 30 ms of a processor; but none of its connections is used twice.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(
        base_url=url, timeout=TIMEOUT_S, trust_env=False, limits=limits, headers={"Connection": "close"}
    ) as http:
        while True:
            for path in PATHS:
                task = asyncio.create_task(_ask(http, path, file))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
            await asyncio.sleep(INTERVAL_S)


def read(path: Path) -> list[Answer]:
    """Return what was written so far, whole lines only."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [Answer(**json.loads(line)) for line in lines if line.endswith("\n")]


def outside(answers: Iterable[Answer], spans: Sequence[tuple[float, float]]) -> list[Answer]:
    """Leave out what was asked in certain spans of time."""
    return [a for a in answers if not any(begin <= a.time <= end for begin, end in spans)]


def share_good(answers: Sequence[Answer]) -> float:
    """Return the share of the requests that were answered, 1 if there were none."""
    return sum(answer.good for answer in answers) / len(answers) if answers else 1.0


def kinds(answers: Iterable[Answer]) -> dict[str, int]:
    """Count the answers by status or error."""
    return dict(Counter(str(answer.status or answer.error) for answer in answers).most_common())


@contextmanager
def probing(url: str, path: Path) -> Iterator[Path]:
    """Have a service asked for a while; the answers are in the file."""
    import subprocess

    with subprocess.Popen([sys.executable, "-m", "tests.support.probe", url, str(path)]) as process:
        try:
            yield path
        finally:
            process.kill()


if __name__ == "__main__":
    with Path(sys.argv[2]).open("a") as target:
        asyncio.run(probe(sys.argv[1], target))
