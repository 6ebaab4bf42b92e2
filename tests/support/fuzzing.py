"""Runs hostile files by the thousand in processes of their own (:mod:`tests.support.hostile_process`), and counts.

A case is a kind and a number: the number seeds the chance that makes its files, so a case that fails is made again by
``python -m tests.support.hostile_process KIND NUMBER``.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from tests.support.hostile_process import NOT_BEGUN

ROOT = Path(__file__).resolve().parents[2]
#: After so long without a next case a process waits for what never comes. One that computes too long ends by itself.
STUCK_S = 600.0
#: What a door can do wrong; every other outcome is an answer or the class of a refusal.
FAULTS = ("crash", "hang", "untyped error", "wrong answer", "unfit refusal")
_BATCH = 500


@dataclass
class Account:
    """What came of many cases.

    Attributes:
        cases: How many there were.
        outcomes: Of each kind, how many doors answered (`accepted`), refused with which class, or did which of FAULTS.
        faults: Cases in which a door did one of those, and what.
        slowest: Seconds of the processor that the slowest case took, and which it was.
        seconds: Of the processor, of each kind.
        grown: Most bytes of memory that a process gained while it ran its cases.
    """

    cases: int = 0
    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")
    seconds: Counter[str] = field(default_factory=Counter)
    grown: int = 0

    def add(self, told: dict[str, Any]) -> None:
        """Add what one process has told."""
        self.cases += told["cases"]
        self.outcomes.setdefault(told["kind"], Counter()).update(told["outcomes"])
        self.faults += told["faults"]
        self.slowest = max(self.slowest, (told["slowest"][0], told["slowest"][1]))
        self.seconds[told["kind"]] += told["seconds"]
        self.grown = max(self.grown, told["grown"])

    def count(self, outcome: str) -> int:
        """Return how often an outcome came, of all kinds together."""
        return sum(outcomes[outcome] for outcomes in self.outcomes.values())


def run_cases(counts: dict[str, int], *, first: int = 0, processes: int = 1) -> Account:
    """Run so many cases of each kind, from the number ``first`` on."""
    batches = [
        (kind, begin, min(begin + _BATCH, first + count))
        for kind, count in counts.items()
        for begin in range(first, first + count, _BATCH)
    ]
    account = Account()
    with ThreadPoolExecutor(processes) as pool:
        shares = [batches[number::processes] for number in range(processes)]
        for told in pool.map(lambda share: list(_run_apart(share)), shares):
            for one in told:
                account.add(one)
    return account


def _run_apart(batches: Sequence[tuple[str, int, int]]) -> Iterator[dict[str, Any]]:
    """Run batches in one process after another: a new one begins behind the case in which the last one died."""
    left = list(batches)
    with tempfile.TemporaryDirectory(prefix="aidocks-fuzz-", dir=_scratch()) as place:
        note = Path(place) / "at"
        while left:
            note.write_bytes(NOT_BEGUN)
            # Files, in which one can look while it goes on.
            with (Path(place) / "told").open("w+") as out, (Path(place) / "errors").open("w+") as errors:
                process = subprocess.Popen(
                    [sys.executable, "-m", "tests.support.hostile_process", place, json.dumps(left)],
                    cwd=ROOT,
                    stdout=out,
                    stderr=errors,
                    env=_environment(),
                )
                waits = _waits_for_ever(process, note)
                done = [json.loads(line) for line in _text(out).splitlines()]
                err = _text(errors)
            yield from done
            left = left[len(done) :]
            if not left:
                return
            if note.read_bytes() == NOT_BEGUN:
                raise RuntimeError(f"it ended with {process.returncode} before its first case: {err[-2000:]}")
            kind, begin, end = left[0]
            at = max(begin, *struct.unpack("<q", note.read_bytes()))
            # The kernel's own alarm ends a process that computes on in code which no handler interrupts.
            hangs = waits or process.returncode == -signal.SIGVTALRM
            yield _death(kind, begin, at, "hang" if hangs else "crash", process.returncode, err)
            left[0] = (kind, at + 1, end)
            if at + 1 >= end:
                del left[0]


def _text(stream: TextIO) -> str:
    stream.seek(0)
    return stream.read()


def _waits_for_ever(process: subprocess.Popen[bytes], note: Path) -> bool:
    """Wait for a process; kill it when it comes to no next case, and tell whether it had to be."""
    last, since = b"", time.monotonic()
    while True:
        try:
            process.wait(0.2)
        except subprocess.TimeoutExpired:
            seen = note.read_bytes()
            if seen != last:
                last, since = seen, time.monotonic()
            elif time.monotonic() - since > STUCK_S:
                process.kill()
                process.wait()
                return True
        else:
            return False


def _death(kind: str, begin: int, at: int, what: str, returned: int, err: str) -> dict[str, Any]:
    """Return what a process would have told of its batch, had it lived to tell of its last case."""
    return {
        "kind": kind,
        "cases": at - begin + 1,
        "outcomes": {what: 1},
        "faults": [f"{kind} {at}: {what}: it ended with {returned}: {err[-600:]}"],
        "slowest": (0.0, ""),
        "seconds": 0.0,
        "grown": 0,
    }


def _scratch() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AIDOCKS_")}
    alone = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONHASHSEED": "0",
        "MALLOC_ARENA_MAX": "2",
    }
    return kept | alone
