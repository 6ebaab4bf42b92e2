"""Whether a process works, and its end, as seen from outside."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from cluster.signs import _stat, end, works

#: Native code that keeps the interpreter to itself: no thread of this process gets to run.
HOLDS = "import sys; print(1, flush=True); sum(range(10**12))"
SLEEPS = "import time; print(1, flush=True); time.sleep(600)"

Start = Callable[[str], "subprocess.Popen[bytes]"]


@pytest.fixture
def start() -> Iterator[Start]:
    begun: list[subprocess.Popen[bytes]] = []

    def run(code: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        begun.append(process)
        return process

    yield run
    for process in begun:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def began(process: subprocess.Popen[bytes]) -> str:
    return _stat(process.pid)[19]


def test_who_keeps_the_interpreter_busy_works_and_who_is_stopped_or_waits_does_not(start: Start) -> None:
    busy, asleep, stopped = start(HOLDS), start(SLEEPS), start(HOLDS)
    stopped.send_signal(signal.SIGSTOP)
    assert works(busy.pid, began(busy), look_s=3.0)
    assert not works(asleep.pid, began(asleep), look_s=0.3)
    assert not works(stopped.pid, began(stopped), look_s=0.3)


def test_a_stopped_process_is_ended_and_another_of_its_id_is_not(start: Start) -> None:
    process = start(SLEEPS)
    assert end(process.pid, "1", wait_s=0)
    assert process.poll() is None
    process.send_signal(signal.SIGSTOP)
    assert end(process.pid, began(process))
    assert process.wait() == -signal.SIGKILL
    assert end(process.pid, "1")
