"""Following a job's events over connections that may break: where a reader is, how long an outage lasts."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import httpx

from aidocks.client.calls import unreachable
from aidocks.client.problems import error_from_response
from aidocks.client.sse import EventDecoder
from aidocks.errors import ServiceUnreachable
from aidocks.jobs.model import Event, EventType

log = logging.getLogger(__name__)

_TERMINAL = frozenset({EventType.SUCCEEDED, EventType.FAILED, EventType.CANCELLED})
_KNOWN = frozenset(str(kind) for kind in EventType)
#: The service sends a heartbeat every 15 s; silence of this length means that the connection is dead.
SILENCE_S = 45.0
#: Between two connections, when the service closed the first one although the job goes on.
PAUSE_S = 0.5


class EventCursor:
    """A reader's place in a job's history: each event once and in order, over any number of connections.

    Args:
        after: Sequence of the last event that the reader has seen, 0 for none.
    """

    def __init__(self, after: int = 0) -> None:
        self.after = after
        self.ended = False
        self._nothing_more = False
        self._decoder = EventDecoder()

    def connect(self) -> dict[str, str]:
        """Return the headers of the next connection."""
        self._decoder = EventDecoder()
        return {"Accept": "text/event-stream", "Last-Event-ID": str(self.after)}

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """Yield the new events of a chunk. An event type that this version does not know is passed over."""
        for message in self._decoder.feed(chunk):
            if message.event not in _KNOWN:
                continue
            event = Event.model_validate_json(message.data)
            if event.sequence <= self.after:
                continue
            self.after = event.sequence
            self.ended = event.type in _TERMINAL
            yield event
            if self.ended:
                return

    def closed(self, job_is_over: bool) -> float:
        """Note that the service closed the stream, and whether the job was over then.

        A job that was over before a whole connection began has no further events: the reader has seen them.

        Returns:
            Seconds to wait before connecting again.
        """
        self.ended = self.ended or self._nothing_more
        self._nothing_more = job_is_over
        return 0.0 if self.ended or job_is_over else PAUSE_S


class StreamClock:
    """How long a reader of one stream waits: for the next sign of life, and in all.

    Args:
        job_id: For the error message.
        timeout: Seconds in all, None for no limit.
    """

    def __init__(self, job_id: str, timeout: float | None) -> None:
        self._job_id = job_id
        self._timeout = timeout
        self._deadline = None if timeout is None else time.monotonic() + timeout

    def timeouts(self, connect_s: float) -> httpx.Timeout:
        """Return the time limits of the next connection."""
        silence = SILENCE_S
        if self._deadline is not None:
            silence = max(0.01, min(silence, self._deadline - time.monotonic()))
        return httpx.Timeout(connect_s, read=silence)

    def check(self) -> None:
        """Raise TimeoutError when the time is over."""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise TimeoutError(f"Job {self._job_id} is not over after {self._timeout:g} s; it goes on.")


class Outage:
    """Counts the time without a connection while something long is received.

    Args:
        url: The service, for the error message.
        patience_s: Seconds without any answer after which the service counts as gone.
    """

    def __init__(self, url: str, patience_s: float) -> None:
        self._url = url
        self._patience_s = patience_s
        self._delay = 0.1
        self._since: float | None = None

    def over(self) -> None:
        """Note that the service answers."""
        self._since, self._delay = None, 0.1

    def delay(self, error: Exception) -> float:
        """Return the seconds to wait before connecting again.

        Raises:
            ServiceUnreachable: Patience is over.
        """
        now = time.monotonic()
        if self._since is None:
            self._since = now
            log.warning("Lost the connection to %s; what runs there goes on. Connecting again.", self._url)
        if now - self._since + self._delay > self._patience_s:
            raise error if isinstance(error, ServiceUnreachable) else unreachable(self._url, error) from error
        delay, self._delay = self._delay, min(2 * self._delay, 5.0)
        return delay


class StreamRefused(Exception):
    """A stream that was answered with an error that may pass (5xx, 429)."""


def check_stream(response: httpx.Response) -> None:
    """Look at the status of a stream; an unsuccessful response must have been read.

    Raises:
        StreamRefused: The service cannot answer now.
        AIDocksError: It never will.
    """
    if response.is_success:
        return
    error = error_from_response(response)
    if response.status_code >= 500 or response.status_code == 429:
        raise StreamRefused(str(error)) from error
    raise error
