"""How Ray says that a worker has died, and what people read of it."""

from __future__ import annotations

from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ActorUnschedulableError,
    NodeDiedError,
    OutOfMemoryError,
    RayError,
    WorkerCrashedError,
)

#: "Unavailable" may come back, but its unit runs again elsewhere by then.
DEATHS = (
    ActorDiedError,
    ActorUnavailableError,
    ActorUnschedulableError,
    NodeDiedError,
    OutOfMemoryError,
    WorkerCrashedError,
)
#: How Ray begins what it says of a worker that its memory monitor has killed.
_MONITOR = ("low on memory", "running low on memory", "memory usage threshold", "OutOfMemory")


def reason(error: RayError) -> str:
    """Say in a few lines why a worker has died; what is known to be a lack of memory is called that."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines)[:500] or type(error).__name__
    if isinstance(error, OutOfMemoryError) or any(words in text for words in _MONITOR):
        return f"Its node ran out of memory. {text}"
    return text
