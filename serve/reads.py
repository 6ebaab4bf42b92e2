"""What is read from the job store for many who ask at a time: one thread reads for all, and the same only once.

Changing threads, and two threads in want of the interpreter, cost more than the reading itself. Whatever waits when the
thread comes back is read on one of its ways; those who asked the same meanwhile share the answer, which is never older
than their question.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

#: Answers that are handed over together; whoever asked first waits for the last of them.
_MOST_AT_ONCE = 16


@dataclass
class _Question:
    """Something to be read, and who waits for it."""

    work: Callable[[], bytes]
    loop: asyncio.AbstractEventLoop
    waiting: list[asyncio.Future[bytes]] = field(default_factory=list)
    answer: bytes = b""
    error: Exception | None = None

    def read(self) -> None:
        try:
            self.answer = self.work()
        except Exception as error:  # noqa: BLE001 - whoever asked gets it
            self.error = error

    def tell(self) -> None:
        for future in self.waiting:
            if future.done():
                continue  # who asked has gone
            if self.error is None:
                future.set_result(self.answer)
            else:
                future.set_exception(self.error)


class Reads:
    """Reads in a thread of its own, on behalf of coroutines."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reads")
        self._lock = threading.Lock()
        self._questions: dict[Hashable, _Question] = {}
        self._under_way = False

    async def read(self, what: Hashable, work: Callable[[], bytes]) -> bytes:
        """Return what ``work`` returns; raises what it raises.

        Args:
            what: Of two questions alike that nobody has begun to read, one is read for both.
            work: Reads. Called in another thread.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[bytes] = loop.create_future()
        with self._lock:
            self._questions.setdefault((loop, what), _Question(work, loop)).waiting.append(future)
            begin, self._under_way = not self._under_way, True
        if begin:
            self._thread.submit(self._run)
        return await future

    def close(self) -> None:
        self._thread.shutdown(wait=False)

    def _run(self) -> None:
        while taken := self._take():
            for question in taken:
                question.read()
            for loop in {question.loop for question in taken}:
                with suppress(RuntimeError):  # it is closed: nobody waits any more
                    loop.call_soon_threadsafe(_tell, [one for one in taken if one.loop is loop])

    def _take(self) -> list[_Question]:
        with self._lock:
            first = list(self._questions)[:_MOST_AT_ONCE]
            self._under_way = bool(first)
            return [self._questions.pop(what) for what in first]


def _tell(questions: list[_Question]) -> None:
    for question in questions:
        question.tell()
