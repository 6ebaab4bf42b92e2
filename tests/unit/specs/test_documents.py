"""Several documents in one text: a request for what can be made of several, a mistake for everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from aidocks.errors import InvalidSpec
from aidocks.specs.base import Spec
from aidocks.specs.read import build_spec, parse_yaml, read_spec_file


class Single(Spec):
    size: int


class Joined(Single):
    parts: tuple[Single, ...] = ()

    @classmethod
    def from_documents(cls, documents: Sequence[Mapping[str, Any]], fields: Mapping[str, Any]) -> Joined:
        return cls.model_validate({**documents[-1], "parts": documents[:-1], **fields})


TEXT = "size: 1\n---\nsize: 2\n---\nsize: 3\n"


@pytest.mark.parametrize("text", ["size: 1", "---\nsize: 1\n", "size: 1\n---\n", "---\n---\nsize: 1\n...\n"])
def test_one_document_is_one_whatever_is_around_it(text: str) -> None:
    assert parse_yaml(text) == {"size": 1}


def test_several_are_joined_by_the_spec_that_can() -> None:
    spec = build_spec(Joined, parse_yaml(TEXT))
    assert (spec.size, [part.size for part in spec.parts]) == (3, [1, 2])


def test_further_fields_go_with_them(tmp_path: Path) -> None:
    path = tmp_path / "request.yaml"
    path.write_text(TEXT)
    assert build_spec(Joined, read_spec_file(path) | {"size": 9}).size == 9


def test_several_are_a_mistake_elsewhere() -> None:
    with pytest.raises(InvalidSpec) as refused:
        build_spec(Single, parse_yaml(TEXT))
    assert "3 documents" in refused.value.message
    with pytest.raises(InvalidSpec) as refused:
        build_spec(Single, {"documents": [{"size": 1}]})
    assert refused.value.errors[0]["field"] == "size"


def test_what_is_wrong_in_one_is_named_by_its_place() -> None:
    with pytest.raises(InvalidSpec) as refused:
        build_spec(Joined, parse_yaml(TEXT.replace("1", "many")))
    assert refused.value.field == "parts[0].size"


@pytest.mark.parametrize("text", ["size: 1\n---\nsize: 2\nsize: 3\n", "size: 1\n---\nsize: [\n"])
def test_the_line_of_a_mistake_counts_from_the_beginning_of_the_text(text: str) -> None:
    with pytest.raises(InvalidSpec) as refused:
        parse_yaml(text)
    assert "line 4" in refused.value.message


@pytest.mark.parametrize("text", ["? [a, b]\n: c\n", "{a: b}: c\n", "a: 1\n? {b: c}\n: d\n"])
def test_keys_that_are_no_text_are_refused(text: str) -> None:
    with pytest.raises(InvalidSpec, match="a key is a list or a mapping") as refused:
        parse_yaml(text)
    assert "line" in refused.value.message


def test_aliases_may_repeat_but_not_explode() -> None:
    repeated = parse_yaml("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}\n")
    assert repeated == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2}}
    lines = ["a0: &a0 [" + ", ".join("0" * 9) + "]"]
    lines += [f"a{n}: &a{n} [" + ", ".join([f"*a{n - 1}"] * 9) + "]" for n in range(1, 30)]
    for text in ("\n".join(lines), "a: &a [*a]", "a: &a {b: *a}"):
        with pytest.raises(InvalidSpec, match="more than 100,000 values") as refused:
            parse_yaml(text)
        assert "aliases" in str(refused.value.hint)


@pytest.mark.parametrize("value", ["!!bool maybe", "!!timestamp x", '!!int ""', "!!map 3", "[" * 5000])
def test_values_that_no_document_can_have_are_refused(value: str) -> None:
    with pytest.raises(InvalidSpec, match="The YAML is not valid"):
        parse_yaml(f"a: {value}")
