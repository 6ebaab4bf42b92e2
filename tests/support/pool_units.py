"""Units that ask much of a pool: one keeps the interpreter to itself, one is known to need memory."""

from __future__ import annotations

import time
from pathlib import Path

from pydantic import BaseModel

from aidocks.plan import Unit, UnitContext


class Done(BaseModel):
    threads: int


class HoldInterpreter(Unit[Done]):
    """Native code that lets no other thread of the worker run for a while."""

    result_type = Done
    seconds: float

    @property
    def label(self) -> str:
        return "a long sum"

    def run(self, context: UnitContext) -> Done:
        begin = time.perf_counter()
        sum(range(5_000_000))
        a_second = 5_000_000 / (time.perf_counter() - begin)
        sum(range(int(self.seconds * a_second)))
        return Done(threads=context.threads)


class Large(Unit[Done]):
    """Says that it needs memory, and leaves a file that is there while it runs."""

    result_type = Done
    number: int
    bytes: int
    traces: Path

    @property
    def label(self) -> str:
        return f"large {self.number}"

    @property
    def memory(self) -> int | None:
        return self.bytes

    def run(self, context: UnitContext) -> Done:
        mine = self.traces / f"large-{self.number}"
        mine.touch()
        assert len(list(self.traces.glob("large-*"))) == 1, "two of these at once"
        time.sleep(0.2)
        mine.unlink()
        return Done(threads=context.threads)
