"""Operations as plans of units: the language in which all work is written, once, for every executor.

An :class:`Operation` turns a spec into a *plan*: a generator that yields :class:`Stage` after :class:`Stage`, each a
tuple of independent :class:`Unit`, receives their results in the same order, and returns the operation's result.
The generator is deterministic and light (it reads headers, never weights); all heavy work is in the units. An
executor journals every finished unit under its content-derived id, so after a crash it runs the same generator again
and answers from the journal what was done before: at-least-once execution, exactly-once effect.

Nothing here knows of Ray, HTTP or jobs.
"""

from __future__ import annotations

import hashlib
import json
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from aidocks.checkpoints.files import OutputFile, state_of
from aidocks.specs.base import OperationResult, Spec

if TYPE_CHECKING:
    from aidocks.models.registry import Registry
    from aidocks.models.resolve import ModelResolver

UnitResultT = TypeVar("UnitResultT", bound=BaseModel)
SpecT = TypeVar("SpecT", bound=Spec)
ResultT = TypeVar("ResultT", bound=OperationResult)


class WorkerCache:
    """What a worker keeps between units (a loaded model, opened files): a small least-recently-used store."""

    def __init__(self, entries: int = 4) -> None:
        self._entries = entries
        self._values: OrderedDict[str, Any] = OrderedDict()
        self._large: set[str] = set()

    def get(self, key: str, make: Callable[[], Any], *, large: bool = False) -> Any:
        """Return the value under ``key``, making (and keeping) it when it is not there.

        Args:
            key: What the value depends on, all of it.
            make: Makes the value.
            large: Of these only one is kept, and it goes before the next one is made: a worker never holds two
                models.
        """
        if key not in self._values:
            for loser in self._large & self._values.keys() if large else ():
                del self._values[loser]
            while len(self._values) >= self._entries:
                self._values.popitem(last=False)
            self._values[key] = make()
            if large:
                self._large = {key}
        self._values.move_to_end(key)
        return self._values[key]


@dataclass(frozen=True)
class UnitContext:
    """What a unit may use of the place where it runs.

    Attributes:
        workspace: The job's directory on storage that all workers share.
        device: A torch device string, such as ``cpu`` or ``cuda:0``.
        threads: Threads that this worker may use for linear algebra.
        cache: Objects kept on this worker between units.
        stopping: Set when the result is no longer wanted: a unit that waits for something else stops it and returns.
    """

    workspace: Path
    device: str = "cpu"
    threads: int = 1
    cache: WorkerCache = field(default_factory=WorkerCache)
    stopping: threading.Event = field(default_factory=threading.Event)

    def keep(self, kind: str, directory: Path, make: Callable[[], Any], *, large: bool = False) -> Any:
        """Return what this worker made of a directory's files before, as long as they are the same files.

        Args:
            kind: What is made, with every choice that it depends on.
            directory: Where the files are. A model of the same name that was made anew is another one.
            make: Makes the value.
            large: As in :meth:`WorkerCache.get`.
        """
        key = f"{kind}:{directory}:{state_of(directory)}:{self.device}"
        return self.cache.get(key, make, large=large)


