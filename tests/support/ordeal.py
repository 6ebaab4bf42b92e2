"""A service of several nodes under a stream of jobs and a storm of faults, from its start to the verdict."""

from __future__ import annotations

import bisect
import math
import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from aidocks import operations
from aidocks.jobs.model import Event, EventType, Status
from aidocks.jobs.store import JobStore
from aidocks.settings import Settings
from cluster.bringup import start_service, stop_service
from cluster.instance import read_instance
from tests.conftest import free_port, service_environment
from tests.support import probe
from tests.support.faults import FAULTS, Scene, Struck, Weather, void
from tests.support.gang_operation import REGISTRATION as GANG
from tests.support.invariants import violations
from tests.support.nodes import Nodes
from tests.support.orders import Made, Stream, made_by, prepare
from tests.support.private_postgres import find_programs, private_postgres
from tests.support.trivial_operation import REGISTRATION as TRIVIAL

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "tests" / "support" / "site"
#: Seconds for one job of each kind to end, on a busy machine.
JOB_S = 60.0


@dataclass(frozen=True)
class Ordeal:
    """What is to be endured.

    Attributes:
        cpus: Of each node, whatever the machine has.
        unfinished: Jobs that are kept unfinished.
        disk_mb: Size of the data directory's own disk; None: it has none, or cannot have one.
        postgres: Whether the job store is a PostgreSQL server, of which connections can be broken.
        together: Share of the faults that the next one does not wait for.
    """

    seed: int
    faults: int
    kinds: tuple[str, ...]
    names: tuple[str, ...] = tuple(FAULTS)
    nodes: int = 2
    cpus: int = 2
    unfinished: int = 3
    disk_mb: int | None = None
    postgres: bool = False
    together: float = 0.25


@dataclass(frozen=True)
class Verdict:
    """What became of it."""

    ordeal: Ordeal
    seconds: float
    struck: list[Struck]
    statuses: dict[str, int]
    failures: list[str]
    violations: list[str]
    answers: list[probe.Answer]

    @property
    def availability(self) -> float:
        """Share of the requests that were answered, or told to come again."""
        return probe.share_good(self.answers)

    def by_fault(self) -> dict[str, list[probe.Answer]]:
        """Return the requests by the fault that had fallen last when they were made; before any: ``""``."""
        found: dict[str, list[probe.Answer]] = {}
        falls = sorted((struck.time, struck.fault) for struck in self.struck)
        for answer in self.answers:
            last = bisect.bisect(falls, answer.time, key=lambda fall: fall[0]) - 1
            found.setdefault(falls[last][1] if last >= 0 else "", []).append(answer)
        return found

    def recoveries(self, fault: str) -> list[float]:
        """Return the seconds until work went on, of faults of a kind that no other has disturbed."""
        return [s.recovered for s in self.struck if s.fault == fault and s.recovered is not None and s.alone]

    @property
    def unrecovered(self) -> list[Struck]:
        """Faults after which work that they interrupted was not seen to go on."""
        return [struck for struck in self.struck if struck.recovered == math.inf]


def endure(ordeal: Ordeal, directory: Path, stories: Path, tell: Callable[[str], None] = void) -> Verdict:
    """Run one ordeal in a directory of its own."""
    begin = time.monotonic()
    with ExitStack() as stack:
        settings = stack.enter_context(_installation(ordeal, directory))
        nodes = Nodes(settings, cpus=ordeal.cpus, logs=directory / "logs")
        stack.callback(nodes.close)
        prepare(nodes.settings, directory / "sources", stories)
        nodes.start(ordeal.nodes)
        tell(f"{ordeal.nodes} nodes at {nodes.settings.service_url}")
        traces = directory / "traces"
        traces.mkdir()
        environment = service_environment(nodes.settings)
        environment["PYTHONPATH"] = os.pathsep.join([str(SITE), str(ROOT)])
        stream = Stream(nodes.settings, ordeal.kinds, traces, ordeal.seed, environment)
        stack.callback(stream.close)
        expected = _without_faults(nodes.settings, stream, ordeal.kinds)
        tell(f"without faults: {', '.join(expected)} in {time.monotonic() - begin:.0f} s")
        answers = stack.enter_context(probe.probing(nodes.settings.service_url, directory / "answers.jsonl"))
        scene = Scene(nodes, stream, random.Random(ordeal.seed))
        scene.ballast = settings.home / "ballast" if os.path.ismount(settings.home) else None
        if ordeal.postgres:
            scene.store_fault = lambda: _kill_backends(scene.random)
        stream.begin(ordeal.unfinished)
        weather = Weather(scene, _possible(ordeal, scene), tell)
        weather.storm(ordeal.faults, ordeal.together)
        ended = time.time()
        stream.end(JOB_S * max(1, ordeal.unfinished) * 2)
        tell(f"all jobs have ended {time.time() - ended:.1f} s after the last fault")
        jobs = [job for order in stream.orders for job in stream.jobs(order)]
        return Verdict(
            ordeal,
            round(time.monotonic() - begin, 1),
            weather.struck,
            dict(Counter(job.status.value for job in jobs)),
            [f"{j.operation}: {j.error['detail']}" for j in jobs if j.status is Status.FAILED and j.error],
            violations(nodes, stream, expected),
            probe.read(answers),
        )


