"""Jobs as data: what a job is, which statuses it can have, and what its events say."""

from __future__ import annotations

import time
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from aidocks.jobs.terms import LOCAL


class Status(StrEnum):
    """The public status of a job."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        return self in (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED)


#: Every legal change of status. A running job that is recovered stays running (its ``attempt`` grows); one that met
#: an error which may pass waits again (its ``failures`` grow).
TRANSITIONS: dict[Status, frozenset[Status]] = {
    Status.QUEUED: frozenset({Status.RUNNING, Status.FAILED, Status.CANCELLED}),
    Status.RUNNING: frozenset({Status.QUEUED, Status.SUCCEEDED, Status.FAILED, Status.CANCELLED}),
    Status.SUCCEEDED: frozenset(),
    Status.FAILED: frozenset(),
    Status.CANCELLED: frozenset(),
}

#: Who executes a job: the running service, or the process that submitted it (``--local``).
Place = Literal["service", "local"]
#: Place of the jobs of the service; whose lease its supervisor holds.
SERVICE: Place = "service"


class Progress(BaseModel):
    """How far the present stage is."""

    model_config = ConfigDict(frozen=True)

    stage: str = Field(description="Name of the stage under way.")
    stage_number: int = Field(description="Counts the stages so far, from 1.")
    done: int = Field(description="Units of this stage that are finished.")
    total: int = Field(description="Units of this stage.")
    fraction: float = Field(description="Finished share of the stage's work, 0 to 1, by unit weight.")
    unit: str | None = Field(None, description="What finished last, or what a long unit is doing.")
    units_per_s: float | None = Field(None, description="Finished units per second in this stage.")
    eta_s: float | None = Field(None, description="Expected seconds until the stage ends.")
    elapsed_s: float = Field(0.0, description="Seconds since the stage began.")


class Job(BaseModel):
    """One submitted spec and what became of it."""

    model_config = ConfigDict(frozen=True)

    id: str
    operation: str
    status: Status
    place: Place = "service"
    owner: str = Field(
        LOCAL, description="Id of the API key that submitted it; `local` where none was needed."
    )
    priority: int = Field(0, description="Jobs of a higher priority get the workers first.")
    timeout_s: float | None = Field(
        None, description="Seconds after its start at which it is ended as failed."
    )
    spec: dict[str, Any]
    output_name: str | None = Field(None, description="Registry name that the job creates.")
    progress: Progress | None = None
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = Field(None, description="Problem details (RFC 9457) of a failed job.")
    attempt: int = Field(
        0, description="How often execution was begun; more than 1 after a recovery or another try."
    )
    failures: int = Field(
        0, description="How often it was put back into the queue after an error that may pass."
    )
    retry_at: datetime | None = Field(
        None, description="When a job that was put back is tried again, at the earliest."
    )
    cancel_requested: bool = False
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None

    @property
    def seconds_left(self) -> float | None:
        """Seconds until its time is up, over all attempts, and 0 from then on; None where it may take any time."""
        if self.timeout_s is None or self.started_at is None:
            return None
        return max(0.0, self.started_at.timestamp() + self.timeout_s - time.time())


class EventType(StrEnum):
    """What an event tells. ``data`` of each is described beside it."""

    QUEUED = "queued"  # {}; {asked} where the request came in the words of another interface
    STARTED = "started"  # {attempt, parallelism}
    RECOVERED = "recovered"  # {attempt, units_done}
    MESSAGE = "message"  # {text, ...}: with what it is about, where a unit has told it
    STAGE_STARTED = "stage_started"  # {stage, stage_number, total, already_done}
    UNIT_STARTED = "unit_started"  # {stage, unit_id, label, worker}
    UNIT_FINISHED = "unit_finished"  # {stage, unit_id, label, worker, seconds}
    PROGRESS = "progress"  # a Progress
    METRICS = "metrics"  # {unit_id, step, ...}: figures of a unit under way, such as loss and tokens_per_s
    WORKER_LOST = "worker_lost"  # {worker, unit_id, label, reason}
    RETRYING = "retrying"  # {attempt, reason, wait_s}: the attempt that failed, problem details, seconds until the next
    CANCEL_REQUESTED = "cancel_requested"  # {}
    SUCCEEDED = "succeeded"  # the result
    FAILED = "failed"  # problem details
    CANCELLED = "cancelled"  # {}


class Event(BaseModel):
    """One line of a job's append-only history; ``sequence`` counts from 1 without gaps."""

    model_config = ConfigDict(frozen=True)

    job_id: str
    sequence: int
    time: datetime
    type: EventType
    data: dict[str, Any] = Field(default_factory=dict)
