"""An operation that does nothing useful, observably: each unit leaves a trace of every time that it ran."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from aidocks.checkpoints.files import OutputFile
from aidocks.errors import InvalidSpec
from aidocks.operations import Registration
from aidocks.plan import Operation, Plan, PlanContext, Stage, Unit, UnitContext
from aidocks.specs.base import OperationResult, Spec

REGISTRATION = Registration(
    "trivial",
    "tests.support.trivial_operation:TrivialSpec",
    "tests.support.trivial_operation:Trivial",
    "Square numbers, slowly.",
)


class TrivialSpec(Spec):
    """Square the numbers below ``units``."""

    traces: Path
    units: int = 4
    repeats: int = 1
    seconds: float = 0.0
    fails_at: int | None = None
    crashes: int = 0
    refused: bool = False
    output: str | None = None


class TrivialResult(OperationResult):
    """Their sum."""

    total: int


class Square(BaseModel):
    value: int
    file: OutputFile


class SquareUnit(Unit[Square]):
    """Square one number.

    Attributes:
        crashes: How often the worker dies of it before it succeeds.
    """

    result_type = Square
    number: int
    traces: Path
    seconds: float = 0.0
    fails: bool = False
    crashes: int = 0

    @property
    def label(self) -> str:
        return f"square of {self.number}"

    @property
    def weight(self) -> float:
        return float(self.number + 1)

    def run(self, context: UnitContext) -> Square:
        leave_trace(self.traces, self.number)
        if count_traces(self.traces)[self.number] <= self.crashes:
            os.kill(os.getpid(), signal.SIGKILL)
        deadline = time.monotonic() + self.seconds
        while time.monotonic() < deadline:  # native code does not listen either
            time.sleep(0.01)
        if self.fails:
            raise InvalidSpec(f"{self.number} has no square.", field="units", value=self.number)
        return write_square(context.workspace, self.number)

    def outputs(self, result: Square) -> Sequence[OutputFile]:
        return (result.file,)


class Sum(BaseModel):
    value: int


class SumUnit(Unit[Sum]):
    """Add up squares."""

    result_type = Sum
    values: tuple[int, ...]

    @property
    def label(self) -> str:
        return "sum"

    def run(self, context: UnitContext) -> Sum:
        return Sum(value=sum(self.values))


class Trivial(Operation[TrivialSpec, TrivialResult]):
    """Two stages: all squares, then their sum."""

    spec_type = TrivialSpec
    result_type = TrivialResult

    output_field = "output"

    def output_name(self, spec: TrivialSpec, job_id: str) -> str | None:
        return spec.output

    def preflight(self, spec: TrivialSpec, context: PlanContext) -> None:
        if spec.refused:
            raise InvalidSpec("It was to be refused.", field="refused", value=True)

    def plan(self, spec: TrivialSpec, context: PlanContext) -> Plan[TrivialResult]:
        context.say("beginning")
        units = tuple(
            SquareUnit(
                number=number,
                traces=spec.traces,
                seconds=spec.seconds,
                fails=number == spec.fails_at,
                crashes=spec.crashes if number == 1 else 0,
            )
            for number in range(spec.units)
        )
        squares = yield Stage("squares", units * spec.repeats)
        (total,) = yield Stage("sum", (SumUnit(values=tuple(square.value for square in squares)),))
        return TrivialResult(total=total.value)


def write_square(workspace: Path, number: int) -> Square:
    import hashlib

    data = str(number * number).encode()
    path = workspace / f"{number}.txt"
    aside = path.with_suffix(f".{uuid.uuid4().hex}")
    aside.write_bytes(data)
    aside.replace(path)
    file = OutputFile(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    return Square(value=number * number, file=file)


def leave_trace(traces: Path, number: int) -> None:
    (traces / f"{number}.{uuid.uuid4().hex}").touch()


def count_traces(traces: Path) -> Counter[int]:
    """Return how often the unit of each number was begun."""
    return Counter(int(path.name.partition(".")[0]) for path in traces.iterdir())
