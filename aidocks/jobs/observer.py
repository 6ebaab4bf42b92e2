"""What an executor tells of its work to whoever counts and measures: metrics, traces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from aidocks.executor import Outcome
    from aidocks.jobs.model import Job
    from aidocks.plan import Unit


class Observer(Protocol):
    """Called on the executor's event loop: it must neither wait nor raise."""

    def job_began(self, job: Job) -> None:
        """A job was claimed; ``job.attempt`` is above 1 where it is continued."""

    def job_ended(self, job: Job) -> None:
        """A job has come to its end, whatever that was."""

    def unit_ended(self, job: Job, stage: str, unit: Unit[Any], outcome: Outcome) -> None:
        """A unit was run to its end and is in the journal."""

    def worker_lost(self, job: Job, unit: Unit[Any], reason: str) -> None:
        """A worker died while it ran a unit of the job."""

    def told(self, job: Job, unit: Unit[Any], figures: Mapping[str, Any]) -> None:
        """A unit under way told figures, such as ``tokens_per_s`` and ``loss``."""


class Unobserved:
    """Counts nothing."""

    def job_began(self, job: Job) -> None:
        return

    def job_ended(self, job: Job) -> None:
        return

    def unit_ended(self, job: Job, stage: str, unit: Unit[Any], outcome: Outcome) -> None:
        return

    def worker_lost(self, job: Job, unit: Unit[Any], reason: str) -> None:
        return

    def told(self, job: Job, unit: Unit[Any], figures: Mapping[str, Any]) -> None:
        return
