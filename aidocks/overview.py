"""What `GET /status` and `aidocks status` tell: how a service is, and what it does now."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

SupervisorState = Literal["running", "restarting", "superseded", "absent", "unknown"]


class _Part(BaseModel):
    # A newer service may say more.
    model_config = ConfigDict(frozen=True, extra="ignore")


class JobCounts(_Part):
    """How many jobs there are."""

    running: int
    queued: int
    oldest_queued_s: float = Field(description="Seconds for which the oldest queued job has waited.")
    succeeded_today: int = Field(description="Of those that ended in the last 24 hours.")
    failed_today: int
    cancelled_today: int


class WorkerCounts(_Part):
    """The workers of the pool, each of which runs one unit at a time."""

    busy: int
    idle: int
    most: int = Field(description="As many as there may be; they are started when they are needed.")


class Node(_Part):
    """A machine of the cluster that is there now."""

    name: str
    cpus: float = Field(description="As Ray counts them: with `aidocks up`, twice the cores.")
    gpus: float
    memory_bytes: int = Field(description="Main memory that actors can have.")


class Disk(_Part):
    """The file system of the data directory."""

    free_bytes: int
    total_bytes: int


class Overview(_Part):
    """How the service is and what it does. A part that could not be found out in time is null."""

    version: str
    status: Literal["ok", "unavailable"] = Field(description="As of `GET /health`.")
    supervisor: SupervisorState = Field(description="As of `GET /health`.")
    up_since: datetime
    jobs: JobCounts | None = None
    workers: WorkerCounts | None = None
    nodes: tuple[Node, ...] | None = None
    disk: Disk | None = None
