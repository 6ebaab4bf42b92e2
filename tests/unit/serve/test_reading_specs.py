"""From text to spec: strict, forgiving in one point, and exact about what is wrong."""

from __future__ import annotations

import json
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, field_validator

from aidocks.errors import InvalidSpec, NotFound, PathNotAllowed
from aidocks.specs.base import ModelName, Spec
from aidocks.specs.read import build_spec, parse_json, parse_yaml, read_spec_file

TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
NUMBERS = st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


class Part(Spec):
    kind: Literal["hidden", "random"] = "hidden"
    size: int = Field(1, ge=1, description="How large, from 1.")
    hub_token: str = "x"


class Whole(Spec):
    name: ModelName
    parts: tuple[Part, ...] = ()
    by_name: dict[str, Part] = Field(default_factory=dict)
    either: int | list[int] = 0
    place: str = "here"

    @field_validator("place")
    @classmethod
    def _inside(cls, place: str) -> str:
        if place == "outside":
            raise PathNotAllowed("That is outside.", hint="Go inside.")
        if place == "nowhere":
            raise ValueError("nowhere is no place")
        return place


def without_array_commas(value: Any) -> str:
    """Print as JSON, with newlines in place of the commas between array elements."""
    if isinstance(value, list):
        return "[" + "\n".join(without_array_commas(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)}: {without_array_commas(v)}" for k, v in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)


def refusal(data: Any) -> InvalidSpec:
    with pytest.raises(InvalidSpec) as caught:
        build_spec(Whole, data)
    return caught.value


def faults(data: Any) -> dict[str, dict[str, Any]]:
    error = refusal(data)
    json.dumps(error.problem(), allow_nan=False).encode()
    return {fault["field"]: fault for fault in error.errors}


@given(JSON)
def test_json_round_trips(value: Any) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=False)) == value
    assert parse_json(json.dumps(value).encode()) == value


@given(JSON)
def test_commas_between_array_elements_may_be_missing(value: Any) -> None:
    assert parse_json(without_array_commas(value)) == value


def test_strings_are_not_looked_into() -> None:
    text = '{"a": ["say \\"x\\" \\"y\\"" "[1 2]"], "b": [{"c": [1 -2.5e3 true null]} [] ["x" "y"]]}'
    assert parse_json(text) == {
        "a": ['say "x" "y"', "[1 2]"],
        "b": [{"c": [1, -2500.0, True, None]}, [], ["x", "y"]],
    }


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('{"a": 1 "b": 2}', "line 1, column 9"),
        ('{"a": [1 2],\n "b": 2 "c": 3}', "line 2, column 9"),
        ('{"a": ["x" "y"] "b": 1}', "line 1, column 17"),
        ('["a",\n "b",\n]', "line 3, column 1"),
        ('{"a" 1}', "line 1, column 6"),
        ("{'a': 1}", "line 1, column 2"),
        ("", "line 1, column 1"),
        ('["a" "b', "line 1, column 6"),
        ("[1 2}", "line 1, column 5"),
    ],
)
def test_other_mistakes_are_located(text: str, where: str) -> None:
    with pytest.raises(InvalidSpec, match=where) as caught:
        parse_json(text)
    assert caught.value.hint


def test_the_offending_line_is_shown() -> None:
    with pytest.raises(InvalidSpec) as caught:
        parse_json('{\n  "gate_mode": "hidden"\n  "experts": []\n}')
    assert "line 3" in caught.value.message
    assert caught.value.hint == 'The line reads: "experts": []'


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2}', '{"a": NaN}', "[Infinity]", "[1e999]", "[" * 100_000, "9" * 5000, '["\\ud800"]',
        b"\xff{}", '{"\\udfff": 1, "\\udfff": 2}', "[1 2 NaN]", "{" * 50_000, "[" + '"a" ' * 50_000,
    ],
)  # fmt: skip
def test_what_json_must_not_be(text: str | bytes) -> None:
    with pytest.raises(InvalidSpec) as caught:
        parse_json(text)
    json.dumps(caught.value.problem()).encode()


def test_mending_is_linear() -> None:
    assert len(parse_json("[" + "1\n" * 400_000 + "]")) == 400_000


@given(st.text())
def test_any_text_is_json_or_refused(text: str) -> None:
    with suppress(InvalidSpec):
        parse_json(text)


