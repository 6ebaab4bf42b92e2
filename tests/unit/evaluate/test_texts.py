from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aidocks.errors import InvalidSpec, PathNotAllowed
from aidocks.evaluate.texts import TextSource, choose_chunks, read_text, resolve_text


def test_the_shipped_prose_is_long_and_has_its_sources_beside_it() -> None:
    text = read_text(resolve_text("prose", ()))
    assert 60_000 < len(text) < 150_000
    assert "Alice" in text
    assert TextSource.model_validate("prose") == resolve_text("prose", ())


def test_a_users_text_is_addressed_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("One sentence.")
    first = resolve_text(str(file), [tmp_path])
    file.write_text("Another sentence.")
    second = resolve_text(str(file), [tmp_path])
    assert read_text(second) == "Another sentence."
    assert first.sha256 != second.sha256


def test_records_are_joined(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(json.dumps({"text": t, "source": "x"}) for t in ("One.", "Two.")) + "\n\n")
    assert read_text(resolve_text(str(file), [tmp_path])) == "One.\n\nTwo."


@pytest.mark.parametrize("line", ["{}", "[1]", '{"text": 3}', "nonsense", '"text"'])
def test_a_record_without_text_names_its_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"text": "One."}\n' + line)
    with pytest.raises(InvalidSpec, match=r"Line 2 of mine\.jsonl") as caught:
        resolve_text(str(file), [tmp_path])
    assert caught.value.field == "text"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(InvalidSpec) as caught:
        resolve_text("poetry", ())
    assert "'poetry'" in str(caught.value)
    assert "prose" in str(caught.value.hint)


def test_files_outside_the_roots_are_refused(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside.txt"
    root.mkdir()
    outside.write_text("secret")
    (root / "link.txt").symlink_to(outside)
    for reference in (
        str(outside),
        str(root / ".." / "outside.txt"),
        str(root / "link.txt"),
        f"{root}/a\0b.txt",
    ):
        with pytest.raises(PathNotAllowed):
            resolve_text(reference, [root])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x", "neither"),
        ("a.txt", None, "not exist"),
        ("a.txt", b" \n", "empty"),
        ("a.txt", b"\xff", "read"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidSpec, match=message):
        resolve_text(str(tmp_path / name), [tmp_path])


@given(available=st.integers(4, 400), seed=st.integers(0, 9), data=st.data())
def test_splits_are_disjoint_deterministic_and_nested(available: int, seed: int, data: st.DataObject) -> None:
    chunks = data.draw(st.integers(2, available // 2))
    search = choose_chunks(available, "search", chunks, seed)
    held_out = choose_chunks(available, "held_out", chunks, seed)
    assert len(search) == len(held_out) == chunks
    assert not set(search) & set(held_out)
    assert search == sorted(search) == choose_chunks(available, "search", chunks, seed)
    assert 0 <= min(search + held_out) <= max(search + held_out) < available
    assert set(choose_chunks(available, "search", chunks - 1, seed)) <= set(search)
    # Disjoint whatever the two numbers of chunks are.
    assert not set(choose_chunks(available, "search", available // 2, seed)) & set(held_out)


def test_too_many_chunks_say_how_many_there_are() -> None:
    with pytest.raises(InvalidSpec, match="7 whole chunks") as caught:
        choose_chunks(7, "search", 4)
    assert caught.value.field == "chunks"
    assert "at most 3" in str(caught.value.hint)
