from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aidocks.errors import InvalidSpec, PathNotAllowed
from aidocks.evaluate.questions import Message, Preference, Question, RecordSet, read_set, resolve_set
from aidocks.evaluate.texts import TextSource

SAID = [{"role": "user", "content": "Hello?"}]


def read(directory: Path, *records: Any) -> RecordSet:
    file = directory / "mine.jsonl"
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n\n")
    return read_set(resolve_set(str(file), [directory], field="objective"))


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {"query": "One and one is", "choices": ["two", "three"], "gold": 1},
            Question("One and one is", ("two", "three"), 1),
        ),
        ({"prompt": "So", "choices": ["a", "b"], "gold": 0, "x": 1}, Question("So", ("a", "b"), 0)),
        (
            {"question": "Who?", "choices": ["I", "you"], "gold": 0, "subject": "people"},
            Question("Question: Who?\nAnswer:", ("I", "you"), 0),
        ),
        (
            {"question": "Who?", "best_answer": "I", "correct": ["I"], "incorrect": ["you", "they"]},
            Question("Question: Who?\nAnswer:", ("I", "you", "they"), 0),
        ),
        ({"context": "To be or not to", "continuation": "be"}, Question("To be or not to", ("be",), 0)),
        (
            {"prompt": "Rome is in", "target_true": "Italy", "target_new": "Chad", "case_id": 3},
            Question("Rome is in", ("Italy", "Chad"), 0),
        ),
        ({"prompt": "Wii is made by", "attribute": "Nintendo"}, Question("Wii is made by", ("Nintendo",), 0)),
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "No"}, Preference("Hi", "Hello", "No")),
        (
            {"prompt": SAID, "chosen": [{"role": "assistant", "content": "Yes"}], "rejected": "No"},
            Preference((Message("user", "Hello?"),), (Message("assistant", "Yes"),), "No"),
        ),
        (
            {
                "prompt": "Hello?",
                "chosen": [*SAID, {"role": "assistant", "content": "Yes"}],
                "rejected": [*SAID, {"role": "assistant", "content": "No"}],
            },
            Preference(
                (Message("user", "Hello?"),), (Message("assistant", "Yes"),), (Message("assistant", "No"),)
            ),
        ),
        (
            {
                "prompt": "Hello?",
                "chosen": [{"role": "assistant", "content": "Yes"}],
                "rejected": [{"role": "assistant", "content": "No"}],
            },
            Preference(
                (Message("user", "Hello?"),), (Message("assistant", "Yes"),), (Message("assistant", "No"),)
            ),
        ),
    ],
)
def test_the_usual_forms_are_known(tmp_path: Path, record: dict[str, Any], expected: object) -> None:
    found = read(tmp_path, record, record)
    assert found.records == (expected, expected)
    assert found.are_preferences == isinstance(expected, Preference)


GOOD = {"query": "One", "choices": ["a", "b"], "gold": 0}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "Expecting value"),
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "does not read as a record"),
        ({"query": "One", "choices": ["a"], "gold": 0}, "`choices`"),
        ({"query": "One", "choices": "ab", "gold": 0}, "`choices`"),
        ({"query": "One", "choices": ["a", ""], "gold": 0}, "`choices`"),
        ({"query": "One", "choices": ["a", "b"], "gold": 2}, "`gold`"),
        ({"query": "One", "choices": ["a", "b"], "gold": True}, "`gold`"),
        ({"query": "One", "choices": ["a", "b", " b"], "gold": 1}, "the right answer 'b' is there twice"),
        ({"query": "  ", "choices": ["a", "b"], "gold": 0}, "`query`"),
        ({"choices": ["a", "b"], "gold": 0}, "'question' is missing"),
        ({"prompt": "Of another form", "attribute": "x"}, "'choices' is missing"),
    ],
)
def test_a_record_that_cannot_be_read_names_its_line(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(InvalidSpec, match=r"Line 2 of mine\.jsonl") as caught:
        read(tmp_path, GOOD, line)
    assert message in str(caught.value)
    assert caught.value.field == "objective"
    assert "query" in str(caught.value.hint)


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"text": "A text is no question."},
        {"question": "Who?", "best_answer": "I", "incorrect": []},
        {"prompt": [], "chosen": "a", "rejected": "b"},
        {"prompt": ["Hello?"], "chosen": "a", "rejected": "b"},
        {"prompt": SAID, "chosen": [{"role": "assistant"}], "rejected": "b"},
        {"prompt": "Hi", "chosen": None, "rejected": "b"},
        {"question": "Who?", "best_answer": "I", "incorrect": ["you", "I"]},
        {"prompt": "Rome is in", "target_true": "Italy", "target_new": " Italy"},
    ],
)
def test_other_forms_are_refused(tmp_path: Path, record: dict[str, Any]) -> None:
    with pytest.raises(InvalidSpec, match="Line 1 of"):
        read(tmp_path, record)


