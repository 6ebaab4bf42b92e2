"""The events of a training in the words of OpenAI's API: messages, and points of its curves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aidocks.client.wording import sentence
from aidocks.jobs.model import Event, EventType
from aidocks.jobs.store import JobStore
from serve.routes.openai.ids import event_id, tuning_id

_PAGE = 500
#: Their name of a figure -> ours.
CURVES = {
    "train_loss": "loss",
    "train_mean_token_accuracy": "mean_token_accuracy",
    "valid_loss": "eval_loss",
    "valid_mean_token_accuracy": "eval_mean_token_accuracy",
}
_LEVELS = {
    EventType.FAILED: "error",
    EventType.WORKER_LOST: "warn",
    EventType.RECOVERED: "warn",
    EventType.RETRYING: "warn",
}


def event_object(event: Event, *, goes_on: bool = False) -> dict[str, Any] | None:
    """Return an event as they call it, None for what is no news to a reader.

    Args:
        event: Of a training's job.
        goes_on: Whether that job went on with another one.
    """
    resumed = goes_on and event.type is EventType.QUEUED
    message = "The job goes on from its last checkpoint" if resumed else _message(event)
    if message is None:
        return None
    is_point = event.type is EventType.METRICS
    return {
        "object": "fine_tuning.job.event",
        "id": event_id(event.job_id, event.sequence),
        "created_at": int(event.time.timestamp()),
        "level": _LEVELS.get(event.type, "info"),
        "message": message,
        "type": "metrics" if is_point else "message",
        "data": figures(event.data) if is_point else {},
    }


def figures(point: dict[str, Any]) -> dict[str, Any]:
    """Return a point of the curves under their names, with all that is known beside."""
    known = {**point, **(point.get("further") or {})}
    rest = {name: value for name, value in known.items() if name not in ("further", "unit_id")}
    named = {theirs: known[ours] for theirs, ours in CURVES.items() if ours in known}
    return {name: value for name, value in rest.items() if name not in CURVES.values()} | named


def points(store: JobStore, job_id: str) -> Iterator[dict[str, Any]]:
    """Yield the points of a job's curves, oldest first."""
    after = 0
    while found := store.events(job_id, after, _PAGE):
        yield from (figures(event.data) for event in found if event.type is EventType.METRICS)
        after = found[-1].sequence


def newest(
    store: JobStore, job_id: str, before: int | None, count: int, *, goes_on: bool
) -> list[dict[str, Any]]:
    """Return events of a job as they call them, newest first, from the one before a sequence on."""
    end = store.last_sequence(job_id) + 1 if before is None else before
    told: list[dict[str, Any]] = []
    while end > 1 and len(told) < count:
        begin = max(0, end - 1 - _PAGE)
        found = store.events(job_id, begin, end - 1 - begin)
        objects = (event_object(event, goes_on=goes_on) for event in reversed(found))
        told += [item for item in objects if item is not None]
        end = begin + 1
    return told[:count]


def _message(event: Event) -> str | None:
    data = event.data
    match event.type:
        case EventType.QUEUED:
            return f"Created fine-tuning job: {tuning_id(event.job_id)}"
        case EventType.STARTED:
            return "Fine-tuning job started"
        case EventType.STAGE_STARTED:
            return f"Stage {data.get('stage_number')}: {data.get('stage')}"
        case EventType.METRICS:
            shown = {"training loss": data.get("loss"), "validation loss": data.get("eval_loss")}
            told = [f"{name}={value:.4g}" for name, value in shown.items() if isinstance(value, float | int)]
            return f"Step {data.get('step')}: {', '.join(told) or 'metrics'}"
        case EventType.SUCCEEDED:
            return "The job has successfully completed"
        case EventType.FAILED:
            return f"The job failed: {data.get('detail') or data.get('title')}"
        case EventType.CANCELLED:
            return "The job was cancelled"
        case _:
            return sentence(event)
