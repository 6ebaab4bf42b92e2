"""The process in which hostile files are opened, with limits of memory and time; it watches what else is opened.

``python -m tests.support.hostile_process KIND NUMBER`` makes one case again and tells what came of it.
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
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

#: Address space beyond what the imported libraries have: an allocation that a file asks for does not fit.
HEADROOM_BYTES = 768 << 20
#: For one case, of the processor: that the machine has other things to do is no fault of a file.
CASE_S = 10.0
#: What a parent reads in the note of a process that has not come to its first case.
NOT_BEGUN = struct.pack("<q", -1)
_LONGEST_MESSAGE = 3000


class _TooSlow(BaseException):
    """A case ran into its alarm; no handler of ours may take it for an error of its own."""


class _Opened:
    """Notes what Python opens outside of a directory, of the libraries and of what the system says of itself."""

    def __init__(self) -> None:
        self.outside: list[str] = []
        self._inside: tuple[str, ...] = ()
        own = (
            sys.prefix,
            sys.base_prefix,
            Path(__file__).parents[2],
            "/proc",
            "/sys",
            os.devnull,
            "/dev/urandom",
        )
        self._own = tuple(f"{os.path.realpath(place)}/" for place in own)
        sys.addaudithook(self._hear)

    @contextmanager
    def only(self, place: Path) -> Iterator[None]:
        """Watch, while what is opened is to lie in a directory."""
        self.outside, self._inside = [], (f"{place.resolve()}/", *self._own)
        tempfile.tempdir = str(place)
        try:
            yield
        finally:
            self._inside, tempfile.tempdir = (), None

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._inside or event not in ("open", "os.listdir", "os.scandir"):
            return
        path = arguments[0]
        if not isinstance(path, str | bytes | os.PathLike):
            return  # what is open already
        try:
            real = os.path.realpath(os.fsdecode(path))
            if not f"{real}/".startswith(self._inside) and os.path.exists(real):
                self.outside.append(real)
        except ValueError:
            pass  # no such path can be opened


@cache
def _opened() -> _Opened:
    """Return the one that this process has: what hears of everything can never be removed."""
    return _Opened()


def run_case(kind: str, number: int, place: Path) -> Iterator[tuple[str, str | None]]:
    """Yield what each door did of one case, and what is wrong with that.

    Args:
        kind: Of ``hostile_files.KINDS``.
        number: Seeds the chance.
        place: Directory in which it may write; emptied afterwards.
    """
    from tests.support.hostile_files import KINDS

    opened = _opened()
    here = Path(tempfile.mkdtemp(dir=place)) / "case"
    here.mkdir()
    try:
        for door in KINDS[kind](random.Random(f"{kind}:{number}"), here):
            with opened.only(here):
                came = _tried(door)
            if opened.outside:
                came = "wrong answer", f"it opened {opened.outside[:3]}"
            yield came
    finally:
        shutil.rmtree(here.parent, ignore_errors=True)


def _tried(door: Any) -> tuple[str, str | None]:
    from aidocks.errors import AIDocksError

    try:
        door()
    except AIDocksError as error:
        flaw = _unfit(error)
        return ("unfit refusal", f"{type(error).__name__}: {flaw}") if flaw else (type(error).__name__, None)
    except (Exception, _TooSlow) as error:
        where = traceback.extract_tb(error.__traceback__)[-4:]
        lines = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(where))
        what = {AssertionError: "wrong answer", _TooSlow: "hang"}.get(type(error), "untyped error")
        return what, f"{type(error).__name__}: {str(error)[:200]!r} at {lines}"
    return "accepted", None


def _unfit(error: Any) -> str | None:
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
    """Interrupt what computes for so long; end the process where that is code which no handler interrupts."""

    def ring(*_: object) -> None:
        raise _TooSlow(f"more than {seconds:.0f} s")

    signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_VIRTUAL, 3 * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * mmap.PAGESIZE + HEADROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _run_batch(kind: str, numbers: Iterable[int], place: Path, note: mmap.mmap) -> dict[str, Any]:
    outcomes: Counter[str] = Counter()
    faults: list[str] = []
    slowest, cases, before, first = (0.0, ""), 0, _peak(), time.process_time()
    for number in numbers:
        note[:8] = struct.pack("<q", number)
        begun = time.process_time()
        try:
            with _alarm(CASE_S):
                for outcome, fault in run_case(kind, number, place):
                    outcomes[outcome] += 1
                    faults += [f"{kind} {number}: {outcome}: {fault}"] if fault else []
        except _TooSlow as error:
            outcomes["hang"] += 1
            faults.append(f"{kind} {number}: hang: between two doors: {error}")
        cases += 1
        slowest = max(slowest, (time.process_time() - begun, f"{kind} {number}"))
    told = {"kind": kind, "cases": cases, "outcomes": outcomes, "faults": faults, "slowest": slowest}
    return told | {"seconds": time.process_time() - first, "grown": _peak() - before}


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
        for number in range(-4, 0):
            list(run_case(kind, number, place))
    _limit_memory()
    for kind, begin, end in json.loads(arguments[1]):
        print(json.dumps(_run_batch(kind, range(begin, end), place, note)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