@dataclass(frozen=True)
class Gang:
    """Processes that run one unit together, all of them at the same time.

    Attributes:
        members: How many.
        checkpoints: Directory of what they can be resumed from, on storage that all of them share.
        cpus: Cores of each.
        gpus: GPUs of each.
        memory: Bytes of each; None where nothing is known.
        spread: Whether they shall be on as many nodes as there are, rather than on as few.
        max_failures: How often in a row they may begin anew from the same checkpoint after one of them has died.
        patience_s: How long they wait for room that a cluster has lost meanwhile.
        fewer: Smaller numbers of members that can go on from the same checkpoints; the largest first.
    """

    members: int
    checkpoints: Path
    cpus: float = 1.0
    gpus: float = 0.0
    memory: int | None = None
    spread: bool = False
    max_failures: int = 3
    patience_s: float = 300.0
    fewer: tuple[int, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of members with which it can run, the largest first."""
        return (self.members, *self.fewer)


class Unit(BaseModel, ABC, Generic[UnitResultT]):
    """One independent, idempotent piece of work: a frozen value that knows how to run itself.

    Fields are the unit's whole input (small, JSON-able; weights are named, not carried). ``run`` may be executed more
    than once and must have the effect of one execution: files are written aside and renamed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    result_type: ClassVar[type[BaseModel]]
    #: Raise when the meaning of the same fields changes, so that old journal entries no longer match.
    version: ClassVar[int] = 1

    @property
    @abstractmethod
    def label(self) -> str:
        """What people read in progress lines, such as ``model.layers.3.mlp.up_proj.weight``."""

    @property
    def weight(self) -> float:
        """Share of the stage's work, in any unit that is the same across the stage (bytes, tokens, flops)."""
        return 1.0

    @property
    def computes(self) -> bool:
        """Whether it needs a worker to itself, with its device and cache.

        What only moves bytes (copies, hashes, small files) does not: in a single process it runs beside other units,
        with the CPU for a device, so that torch need not be imported to find a better one.
        """
        return True

    @property
    def memory(self) -> int | None:
        """Bytes of main memory that its worker must have; None: it makes do with what any worker has."""
        return None

    @property
    def story(self) -> Path | None:
        """File in which it tells how it goes while it runs (``aidocks.telling``); None for a short one."""
        return None

    @property
    def unit_id(self) -> str:
        """Content address: equal for equal work, whatever job, process or machine asks."""
        kind = f"{type(self).__module__}.{type(self).__qualname__}/{type(self).version}"
        body = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(f"{kind}\n{body}".encode()).hexdigest()[:32]

    @abstractmethod
    def run(self, context: UnitContext) -> UnitResultT:
        """Do the work and return its small result."""

    def outputs(self, result: UnitResultT) -> Sequence[OutputFile]:
        """Return the files that ``result`` stands for; a journalled unit runs again when one is missing or differs."""
        return ()


class GangUnit(Unit[UnitResultT]):
    """A unit that several processes run together.

    In one process ``run`` starts them itself. A cluster starts them where it has room, calls :attr:`entry` in each
    and then :meth:`collect`. Both begin them anew when one dies, so whoever runs the unit does not.
    """

    #: Import string of what every member calls: a function of the unit and a reporter (``train.reporter``).
    entry: ClassVar[str]

    @property
    @abstractmethod
    def gang(self) -> Gang:
        """The processes that it needs at the same time."""

    def directory(self, workspace: Path) -> Path:
        """Return where the members leave what they have to say: results, and a log of each."""
        return workspace / "training"

    def failure(self, workspace: Path) -> Path:
        """Return the file of what the members would meet again, were they to begin anew (problem details)."""
        return self.directory(workspace) / "failure.json"

    def outcome(self, workspace: Path) -> Path:
        """Return the file that the first member writes last of all."""
        return self.directory(workspace) / "outcome.json"

    @abstractmethod
    def collect(self, workspace: Path) -> UnitResultT:
        """Return what the members have made, after the last of them has ended.

        Raises:
            AIDocksError: What stopped them.
        """


class WrittenFiles(BaseModel):
    """Files that a unit wrote."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: tuple[OutputFile, ...]


class WritingUnit(Unit[WrittenFiles]):
    """A unit whose result is the files that it wrote."""

    result_type: ClassVar[type[BaseModel]] = WrittenFiles

    def outputs(self, result: WrittenFiles) -> Sequence[OutputFile]:
        return result.files


@dataclass(frozen=True)
class Stage:
    """Independent units that may run at the same time, in any order, anywhere."""

    name: str
    units: tuple[Unit[Any], ...]


#: Yields stages, receives the list of their results (same order as the units), returns the operation's result.
Plan = Generator[Stage, list[Any], ResultT]


@dataclass(frozen=True)
class PlanContext:
    """What a plan may use: the registry, the way from reference to path, and the job's own directory.

    Attributes:
        job_id: Id of the job that this plan works for; outputs carry it, so publication is idempotent.
        workspace: The job's directory; ``workspace / "model"`` is where an operation stages its output.
        checkpoints_dir: The directory of the job's checkpoints, which stays when the job fails or is cancelled.
        datasets_dir: Where the data sets of this installation are; None where there are none.
        result_of: Returns what another job of this installation has returned; None where it has not, or is none.
        remote_code: Models that an admin allows to bring Python code of their own.
        parallelism: Units that can run at the same time. Results must not depend on it.
        say: Records one line for people in the job's events.
    """

    job_id: str
    workspace: Path
    registry: Registry
    resolver: ModelResolver
    cache_dir: Path
    checkpoints_dir: Path
    datasets_dir: Path | None = None
    result_of: Callable[[str], Mapping[str, Any] | None] = lambda _: None
    remote_code: frozenset[str] = frozenset()
    parallelism: int = 1
    say: Callable[[str], None] = lambda _: None


class Operation(ABC, Generic[SpecT, ResultT]):
    """What AIDocks can do to models. Subclasses are stateless; registered in ``aidocks.operations``."""

    spec_type: ClassVar[type[Spec]]
    result_type: ClassVar[type[OperationResult]]
    #: Field of the spec that names the output, to be blamed when the name is taken.
    output_field: ClassVar[str] = "name"

    def output_name(self, spec: SpecT, job_id: str) -> str | None:
        """Return the registry name that the job will create (reserved at submission), or None."""
        return None

    def inputs(self, spec: SpecT) -> dict[str, str]:
        """Return field path -> model reference of every model that the spec names."""
        return {}

    def read_result(self, result: Mapping[str, Any]) -> OperationResult:
        """Return what a job has returned; a newer service may say more than this version knows of."""
        return self.result_type.model_validate(result, extra="ignore")

    def preflight(self, spec: SpecT, context: PlanContext) -> None:
        """Refuse, before any work, what cannot succeed. Reads headers and configs only; must not import torch.

        Raises:
            AIDocksError: Naming the field, the value and what would be right.
        """

    @abstractmethod
    def plan(self, spec: SpecT, context: PlanContext) -> Plan[ResultT]:
        """Return the generator described at the top of this module."""