@given(st.text())
def test_any_text_is_yaml_or_refused(text: str) -> None:
    with suppress(InvalidSpec):
        parse_yaml(text)


def test_yaml_refuses_repeated_keys_and_objects() -> None:
    with pytest.raises(InvalidSpec, match=r"line 3, column 1.*'a' is given twice"):
        parse_yaml("a: 1\nb: 2\na: 3\n")
    with pytest.raises(InvalidSpec, match="line 1"):
        parse_yaml("!!python/object/apply:os.system [echo]")
    assert parse_yaml("base: &b {x: 1}\nmore: {<<: *b, y: 2}") == {"base": {"x": 1}, "more": {"x": 1, "y": 2}}


@pytest.mark.parametrize(
    ("name", "text"),
    [("s.json", '{"a": ["x" "y"]}'), ("s.yaml", "a:\n- x\n- y\n"), ("s.spec", '{"a": ["x", "y"]}')],
)
def test_spec_files(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert read_spec_file(path) == {"a": ["x", "y"]}


def test_spec_files_that_are_not(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"nothing\.yaml"):
        read_spec_file(tmp_path / "nothing.yaml")
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n- 2\n")
    with pytest.raises(InvalidSpec, match=r"list\.yaml: A spec is a mapping"):
        read_spec_file(path)


def test_every_wrong_field_is_named() -> None:
    found = faults(
        {"parts": [{}, {"kind": "hiden", "siez": 1}, {"size": 0}], "by_name": {"x": {"size": "no"}}}
    )
    assert list(found) == ["name", "parts[1].kind", "parts[1].siez", "parts[2].size", "by_name.x.size"]
    assert found["name"]["message"] == "This field is required."
    assert found["parts[1].kind"]["message"] == "Must be 'hidden' or 'random'."
    assert found["parts[1].kind"]["hint"] == "Did you mean 'hidden'?"
    assert found["parts[1].siez"]["hint"] == "Did you mean 'size'?"
    assert found["parts[2].size"]["hint"] == "How large, from 1."
    assert found["by_name.x.size"]["value"] == "no"


def test_unknown_fields_without_a_neighbour_list_what_there_is() -> None:
    assert "kind, size, hub_token" in faults({"name": "n", "parts": [{"zzz": 1}]})["parts[0].zzz"]["hint"]


def test_alternatives_of_a_union_are_one_fault() -> None:
    found = faults({"name": "n", "either": "x"})
    assert list(found) == ["either"]
    assert ", or: " in found["either"]["message"]


def test_errors_of_validators_keep_their_words() -> None:
    assert faults({"name": "n", "place": "outside"})["place"]["hint"] == "Go inside."
    assert faults({"name": "n", "place": "nowhere"})["place"]["message"] == "Nowhere is no place."


def test_one_fault_is_the_error_itself() -> None:
    error = refusal({"name": "a/b"})
    assert (error.field, error.value) == ("name", "a/b")
    assert "letters, digits" in str(error)


@pytest.mark.parametrize("data", [None, 3, [], "text"])
def test_a_body_that_is_no_object(data: Any) -> None:
    assert "JSON object" in refusal(data).message


def test_secrets_and_long_values_are_not_repeated() -> None:
    error = refusal({"name": "n" * 5000, "parts": [{"hub_token": 12345}]})
    assert "12345" not in json.dumps(error.problem())
    assert len(json.dumps(error.problem())) < 2000
    assert refusal({"name": "n", "either": float("inf")}).problem()["errors"][0]["value"] is None


def test_all_faults_survive_a_process_boundary() -> None:
    error = refusal({"parts": 3, "zzz": 1})
    assert pickle.loads(pickle.dumps(error)).problem() == error.problem()


@given(JSON)
def test_any_json_that_is_no_spec_is_refused(value: Any) -> None:
    # No name has this form, so nothing that is generated is valid.
    error = refusal(value | {"name": "/"} if isinstance(value, dict) else value)
    assert error.errors
    json.dumps(error.problem(), allow_nan=False).encode()


def test_the_model_may_be_any_pydantic_model() -> None:
    class Query(BaseModel):
        limit: int = 1

    with pytest.raises(InvalidSpec, match="limit"):
        build_spec(Query, {"limit": "x"})  # type: ignore[type-var]
