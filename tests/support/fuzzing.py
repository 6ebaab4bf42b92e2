"""Runs hostile files in processes of their own, with limits of memory and time, and tells what came of each.

A case is a kind and a number: the number seeds the chance that makes its files, so a case that fails is made again by
``python -m tests.support.fuzzing KIND NUMBER``.
"""

from __future__ import annotations

import json
import mmap
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
#: Address space beyond what the imported libraries have: an allocation that a file asks for does not fit.
HEADROOM_BYTES = 768 << 20
#: Of the processor, so that a busy machine is no fault of a file.
CASE_S = 10.0
#: After so long without a next case a process is stuck in code that no alarm interrupts.
STUCK_S = 120.0
#: For importing what the doors import, on a machine that has other things to do.
BEGIN_S = 240.0
_LONGEST_MESSAGE = 3000
_BATCH = 500
_NOT_BEGUN = struct.pack("<q", -1)


@dataclass
class Account:
    """What came of many cases.

    Attributes:
        cases: How many there were.
        outcomes: Of each kind, how many doors answered (`accepted`) and how many refused with which class.
        faults: Cases in which a door did something else, and what.
        slowest: Seconds of the slowest case, and which it was.
        grown: Most bytes of memory that a process gained while it ran its cases.
    """

    cases: int = 0
    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")
    grown: int = 0

    def add(self, told: dict[str, Any]) -> None:
        """Add what one process has told."""
        self.cases += told["cases"]
        self.outcomes.setdefault(told["kind"], Counter()).update(told["outcomes"])
        self.faults += told["faults"]
        self.slowest = max(self.slowest, (told["slowest"][0], told["slowest"][1]))
        self.grown = max(self.grown, told["grown"])


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
            note.write_bytes(_NOT_BEGUN)
            command = [sys.executable, "-m", "tests.support.fuzzing", place, json.dumps(left)]
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=_environment(),
                text=True,
            )
            ended = _watched(process, note)
            out, err = process.communicate()
            done = [json.loads(line) for line in out.splitlines()]
            yield from done
            left = left[len(done) :]
            if ended and not left:
                return
            if note.read_bytes() == _NOT_BEGUN:
                raise RuntimeError(
                    f"the process ended with {process.returncode} before its first case: {err[-2000:]}"
                )
            kind, begin, end = left[0]
            at = max(begin, *struct.unpack("<q", note.read_bytes()))
            why = "stuck" if not ended else f"the process ended with {process.returncode}: {err[-600:]}"
            fault = {
                "kind": kind,
                "cases": at - begin + 1,
                "outcomes": {"crash": 1},
                "slowest": [0, ""],
                "grown": 0,
            }
            yield fault | {"faults": [f"{kind} {at}: {why}"]}
            left[0] = (kind, at + 1, end)
            if at + 1 >= end:
                del left[0]


def _watched(process: subprocess.Popen[str], note: Path) -> bool:
    """Wait for a process; kill it when it makes no progress, and tell whether it ended by itself."""
    last, since = b"", time.monotonic()
    while True:
        try:
            process.wait(0.2)
        except subprocess.TimeoutExpired:
            seen = note.read_bytes()
            if seen != last:
                last, since = seen, time.monotonic()
            elif time.monotonic() - since > (BEGIN_S if seen == _NOT_BEGUN else STUCK_S):
                process.kill()
                return False
        else:
            return True


def _scratch() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AIDOCKS_")}
    alone = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONHASHSEED": "0",
    }
    return kept | alone | {"MALLOC_ARENA_MAX": "2"}


class _TooSlow(BaseException):
    """A case ran into its alarm; no handler of ours may take it for an error of its own."""


def run_case(kind: str, number: int, place: Path) -> Iterator[tuple[str, str | None]]:
    """Yield what each door did of one case, and what is wrong with that.

    Args:
        kind: Of ``hostile_files.KINDS``.
        number: Seeds the chance.
        place: Directory in which it may write; emptied afterwards.
    """
    from aidocks.errors import AIDocksError
    from tests.support.hostile_files import KINDS

    here = Path(tempfile.mkdtemp(dir=place)) / "case"
    here.mkdir()
    try:
        for door in KINDS[kind](random.Random(f"{kind}:{number}"), here):
            try:
                door()
                yield "accepted", None
            except AIDocksError as error:
                yield type(error).__name__, _unfit(error, here)
            except (Exception, _TooSlow) as error:
                where = traceback.extract_tb(error.__traceback__)[-4:]
                lines = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(where))
                yield "fault", f"{type(error).__name__}: {str(error)[:200]!r} at {lines}"
    finally:
        shutil.rmtree(here.parent, ignore_errors=True)


def _unfit(error: Any, here: Path) -> str | None:
    """Return why an error cannot be handed to a client, if it cannot."""
    text = str(error)
    if error.http_status >= 500 and error.code not in ("insufficient_disk", "missing_extra"):
        return f"it blames the service: {text[:300]!r}"
    if len(text) > _LONGEST_MESSAGE:
        return f"its message has {len(text)} characters: {text[:100]!r}"
    try:
        json.dumps(error.problem(), ensure_ascii=False, allow_nan=False, default=str).encode()
        if str(pickle.loads(pickle.dumps(error))) != text:
            return "it is another one after a journey between processes"
    except (ValueError, TypeError, RecursionError) as flaw:
        return f"it cannot be sent: {flaw!s:.200}"
    return None


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise _TooSlow(f"more than {seconds:.0f} s")

    signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * mmap.PAGESIZE + HEADROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _run_batch(kind: str, numbers: Iterable[int], place: Path, note: mmap.mmap) -> dict[str, Any]:
    outcomes: Counter[str] = Counter()
    faults: list[str] = []
    slowest, cases, before = (0.0, ""), 0, _peak()
    for number in numbers:
        note[:8] = struct.pack("<q", number)
        begun = time.perf_counter()
        try:
            with _alarm(CASE_S):
                for outcome, fault in run_case(kind, number, place):
                    outcomes[outcome] += 1
                    faults += [f"{kind} {number}: {outcome}: {fault}"] if fault else []
        except _TooSlow as error:
            faults.append(f"{kind} {number}: {error}")
        cases += 1
        slowest = max(slowest, (time.perf_counter() - begun, f"{kind} {number}"))
    told = {"kind": kind, "cases": cases, "outcomes": outcomes, "faults": faults, "slowest": slowest}
    return told | {"grown": _peak() - before}


def _load() -> None:
    """Import what the doors import, so that the limit of memory is one of the files alone."""
    import pyarrow.parquet
    import torch
    from transformers import AutoTokenizer

    del pyarrow, torch, AutoTokenizer
    from aidocks.operations import OPERATIONS

    for registration in OPERATIONS:
        registration.load()
    # Nothing here has to survive a power cut.
    os.fsync = lambda _: None


def main(arguments: Sequence[str]) -> None:
    """Run the batches of a parent, or show one case."""
    _load()
    if arguments[0].isalpha():
        with tempfile.TemporaryDirectory() as there:
            for outcome, fault in run_case(arguments[0], int(arguments[1]), Path(there)):
                print(outcome, fault or "")
        return
    place = Path(arguments[0])
    with (place / "at").open("r+b") as stream:
        note = mmap.mmap(stream.fileno(), 8)
    # What a first case imports is not its own.
    for kind in sorted({kind for kind, _, _ in json.loads(arguments[1])}):
        for number in range(-8, 0):
            list(run_case(kind, number, place))
    _limit_memory()
    for kind, begin, end in json.loads(arguments[1]):
        print(json.dumps(_run_batch(kind, range(begin, end), place, note)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
