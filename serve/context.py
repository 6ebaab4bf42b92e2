"""What the routes work with: one object for the application, handed to each route that asks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Path, Request

from aidocks.access.audit import AuditLog
from aidocks.access.store import KeyStore
from aidocks.datasets.parts import PartedUploads
from aidocks.datasets.store import DatasetStore
from aidocks.jobs.database import Database
from aidocks.jobs.store import JobStore
from aidocks.models.registry import Registry
from aidocks.models.resolve import ModelResolver
from aidocks.settings import Settings
from serve.readiness import Readiness
from serve.reads import Reads
from serve.retrieval.deployment import ComputeLink
from serve.retrieval.lookup import Lookup
from serve.retrieval.waiting import Waiting
from serve.supervision import SupervisorLink
from serve.trail import Trail


@dataclass
class Context:
    """The application's state.

    Attributes:
        streams: Event streams that are open now.
    """

    settings: Settings
    store: JobStore
    registry: Registry
    supervisor: SupervisorLink
    compute: ComputeLink
    keys: KeyStore = field(init=False)
    audit: AuditLog = field(init=False)
    trail: Trail = field(init=False)
    datasets: DatasetStore = field(init=False)
    uploads: PartedUploads = field(init=False)
    readiness: Readiness = field(init=False)
    retrievers: Lookup = field(init=False)
    waiting: Waiting = field(init=False)
    reads: Reads = field(default_factory=Reads)
    streams: int = 0

    def __post_init__(self) -> None:
        self._database = Database(self.settings.store_url)
        self.keys = KeyStore(self._database)
        self.audit = AuditLog(self._database)
        self.trail = Trail(self.audit, self.keys, asks_for_keys=not self.settings.open_to_all)
        self.datasets = DatasetStore.of(self.settings)
        self.uploads = PartedUploads(self.datasets)
        self.readiness = Readiness(self.store, self.supervisor)
        resolver = ModelResolver(self.settings.models_dir, self.settings.allowed_roots)
        self.retrievers = Lookup(resolver, self.settings.remote_code_models)
        self.waiting = Waiting(self.compute.compute, lanes=self.settings.serving_replicas)

    def close(self) -> None:
        self.reads.close()
        self.store.close()
        self._database.close()


async def _context(request: Request) -> Context:
    return request.app.state.context  # type: ignore[no-any-return]


Here = Annotated[Context, Depends(_context)]

#: Printable ASCII; what is not cannot be an id, and some databases do not even take the question.
ID_PATTERN = r"^[!-~]{1,64}$"
JobId = Annotated[str, Path(description="Id of a job.", pattern=ID_PATTERN)]
Name = Annotated[
    str, Path(description="Name of a model in the registry.", examples=["smollm2-135m-instruct"])
]


def problems(*statuses: tuple[int, str]) -> dict[int | str, dict[str, Any]]:
    """Return the documentation of answers that are problem details."""
    return {status: problem_response(description) for status, description in statuses}


def problem_response(description: str) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/Problem"}
    return {"description": description, "content": {"application/problem+json": {"schema": schema}}}
