"""Server-sent events: an incremental decoder of the `text/event-stream` format (WHATWG HTML, section 9.2)."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class ServerSentEvent:
    """One dispatched event.

    Attributes:
        event: The event's type.
        data: Its data lines, joined by newlines.
        id: The last event id that the stream had given when the event was dispatched.
    """

    event: str
    data: str
    id: str


class EventDecoder:
    """Turns the chunks of a stream into events, however the chunks are cut."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8-sig")(errors="replace").decode
        self._line = ""
        self._after_carriage_return = False
        self._event = ""
        self._data: list[str] = []
        self._id = ""

    def feed(self, chunk: bytes) -> Iterator[ServerSentEvent]:
        """Yield the events that ``chunk`` completes; what the stream never ends is never dispatched."""
        for line in self._lines(self._decode(chunk)):
            if line:
                self._field(line)
            elif event := self._dispatch():
                yield event

    def _lines(self, text: str) -> Iterator[str]:
        if self._after_carriage_return and text:
            # A line feed that begins this chunk belongs to the carriage return that ended the one before.
            text = text.removeprefix("\n")
            self._after_carriage_return = False
        self._after_carriage_return = text.endswith("\r") or (self._after_carriage_return and not text)
        *complete, self._line = (self._line + text).replace("\r\n", "\n").replace("\r", "\n").split("\n")
        yield from complete

    def _field(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self._id = value

    def _dispatch(self) -> ServerSentEvent | None:
        event, data = self._event or "message", self._data
        self._event, self._data = "", []
        return ServerSentEvent(event, "\n".join(data), self._id) if data else None
