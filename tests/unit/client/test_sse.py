"""The event-stream decoder: the format's rules, and independence of how the stream is cut."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aidocks.client.sse import EventDecoder, ServerSentEvent


def decode(chunks: Iterable[bytes]) -> list[ServerSentEvent]:
    decoder = EventDecoder()
    return [event for chunk in chunks for event in decoder.feed(chunk)]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_all_line_endings_mean_the_same(newline: str) -> None:
    text = newline.join(["event: progress", "id: 7", "data: one", "data: two", "", ""])
    # A final carriage return may be half of a pair; the event is complete all the same.
    assert decode([text.encode()]) == [ServerSentEvent("progress", "one\ntwo", "7")]


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (b": comment\n\n", []),
        (b"data\n\n", [ServerSentEvent("message", "", "")]),
        (b"data:\n\n", [ServerSentEvent("message", "", "")]),
        (b"data:x\ndata: x\ndata:  x\n\n", [ServerSentEvent("message", "x\nx\n x", "")]),
        (b"event: a\n\ndata: x\n\n", [ServerSentEvent("message", "x", "")]),
        (
            b"id: 1\ndata: x\n\ndata: y\n\n",
            [ServerSentEvent("message", "x", "1"), ServerSentEvent("message", "y", "1")],
        ),
        (b"id: a\0b\ndata: x\n\n", [ServerSentEvent("message", "x", "")]),
        (b"retry: 1000\nunknown: 1\ndata: x\n\n", [ServerSentEvent("message", "x", "")]),
        (b"data: never ended\n", []),
        (b"\xef\xbb\xbfdata: x\n\n", [ServerSentEvent("message", "x", "")]),
        (b"data: \xff\n\n", [ServerSentEvent("message", "\N{REPLACEMENT CHARACTER}", "")]),
    ],
)
def test_rules_of_the_format(stream: bytes, expected: list[ServerSentEvent]) -> None:
    assert decode([stream]) == expected


characters = st.characters(codec="utf-8", exclude_characters="\r\n")
lines = st.lists(
    st.one_of(
        st.just(""),
        st.builds("{}:{}{}".format, st.sampled_from(["data", "event", "id", "retry", "", "other"]),
                  st.sampled_from(["", " "]), st.text(characters, max_size=8)),
        st.text(characters, max_size=8),
    ),
    max_size=12,
)  # fmt: skip


@given(
    lines=lines,
    ends=st.lists(st.sampled_from(["\n", "\r", "\r\n"]), min_size=12, max_size=12),
    data=st.data(),
)
def test_chunks_do_not_matter(lines: list[str], ends: list[str], data: st.DataObject) -> None:
    stream = "".join(line + end for line, end in zip(lines, ends, strict=False)).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    chunks = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert decode(chunks) == decode([stream])


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=20), st.integers(1, 99)
        )
    )
)
def test_what_is_written_is_read(events: list[tuple[str, int]]) -> None:
    stream = ""
    for text, number in events:
        stream += f"id: {number}\nevent: progress\n"
        stream += "".join(f"data: {line}\n" for line in text.split("\n")) + "\n"
    assert [(event.data, int(event.id)) for event in decode([stream.encode()])] == events
