"""The texts of a request: where they come from, how much of them there is, and what is said of too little."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from aidocks.errors import AIDocksError, InvalidSpec, PathNotAllowed
from aidocks.evaluate.texts import count_chunks
from aidocks.moe.domains import Texts, resolve_texts
from aidocks.specs.moe import MoESpec
from aidocks.specs.read import build_spec

LENGTH = 16


@pytest.fixture(scope="module")
def base(tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tiny_llama(tmp_path_factory.mktemp("base") / "model")
    return path


@pytest.fixture
def resolve(base: Path, tmp_path: Path) -> Callable[..., Texts]:
    """``resolve(*experts, **fields)``: the texts of a request whose experts have these fields."""

    def run(*experts: dict[str, Any], here: bool = True, context: int | None = 512, **fields: Any) -> Texts:
        defaults: dict[str, Any] = {"gate_mode": "fitted", "seqlen": LENGTH, "chunks": 4, "fit_tokens": 64}
        entries = [{"source_model": "m", **expert} for expert in experts]
        spec = build_spec(MoESpec, {"base_model": "m", "experts": entries, **defaults, **fields})
        return resolve_texts(spec, base if here else None, context, [tmp_path / "allowed"])

    (tmp_path / "allowed").mkdir()
    return run


def lines(topic: str, count: int = 30) -> list[str]:
    return [f"Clause {i} of {topic}: the licensor grants {i} rights to everybody." for i in range(count)]


def jsonl(path: Path, records: Sequence[str]) -> str:
    path.write_text("".join(json.dumps({"text": record}) + "\n" for record in records))
    return str(path)


def test_texts_of_all_kinds(resolve: Any, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "allowed" / "a.jsonl", lines("a"))
    found = resolve(
        {"dataset": file},
        {"positive_texts": lines("b")},
        {"positive_prompts": ["def f(x):", "import os"]},
        {"dataset": file, "positive_texts": lines("d"), "positive_prompts": ["how"]},
        {"dataset": "prose"},
    )
    of_file, of_texts, of_prompts, of_all, of_prose = found.examples
    assert of_file.text is not None
    assert (of_file.text.path, of_file.text.records, of_file.prompts) == (Path(file), (), ())
    assert of_file.text.sha256
    assert of_file.chunks > 10
    assert of_texts.text is not None
    assert (of_texts.text.path, of_texts.text.records) == (None, tuple(lines("b")))
    assert (of_prompts.text, of_prompts.chunks, of_prompts.prompts) == (None, 0, ("def f(x):", "import os"))
    assert of_all.text is not None
    assert (of_all.text.path, of_all.text.records) == (Path(file), tuple(lines("d")))
    assert of_all.prompts == ("how",)
    assert of_all.chunks > of_file.chunks
    assert of_prose.text is not None
    assert of_prose.text.name == "prose"
    # An expert of prompts alone has nothing to be measured on; the common text comes last.
    assert [domain.name for domain in found.domains] == [
        "experts[0]",
        "experts[1]",
        "experts[3]",
        "experts[4]",
        "text",
    ]
    assert all(domain.chunks == 4 for domain in found.domains)
    assert found.notes == ()


def test_chunks_are_counted_on_the_half_that_they_are_for(resolve: Any, base: Path, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "allowed" / "a.jsonl", lines("a", 12))
    found = resolve({"dataset": file}, {"positive_prompts": ["x y"]}, chunks=200, evaluate=True, text="prose")
    text = found.domains[0].text
    halves = count_chunks(base, text, LENGTH)
    assert halves is not None
    assert (found.examples[0].chunks, found.domains[0].chunks) == halves
    assert found.domains[-1].chunks == 200


def test_gates_that_do_not_learn_need_no_examples_but_measure_on_them(resolve: Any, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "allowed" / "a.jsonl", lines("a"))
    found = resolve({"dataset": file}, {}, gate_mode="random")
    assert found.examples == ()
    assert [domain.name for domain in found.domains] == ["experts[0]", "text"]


def test_without_an_evaluation_only_examples_are_wanted(resolve: Any) -> None:
    found = resolve(
        {"positive_texts": lines("a")}, {"positive_prompts": ["x y"]}, evaluate=False, chunks=90_000
    )
    assert len(found.examples) == 2
    assert [domain.name for domain in found.domains] == ["text"]


@pytest.mark.parametrize("kind", ["dataset", "positive_texts"])
def test_experts_that_share_a_text_share_its_domain(kind: str, resolve: Any, tmp_path: Path) -> None:
    shared = {
        "dataset": jsonl(tmp_path / "allowed" / "a.jsonl", lines("a")),
        "positive_texts": lines("a"),
    }[kind]
    found = resolve({"positive_texts": lines("b")}, {kind: shared}, {kind: shared})
    assert [domain.name for domain in found.domains] == ["experts[0]", "experts[1]", "text"]
    assert found.examples[1] == found.examples[2]


def test_a_text_too_short_to_measure_on_is_noted(resolve: Any) -> None:
    found = resolve({"positive_texts": lines("a", 2)}, {"positive_texts": lines("b")})
    assert [domain.name for domain in found.domains] == ["experts[1]", "text"]
    (note,) = found.notes
    assert "experts[0]" in note
    assert "not measured" in note


def test_texts_shorter_than_a_chunk_are_learned_from_as_prompts_are(resolve: Any) -> None:
    short = ["a red box", "a blue box"]
    found = resolve(
        {"positive_texts": short},
        {"positive_prompts": ["x y"]},
        {"positive_texts": short, "positive_prompts": ["z"]},
    )
    assert found.examples[0].prompts == tuple(short)
    assert set(found.examples[2].prompts) == {*short, "z"}


@pytest.mark.parametrize(
    ("content", "words"),
    [("short", "less than one chunk"), ("", "empty"), (None, "does not exist")],
)
def test_a_file_that_teaches_nothing(content: str | None, words: str, resolve: Any, tmp_path: Path) -> None:
    path = tmp_path / "allowed" / "a.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InvalidSpec, match=words) as caught:
        resolve({"positive_prompts": ["x y"]}, {"dataset": str(path)})
    assert (caught.value.field, caught.value.value) == ("experts[1].dataset", str(path))


def test_a_line_without_a_text(resolve: Any, tmp_path: Path) -> None:
    path = tmp_path / "allowed" / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"texts": "not"}\n')
    with pytest.raises(InvalidSpec, match="Line 2") as caught:
        resolve({"dataset": str(path)}, {"positive_prompts": ["x y"]})
    assert caught.value.field == "experts[0].dataset"


@pytest.mark.parametrize("way", ["plain", "dots", "link"])
@pytest.mark.parametrize("here", [True, False])
def test_a_file_outside_the_allowed_roots_is_not_read(
    way: str, here: bool, resolve: Any, tmp_path: Path
) -> None:
    secret = jsonl(tmp_path / "secret.jsonl", lines("a"))
    (tmp_path / "allowed" / "link.jsonl").symlink_to(secret)
    reference = {
        "plain": secret,
        "dots": str(tmp_path / "allowed" / ".." / "secret.jsonl"),
        "link": str(tmp_path / "allowed" / "link.jsonl"),
    }[way]
    with pytest.raises(PathNotAllowed) as caught:
        resolve({"positive_prompts": ["x y"]}, {"dataset": reference}, here=here)
    assert caught.value.field == "experts[1].dataset"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"chunks": 90_000}, "chunks"),
        ({"seqlen": 1024}, "seqlen"),
        ({"text": "novel"}, "text"),
        ({"text": "/etc/passwd.txt"}, "text"),
    ],
)
def test_the_common_text_must_do(fields: dict[str, Any], field: str, resolve: Any) -> None:
    with pytest.raises(AIDocksError) as caught:
        resolve({"positive_prompts": ["x y"]}, {"positive_prompts": ["z a"]}, **fields)
    assert caught.value.field == field


def test_before_the_base_is_at_hand_only_the_files_are_checked(resolve: Any, tmp_path: Path) -> None:
    fine = jsonl(tmp_path / "allowed" / "a.jsonl", lines("a"))
    found = resolve({"dataset": fine}, {"positive_prompts": ["x y"]}, here=False, chunks=90_000, seqlen=1024)
    assert found == Texts((), (), ())
    with pytest.raises(InvalidSpec):
        resolve({"dataset": fine}, {"dataset": str(tmp_path / "allowed" / "b.txt")}, here=False)
