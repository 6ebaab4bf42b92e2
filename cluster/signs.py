"""Signs of life of a process: where it is, whether it answers, whether it works, and its end.

A worker is asked for an answer while it runs a unit. The answer comes from a thread of its own, so a unit that
computes, waits for a disk or sleeps does not delay it. Two things do: a process that is stopped or stuck, and native
code that keeps the interpreter to itself for long, as some tokenizers and parsers do. To tell them apart, a worker that
does not answer is looked at from outside, on its node: who keeps the interpreter busy uses a processor, and who is
stopped or waits for a lock does not. (The threads of Ray in a process that does nothing take 0.3 % of one, as
measured.) So native code may take as long as it likes. What cannot be told from slow work, such as a unit whose own
threads wait for each other while the interpreter is free, is for the job's time limit.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

#: The concurrency group in which actors answer: one thread beside that which runs units.
GROUP = "signs"
#: For how long a silent process is looked at, and how much of a core it must use meanwhile to count as working.
LOOK_S = 3.0
WORKING_SHARE = 0.05
#: How long a process that was killed is waited for.
END_WAIT_S = 5.0
#: How long a task on another node may take to begin: it may have to start a process there.
_TASK_WAIT_S = 10.0
_POLL_S = 0.01

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where a process runs.

    Attributes:
        host: Name of the machine.
        node: Ray's id of the node.
        pid: Process id there.
        began: When it was started, in ticks of that machine: another process of the same id is another one.
        memory: Bytes of main memory that the node has in all.
    """

    host: str
    node: str
    pid: int
    began: str
    memory: int


def whereabouts(_actor: Any) -> Place:
    """Return where this process runs. Called in actors, by ``__ray_call__``."""
    from ray._common.utils import get_system_memory

    pid = os.getpid()
    node = ray.get_runtime_context().get_node_id()
    return Place(socket.gethostname(), node, pid, _stat(pid)[19], int(get_system_memory()))


def answer(_actor: Any) -> None:
    """Give a sign of life. Called in actors, on the thread that is there for it."""


def works(pid: int, began: str, look_s: float = LOOK_S) -> bool:
    """Say whether a process of this machine computes. Returns as soon as that is certain."""
    begin, before = time.monotonic(), _ticks(pid, began)
    while before is not None and time.monotonic() - begin < look_s:
        time.sleep(look_s / 30)
        now = _ticks(pid, began)
        if now is None:
            return False
        if now - before >= WORKING_SHARE * look_s * os.sysconf("SC_CLK_TCK"):
            return True
    return False


def end(pid: int, began: str, wait_s: float = END_WAIT_S) -> bool:
    """Kill a process of this machine, which also ends one that is stopped; say whether it is gone."""
    deadline = time.monotonic() + wait_s
    while _ticks(pid, began) is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _ticks(pid: int, began: str) -> int | None:
    """Return the processor time that a process has used; None when it is gone."""
    try:
        fields = _stat(pid)
    except (OSError, IndexError):
        return None
    gone = fields[0] in ("Z", "X") or fields[19] != began
    return None if gone else int(fields[11]) + int(fields[12])


def _stat(pid: int) -> list[str]:
    # The third field of proc_pid_stat(5) on; the second, the command, may contain spaces and parentheses.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


async def heard_of(actor: Any, place: Place, work: Any, silence_s: float) -> Any:
    """Await what an actor makes, as long as it gives signs of life.

    Args:
        actor: Its handle.
        place: Where its process is.
        work: Reference to what it makes.
        silence_s: How long it may give none.

    Raises:
        TimeoutError: It fell silent.
    """
    made = asyncio.ensure_future(result(work))
    silent = asyncio.ensure_future(_until_silent(actor, place, made, silence_s))
    try:
        await asyncio.wait({made, silent}, return_when=asyncio.FIRST_COMPLETED)
        if not made.done():
            raise TimeoutError
        return made.result()
    finally:
        for task in (made, silent):
            task.cancel()


async def _until_silent(actor: Any, place: Place, made: asyncio.Future[Any], silence_s: float) -> None:
    # Being cancelled is not enough to end it: of an actor that dies, both fail in the same moment, and Python 3.11's
    # wait_for then raises what the answer failed with alone.
    while not made.done():
        await asyncio.sleep(silence_s / 6)
        try:
            sign = actor.__ray_call__.options(concurrency_group=GROUP).remote(answer)
            await asyncio.wait_for(result(sign), silence_s * 5 / 6)
        except TimeoutError:
            if not await still_works(place):
                return
        except RayError as error:  # whoever awaits its work hears of it, too
            _log.info("process %d does not answer: %s", place.pid, type(error).__name__)


async def still_works(place: Place) -> bool:
    """Look at a process that does not answer, from its node; one whose node does not answer either does not work."""
    try:
        return bool(await _on_node(place.node, works, place.pid, place.began, within_s=LOOK_S))
    except (RayError, TimeoutError):
        return False


async def ensure_end(place: Place) -> bool:
    """Kill a process wherever it is; say whether it is known to be gone, rather than out of reach."""
    try:
        return bool(await _on_node(place.node, end, place.pid, place.began, within_s=END_WAIT_S))
    except (RayError, TimeoutError):
        return False


async def _on_node(node: str, function: Any, *arguments: Any, within_s: float) -> Any:
    if node == ray.get_runtime_context().get_node_id():
        return await asyncio.to_thread(function, *arguments)
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(function).options(num_cpus=0, max_retries=0, scheduling_strategy=strategy)
    reference = task.remote(*arguments)
    try:
        return await asyncio.wait_for(result(reference), within_s + _TASK_WAIT_S)
    except TimeoutError:
        ray.cancel(reference, force=True)
        raise


async def result(reference: Any) -> Any:
    """Await an object on the running loop, and raise what the worker raised as itself."""
    try:
        return await asyncio.wrap_future(reference.future())
    except RayTaskError as error:
        if isinstance(error.cause, RayError) or not isinstance(error.cause, Exception):
            raise
        raise error.cause from None
