"""A stream of mixed jobs, submitted over HTTP as people do, of which is known what they have to make."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, text

from aidocks.client.http import Client
from aidocks.errors import AIDocksError
from aidocks.jobs.model import Job, Status
from aidocks.jobs.store import JobStore
from aidocks.models.registry import Registry
from aidocks.settings import Settings
from tests.conftest import make_tiny_llama
from tests.support.merge_jobs import make_family, weights

BASES = ("chaos-one", "chaos-two", "chaos-base")
ROWS = [
    {"prompt": f"Once upon a time there were {n} cats.", "completion": f" One of the {n} ran away, and then"}
    for n in range(60)
]
_EXPERTS = [{"source_model": name, "positive_prompts": [name]} for name in BASES[:2]]
_MEASURE = {"chunks": 4, "seqlen": 32}

#: Kind of job: its operation, its request, and the field that names what it makes.
KINDS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "laser": (
        "laser",
        {"base_model_name": "chaos-base", "candidates": 6, "chunks": 8, "seqlen": 32},
        "laser_model_name",
    ),
    "slerp": (
        "merge",
        {
            "merge_method": "slerp",
            "base_model": "chaos-one",
            "models": [{"model": "chaos-two"}],
            "parameters": {"t": 0.3},
            "max_shard_size": "30KB",
        },
        "name",
    ),
    "ties": (
        "merge",
        {
            "merge_method": "ties",
            "base_model": "chaos-one",
            "models": [{"model": "chaos-two", "parameters": {"weight": 0.5, "density": 0.5}}],
            "max_shard_size": "30KB",
        },
        "name",
    ),
    "byo-moe": (
        "byo-moe",
        {
            "base_model": "chaos-one",
            "gate_mode": "random",
            "seed": 3,
            "experts": _EXPERTS,
            "max_shard_size": "60KB",
            "evaluate": False,
        },
        "name",
    ),
    "laser-scan": ("laser-scan", {"model": "chaos-base"}, None),
    "train-llm": (
        "train-llm",
        {
            "base_model": "chaos-train",
            "method": "sft",
            "dataset": ROWS,
            "max_steps": 12,
            "save_steps": 4,
            "per_device_train_batch_size": 2,
            "max_length": 64,
            "merge_adapter": False,
            "evaluate": False,
            "samples": 0,
        },
        "name",
    ),
    "gang": ("gang", {"members": 2, "cpus": 0.5, "steps": 6, "save_steps": 2, "max_failures": 20}, None),
    "trivial": ("trivial", {"units": 10, "seconds": 0.4}, "output"),
}
#: What a result says that differs from run to run.
VOLATILE = (
    "seconds",
    "path",
    "job_id",
    "traces",
    "begun_at",
    "pictures",
    "report",
    "model",
    "cached",
    "table",
)


@dataclass
class Order:
    """One job that somebody wants, and what is known of it from outside.

    Attributes:
        key: Idempotency key under which it is submitted, as often as it takes to get an answer.
        refused: Why it was not accepted.
    """

    kind: str
    key: str
    body: dict[str, Any]
    job_id: str | None = None
    refused: str | None = None
    output: str | None = None
    submissions: int = 0
    ended: bool = False


@dataclass(frozen=True)
class Made:
    """What a job has made: hashes of the weight files, or what stays the same of its result."""

    files: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def prepare(settings: Settings, directory: Path, stories: Path) -> None:
    """Put the models that the jobs need into the registry."""
    registry = Registry(settings.models_dir)
    make_family(directory, *BASES[:2])
    make_tiny_llama(directory / BASES[2], seed=7, hidden_size=96, intermediate_size=128, num_hidden_layers=3)
    for name in BASES:
        registry.import_checkpoint(name, directory / name)
    registry.import_checkpoint("chaos-train", stories)


class Stream:
    """Keeps a number of jobs unfinished at a service, in kinds drawn by chance.

    Args:
        settings: Of the service.
        kinds: Kinds to draw from.
        traces: Directory for what the trivial jobs leave.
        seed: Of the draws.
        environment: In which a process can talk to the service.
        patience_s: How long a submission is tried again.
    """

    def __init__(
        self,
        settings: Settings,
        kinds: tuple[str, ...],
        traces: Path,
        seed: int,
        environment: Mapping[str, str],
        patience_s: float = 120.0,
    ) -> None:
        self._settings = settings
        self._kinds = kinds
        self._traces = traces
        self._random = random.Random(seed)
        self._environment = dict(environment)
        self._patience_s = patience_s
        self.store = JobStore(settings.store_url)
        self._engine = create_engine(
            settings.store_url.replace("postgresql://", "postgresql+psycopg://"), pool_pre_ping=True
        )
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self.orders: list[Order] = []
        self.clients: list[subprocess.Popen[bytes]] = []

    def order(self, kind: str) -> Order:
        """Make up a job of a kind."""
        number = len(self.orders)
        operation, body, output = KINDS[kind]
        order = Order(kind, f"chaos-{kind}-{number}", dict(body))
        if output is not None:
            order.output = order.body[output] = f"made-{number}-{kind}"
        if operation in ("gang", "trivial"):
            directory = self._traces / order.key
            directory.mkdir()
            order.body["traces"] = str(directory)
        self.orders.append(order)
        return order

    def submit(self, order: Order) -> None:
        """Submit over HTTP until there is an answer; a refusal is kept."""
        operation = KINDS[order.kind][0]
        deadline = time.monotonic() + self._patience_s
        with Client(self._settings.service_url, timeout=15, retry_s=self._patience_s) as client:
            while True:
                order.submissions += 1
                try:
                    order.job_id = client.submit(operation, order.body, idempotency_key=order.key).id
                    return
                except AIDocksError as error:
                    unknown = error.code in ("service_unreachable", "internal", "insufficient_disk")
                    if not unknown or time.monotonic() > deadline:
                        order.refused = f"{error.code}: {error.message}"
                        return
                time.sleep(0.2)

    def submit_by_command(self, order: Order) -> subprocess.Popen[bytes]:
        """Have a process submit it and wait for it; whoever kills that one has to ask again under its key."""
        code = (
            "import json, sys; from aidocks.client.http import Client\n"
            "operation, body, key = json.load(sys.stdin)\n"
            "with Client(retry_s=60) as client: client.submit(operation, body, idempotency_key=key).wait()"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps([KINDS[order.kind][0], order.body, order.key]).encode())
        process.stdin.close()
        return process

    def begin(self, unfinished: int) -> None:
        """Keep so many jobs unfinished, until :meth:`end`."""

        def keep_going() -> None:
            while not self._ended.wait(0.1):
                if self.count_open() < unfinished:
                    self.submit(self.order(self._random.choice(self._kinds)))

        self._thread = threading.Thread(target=keep_going, daemon=True)
        self._thread.start()

    def count_open(self) -> int:
        """Return how many orders are not known to have ended."""
        return sum(not self._ended_by_store(order) for order in list(self.orders) if order.refused is None)

    def end(self, deadline_s: float) -> None:
        """Submit no more, and wait until all that were ordered have ended."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(self._patience_s)
        for client in self.clients:
            client.kill()
            client.wait()
        for order in self.orders:
            if order.job_id is None and order.refused is None:
                self.submit(order)
        deadline = time.monotonic() + deadline_s
        while self.count_open() and time.monotonic() < deadline:
            time.sleep(0.1)

    def jobs(self, order: Order) -> list[Job]:
        """Return the jobs of an order, by its key: whoever submitted it may not have lived to know the id."""
        statement = text("select id from jobs where idempotency_key = :key")
        with self._engine.connect() as connection:
            ids = [row.id for row in connection.execute(statement, {"key": order.key})]
        return [self.store.get(job_id) for job_id in ids]

    def close(self) -> None:
        self._engine.dispose()
        self.store.close()

    def _ended_by_store(self, order: Order) -> bool:
        if order.job_id is not None and not order.ended:
            with suppress(Exception):  # the store itself may be what was hit
                order.ended = self.store.get(order.job_id).status.terminal
        return order.ended


def made_by(settings: Settings, job: Job) -> Made:
    """Return what a job that succeeded has made."""
    assert job.status is Status.SUCCEEDED, job.error
    if job.output_name is not None and job.operation != "trivial":
        return Made(files=weights(Registry(settings.models_dir).path(job.output_name)))
    return Made(facts={name: value for name, value in (job.result or {}).items() if name not in VOLATILE})
