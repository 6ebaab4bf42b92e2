"""A job's events as a stream (server-sent events, WHATWG HTML section 9.2), read from the store.

The stream holds no state of its own: the id of an event is its sequence in the store, so a reader that comes
back with ``Last-Event-ID``, to this process or to another after a crash, continues exactly where it was.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from aidocks.jobs.model import Event, Status
from aidocks.jobs.store import JobStore

HEARTBEAT_S = 15.0
POLL_S = 0.2
PAGE = 500
#: Streams at the same time. Each occupies one of the requests that a replica handles at once, and the others
#: must get through; a reader that is turned away can ask for pages of events instead.
MAX_STREAMS = 64
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

_TERMINAL = frozenset(status.value for status in Status if status.terminal)


async def event_stream(
    store: JobStore, job_id: str, after: int, *, heartbeat_s: float = HEARTBEAT_S, poll_s: float = POLL_S
) -> AsyncIterator[str]:
    """Yield the events of a job whose sequence is greater than ``after``, as they come, to the last.

    Args:
        store: Where they are.
        job_id: Of an existing job.
        after: Sequence of the last event that the reader has.
        heartbeat_s: Seconds of silence after which a comment is sent, so that dead connections are noticed.
        poll_s: Seconds between two looks at the store.
    """
    yield "retry: 1000\n\n"
    over = (await asyncio.to_thread(store.get, job_id)).status.terminal
    spoken = time.monotonic()
    while True:
        events = await asyncio.to_thread(store.events, job_id, after, PAGE)
        for event in events:
            yield frame(event)
            after = event.sequence
            if event.type.value in _TERMINAL:
                return
        if events:
            spoken = time.monotonic()
            continue
        # The job was over before the store was asked: whatever it had to tell is in the reader's hands.
        if over:
            return
        if time.monotonic() - spoken >= heartbeat_s:
            yield ": still here\n\n"
            spoken = time.monotonic()
            over = (await asyncio.to_thread(store.get, job_id)).status.terminal
        await asyncio.sleep(poll_s)


def frame(event: Event) -> str:
    """Return an event as the stream carries it."""
    return f"id: {event.sequence}\nevent: {event.type.value}\ndata: {event.model_dump_json()}\n\n"
