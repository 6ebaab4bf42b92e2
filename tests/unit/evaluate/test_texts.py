from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aidocks.errors import InvalidSpec, PathNotAllowed
from aidocks.evaluate.texts import (
    Halves,
    TextSource,
    choose_chunks,
    count_chunks,
    divide,
    divide_in_four,
    read_records,
    read_text,
    require_chunks,
    resolve_text,
)


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
    with pytest.raises(InvalidSpec, match=r"mine\.txt has changed since the job was submitted") as caught:
        read_text(first, field="experts[0].dataset")
    assert caught.value.field == "experts[0].dataset"
    with pytest.raises(InvalidSpec, match="has changed") as caught:
        divide(first)
    assert caught.value.field is None
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


def test_lines_end_as_anywhere(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_bytes(b"One\r\ntwo\rthree\n")
    assert read_text(resolve_text(str(file), [tmp_path])) == "One\ntwo\nthree\n"


def test_a_bare_file_name_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("One sentence.")
    assert resolve_text("mine.txt", [tmp_path]) == resolve_text("./mine.txt", [tmp_path])
    with pytest.raises(InvalidSpec, match="does not exist"):
        resolve_text("other.jsonl", [tmp_path])
    with pytest.raises(PathNotAllowed):
        resolve_text("mine.txt", [tmp_path / "elsewhere"])


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


def test_the_field_of_the_request_is_blamed(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec) as caught:
        resolve_text(str(tmp_path / "none.jsonl"), [tmp_path], field="experts[1].dataset")
    assert caught.value.field == "experts[1].dataset"


def test_texts_of_a_request_follow_those_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"text": "One."}))
    alone = TextSource(name="experts[0]", records=("Two.", "Three."))
    assert read_records(alone) == ["Two.", "Three."]
    both = resolve_text(str(file), [tmp_path]).model_copy(update={"records": ("Two.",)})
    assert read_text(both) == "One.\n\nTwo."
    assert TextSource.model_validate_json(both.model_dump_json()) == both


@given(lines=st.lists(st.integers(0, 30), min_size=20, max_size=60), data=st.data())
def test_no_record_is_on_both_sides(lines: list[int], data: st.DataObject) -> None:
    records = tuple(f"Record {number} is a line of its own." for number in lines)
    parts = divide(TextSource(name="x", records=records))
    if len(parts) == 1:  # one line is a large part of the whole
        longest = max(lines.count(number) * len(f"Record {number} is a line of its own.") for number in lines)
        assert longest > 0.3 * len("".join(records))
        return
    search, held_out = ([*part.split("\n\n")] for part in parts)
    assert not set(search) & set(held_out)
    assert sorted(search + held_out) == sorted(records)
    assert 0.35 <= len("".join(search)) / len("".join(records)) <= 0.65
    # The order of the records does not matter to where they go.
    other = divide(TextSource(name="y", records=tuple(data.draw(st.permutations(records)))))
    assert [sorted(part.split("\n\n")) for part in other] == [sorted(search), sorted(held_out)]


@pytest.mark.parametrize("records", [("x " * 500,), ("x " * 500, "y"), ("same",) * 40])
def test_what_cannot_be_dealt_stays_whole(records: tuple[str, ...]) -> None:
    assert divide(TextSource(name="x", records=records)) == ("\n\n".join(records),)
    assert len(divide(TextSource(name="prose"))) == 1


@given(lines=st.lists(st.integers(0, 60), min_size=40, max_size=120))
def test_the_halves_are_divided_by_records_again(lines: list[int]) -> None:
    shares = (0.4, 0.5)
    records = tuple(f"Record {number} is a line of its own." for number in lines)
    source = TextSource(name="x", records=records)
    halves, parts = divide(source), divide_in_four(source, shares)
    if len(halves) == 1:
        assert parts == halves
        return
    said = [part.split("\n\n") if part else [] for part in parts]
    assert sum(len(set(part)) for part in said) == len(set(records))
    for half, first, second, share in zip(halves, said[::2], said[1::2], shares, strict=True):
        assert sorted(first + second) == sorted(half.split("\n\n"))
        if first:
            assert abs(len("".join(first)) / len("".join(first + second)) - share) < 0.16
    assert divide_in_four(source, shares) == parts


def test_a_half_of_few_records_is_not_divided() -> None:
    records = ("x " * 500, "y " * 500)
    first, second, third, fourth = divide_in_four(TextSource(name="x", records=records), (0.4, 0.5))
    assert (first, third) == ("", "")
    assert sorted((second, fourth)) == sorted(records)
    assert len(divide_in_four(TextSource(name="prose"), (0.4, 0.5))) == 1


@given(search=st.integers(0, 60), held_out=st.integers(0, 60), seed=st.integers(0, 9))
def test_parts_are_their_splits_whatever_the_seed(search: int, held_out: int, seed: int) -> None:
    available = search + held_out
    taken = choose_chunks(available, "search", search, seed, boundary=search)
    assert taken == list(range(search))
    assert choose_chunks(available, "held_out", held_out, seed, boundary=search) == list(
        range(search, available)
    )
    with pytest.raises(InvalidSpec, match=f"records holds {held_out} whole chunks"):
        choose_chunks(available, "held_out", held_out + 1, seed, boundary=search)


def test_chunks_are_counted_as_a_loaded_model_has_them(tmp_path: Path, tiny_llama: Any) -> None:
    from aidocks.evaluate.causal_lm import load

    path = tiny_llama(tmp_path / "model")
    model = load(path, None, "cpu")
    records = tuple(f"Clause {i}: the licensor grants {i} rights to everybody who asks." for i in range(50))
    for text in (TextSource(name="clauses", records=records), TextSource(name="prose")):
        halves = count_chunks(path, text, 32)
        assert halves is not None
        for split, count in zip(("search", "held_out"), halves, strict=True):
            assert len(model.chunks(text, split, 32, count).positions) == count  # type: ignore[arg-type]
            with pytest.raises(InvalidSpec, match="are asked for"):
                model.chunks(text, split, 32, count + 1)  # type: ignore[arg-type]
            with pytest.raises(InvalidSpec, match="are asked for"):
                require_chunks(path, text, split, count + 1, 32, seed=0)  # type: ignore[arg-type]
            require_chunks(path, text, split, count, 32, seed=3)  # type: ignore[arg-type]
        few = count_chunks(path, text, 32, at_most=3)
        assert few is not None
        assert all(3 <= some <= count for some, count in zip(few, halves, strict=True))


def test_counting_ignores_what_other_tools_leave_in_a_tokenizer(tmp_path: Path, tiny_llama: Any) -> None:
    from tokenizers import Tokenizer

    path = tiny_llama(tmp_path / "model")
    before = count_chunks(path, TextSource(name="prose"), 64)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.enable_truncation(100)
    tokenizer.enable_padding(pad_token="<pad>", pad_id=2)
    tokenizer.save(str(path / "tokenizer.json"))
    assert count_chunks(path, TextSource(name="prose"), 64) == before
    (path / "tokenizer.json").unlink()
    assert count_chunks(path, TextSource(name="prose"), 64) is None
    assert isinstance(before, Halves)