def kill_heads(times: int, directory: Path, tell: Callable[[str], None] = void) -> list[float]:
    """Kill everything but the data directory, start it again, and return how long work stood still each time.

    From the kill to the first unit that begins afterwards, in seconds; the service is started at once.
    """
    found = []
    ordeal = Ordeal(seed=0, faults=0, kinds=("trivial",), nodes=1)
    with ExitStack() as stack:
        settings = stack.enter_context(_installation(ordeal, directory))
        stack.callback(stop_service, settings)
        start_service(settings)
        traces = directory / "traces"
        traces.mkdir()
        stream = Stream(settings, ordeal.kinds, traces, 0, {})
        stack.callback(stream.close)
        for _ in range(times):
            order = stream.order("trivial")
            order.body |= {"units": 60, "seconds": 0.5}
            stream.submit(order)
            (job,) = stream.jobs(order)
            await_event(stream.store, job.id, EventType.UNIT_FINISHED)
            instance = read_instance(settings)
            assert instance is not None
            assert instance.pid is not None
            killed = time.time()
            head = psutil.Process(instance.pid)
            head.kill()
            head.wait()  # while it is there, and the proxy answers, nothing seems to be amiss
            start_service(settings)
            recovered = await_event(stream.store, job.id, EventType.RECOVERED)
            again = await_event(stream.store, job.id, EventType.UNIT_STARTED, recovered.sequence)
            found.append(round(again.time.timestamp() - killed, 2))
            tell(f"kill head: work again after {found[-1]} s")
            stream.store.request_cancel(job.id)
            await_event(stream.store, job.id, EventType.CANCELLED)
    return found


def await_event(store: JobStore, job_id: str, type: EventType, after: int = 0) -> Event:
    """Return the first event of a kind."""
    deadline = time.monotonic() + JOB_S
    while time.monotonic() < deadline:
        for event in store.events(job_id, after=after, limit=10_000):
            if event.type is type:
                return event
        time.sleep(0.02)
    raise AssertionError(f"waited in vain for {type} of {job_id}")


def _without_faults(settings: Settings, stream: Stream, kinds: tuple[str, ...]) -> dict[str, Made]:
    """Run one job of each kind while nothing happens to the service."""
    orders = [stream.order(kind) for kind in kinds]
    for order in orders:
        stream.submit(order)
    deadline = time.monotonic() + JOB_S * len(kinds)
    while stream.count_open() and time.monotonic() < deadline:
        time.sleep(0.1)
    return {order.kind: made_by(settings, stream.jobs(order)[0]) for order in orders}


def _possible(ordeal: Ordeal, scene: Scene) -> tuple[str, ...]:
    missing = {"full disk"} if scene.ballast is None else set()
    if scene.store_fault is None:
        missing.add("broken store")
    return tuple(name for name in ordeal.names if name not in missing)


@contextmanager
def _installation(ordeal: Ordeal, directory: Path) -> Iterator[Settings]:
    """Make the data directory and the job store, and let this process and the service know the trivial jobs."""
    home = directory / "home"
    home.mkdir(parents=True)
    known, path = operations.OPERATIONS, os.environ.get("PYTHONPATH")
    with ExitStack() as stack:
        stack.callback(setattr, operations, "OPERATIONS", known)
        operations.OPERATIONS = (*known, TRIVIAL, GANG)
        stack.callback(_restore, "PYTHONPATH", path)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SITE), path]))
        if ordeal.disk_mb is not None and _mount(home, ordeal.disk_mb):
            stack.callback(subprocess.run, ["umount", "--lazy", str(home)], check=False)
        url = None
        if ordeal.postgres:
            programs = find_programs()
            assert programs is not None, "PostgreSQL's programs are not installed"
            url = stack.enter_context(private_postgres(programs))
        yield Settings(
            home=home,
            port=free_port(),
            # As many as there is room for: on every node there is something to lose.
            workers=ordeal.nodes * ordeal.cpus,
            database_url=url,
            requests_per_minute=0,
            worker_silence_s=8,
        )


def _mount(home: Path, megabytes: int) -> bool:
    """Give the data directory a disk of its own, where that is allowed."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(home)]
    return os.getuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _kill_backends(chance: random.Random) -> str:
    """End one of PostgreSQL's connections hard: its server then breaks all of them, and recovers."""
    backends = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith("postgres: aidocks postgres"):
                backends.append(process)
    if not backends:
        return "nobody was connected"
    victim = chance.choice(backends)
    victim.kill()
    return f"connection of process {victim.pid}"