def test_equal_wrong_answers_do_no_harm(tmp_path: Path) -> None:
    record = {"query": "More is", "choices": ["less", "not less", "less"], "gold": 1}
    assert len(read(tmp_path, record).records) == 1


def test_a_set_that_changed_after_it_was_resolved_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(GOOD))
    source = resolve_set(str(file), [tmp_path], field="objective")
    changed = source.model_copy(update={"sha256": "0" * 64})
    with pytest.raises(InvalidSpec, match=r"mine\.jsonl has changed since the job was submitted") as caught:
        read_set(changed)
    assert caught.value.field is None
    # Read a moment ago and still known by its hash: what it was is what it is.
    file.write_text(json.dumps(GOOD | {"gold": 1}))
    assert read_set(source).records == (Question("One", ("a", "b"), 0),)
    unhashed = TextSource(name="mine.jsonl", path=file)
    assert read_set(unhashed).records == (Question("One", ("a", "b"), 1),)
    file.write_text(json.dumps(GOOD))
    assert read_set(unhashed).records == (Question("One", ("a", "b"), 0),)


def test_a_set_is_parsed_once_where_several_ask_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "once.jsonl"
    file.write_text(json.dumps(GOOD | {"query": "Of this test alone"}))
    parsed: list[str] = []
    loads = json.loads
    monkeypatch.setattr("json.loads", lambda text: parsed.append(text) or loads(text))
    source = resolve_set(str(file), [tmp_path], field="objective")
    assert read_set(source) == read_set(source, field="guards[0]")
    assert len(parsed) == 1


def test_a_set_that_is_too_large_is_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "large.jsonl"
    with file.open("wb") as sparse:
        sparse.truncate((64 << 20) + 1)
    with pytest.raises(InvalidSpec, match="larger than 64 MiB"):
        resolve_set(str(file), [tmp_path], field="objective")


def test_lines_end_where_they_end(tmp_path: Path) -> None:
    record = {"prompt": "One\u2028line", "attribute": "x"}
    assert len(read(tmp_path, json.dumps(record, ensure_ascii=False)).records) == 1


def test_the_shipped_capitals_are_right_as_far_as_one_can_see() -> None:
    records = read_set(resolve_set("capitals", (), field="objective")).records
    assert len(records) >= 120
    assert len({record.asked for record in records}) == len(records)
    questions = [record for record in records if isinstance(record, Question)]
    assert all(len(set(question.answers)) == 4 for question in questions)
    right = {question.prompt: question.answers[question.gold] for question in questions}
    assert right["The capital of France is"] == "Paris"
    assert right["The capital of Zimbabwe is"] == "Harare"
    assert len(set(right.values())) == len(right)
    assert {question.gold for question in questions} == {0, 1, 2, 3}


def test_missing_empty_and_forbidden_files_are_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    for reference, message in (
        ("trivia", "no set of questions called 'trivia'"),
        (str(tmp_path / "absent.jsonl"), "does not exist"),
        (str(tmp_path / "other.csv"), r"no \.jsonl file"),
        (str(empty), "is empty"),
    ):
        with pytest.raises(InvalidSpec, match=message) as caught:
            resolve_set(reference, [tmp_path], field="guards[0]")
        assert caught.value.field == "guards[0]"
    with pytest.raises(PathNotAllowed):
        resolve_set(str(empty), [tmp_path / "elsewhere"], field="objective")
    with pytest.raises(InvalidSpec, match="capitals"):
        read_set(TextSource(name="trivia"))
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidSpec, match="Cannot read"):
        resolve_set(str(tmp_path / "latin.jsonl"), [tmp_path], field="objective")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("counterfact", 1500),
        ("known_1000", 841),
        ("arc_easy", 1665),
        ("truthfulqa", 559),
        ("lambada_openai", 600),
        ("mmlu_sample", 781),
        ("commonsense_qa", 700),
        ("hellaswag", None),
        ("arc_challenge", 794),
        ("pref_dpo_en", 221),
    ],
)
def test_common_sets_are_read(shared_data: Path, name: str, count: int | None) -> None:
    found = read_set(resolve_set(str(shared_data / f"{name}.jsonl"), [shared_data], field="objective"))
    assert found.are_preferences == name.startswith("pref")
    assert count is None or len(found.records) == count
