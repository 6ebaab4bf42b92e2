"""Whether a process works, and its end, as seen from outside."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest
from ray.exceptions import ActorDiedError

from cluster.signs import Place, _stat, end, heard_of, works
from tests.support.fake_actors import Actor

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


def test_nobody_asks_a_worker_for_signs_that_has_died() -> None:
    async def scenario() -> int:
        actor, work = Actor(), Future[object]()
        listening = asyncio.create_task(
            heard_of(actor, Place("here", "node", 1, "1", 0), actor.reference(work), 0.06)
        )
        while not actor.asked:
            await asyncio.sleep(0.01)
        # Of a process that dies, what it makes and its answer fail in the same moment.
        work.set_exception(ActorDiedError())
        actor.asked[-1].set_exception(ActorDiedError())
        with pytest.raises(ActorDiedError):
            await listening
        asked = len(actor.asked)
        await asyncio.sleep(0.1)
        assert len(asyncio.all_tasks()) == 1
        return len(actor.asked) - asked

    assert asyncio.run(scenario()) == 0
