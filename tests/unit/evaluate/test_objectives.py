from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from aidocks.errors import InvalidSpec
from aidocks.evaluate.objectives import (
    PARTS,
    ObjectiveSource,
    chunks_of_part,
    deal,
    pieces_of,
    resolve_objective,
    size_objective,
)
from aidocks.evaluate.texts import TextSource
from aidocks.specs.objective import Objective


def asked(text: Any) -> Objective:
    return Objective.model_validate(text)


def test_requests_are_spelled_in_short_or_in_full() -> None:
    assert asked("perplexity:prose") == asked("perplexity") == Objective(metric="perplexity", data="prose")
    assert asked("accuracy") == asked({"metric": "accuracy", "data": "capitals"})
    assert asked("preference:/data/a:b.jsonl").data == "/data/a:b.jsonl"
    assert str(asked("log_likelihood:facts.jsonl")) == "log_likelihood:facts.jsonl"
    for wrong in ("prose", "accuracy capitals", "preference", "bleu:x", "", 3, {"metric": "accuracy"}):
        with pytest.raises(ValidationError):
            asked(wrong)


def records(directory: Path, count: int, *, preferences: bool = False) -> Path:
    file = directory / ("preferences.jsonl" if preferences else "facts.jsonl")
    more = {"chosen": "a", "rejected": "b"} if preferences else {"attribute": "a"}
    file.write_text("".join(json.dumps({"prompt": f"Number {i}"} | more) + "\n" for i in range(count)))
    return file


def test_the_metric_and_its_data_must_agree(tmp_path: Path) -> None:
    facts, preferences = records(tmp_path, 40), records(tmp_path, 40, preferences=True)
    for metric, file in (("preference", facts), ("accuracy", preferences), ("log_likelihood", preferences)):
        with pytest.raises(InvalidSpec, match="of which there is no") as caught:
            resolve_objective(asked(f"{metric}:{file}"), [tmp_path], field="guards[1]")
        assert caught.value.field == "guards[1]"
    assert resolve_objective(asked(f"preference:{preferences}"), [tmp_path]).label == (
        "preference on preferences.jsonl"
    )
    with pytest.raises(InvalidSpec):
        resolve_objective(asked("accuracy:prose"), ())
    with pytest.raises(InvalidSpec):
        resolve_objective(asked("perplexity:capitals"), ())


@given(st.lists(st.text(max_size=3), max_size=60), st.integers(0, 3))
def test_every_record_has_one_part_and_equal_questions_the_same(asked: list[str], seed: int) -> None:
    dealt = deal(asked, seed)
    assert sorted(position for part in PARTS for position in dealt[part]) == list(range(len(asked)))
    questions = [{asked[position] for position in dealt[part]} for part in PARTS]
    assert sum(map(len, questions)) == len(set(asked))


def test_records_are_dealt_in_shares_and_by_the_seed() -> None:
    asked = [f"Number {i}" for i in range(2000)]
    sizes = {part: len(positions) for part, positions in deal(asked, 0).items()}
    assert sizes == {"calibration": 256, "search": 600, "held_out": 500, "report": 500}
    assert deal(asked, 0) == deal(asked, 0)
    assert deal(asked, 0) != deal(asked, 1)
    assert deal(asked, 0)["search"] != sorted(deal(asked, 0)["search"])


def test_sets_are_sized_without_a_model(tmp_path: Path) -> None:
    source = resolve_objective(asked(f"accuracy:{records(tmp_path, 40)}"), [tmp_path])
    assert source.sizes == {}
    assert size_objective(source, tmp_path, chunks=3).sizes == {
        "calibration": 8, "search": 12, "held_out": 10, "report": 10,
    }  # fmt: skip
    few = resolve_objective(asked(f"accuracy:{records(tmp_path, 20)}"), [tmp_path])
    with pytest.raises(InvalidSpec, match="too few records") as caught:
        size_objective(few, tmp_path, field="objective")
    assert caught.value.field == "objective"


def test_texts_are_sized_by_the_models_tokens(stories260k: Path) -> None:
    source = resolve_objective(asked("perplexity"), (), seq_length=256)
    sizes = size_objective(source, stories260k).sizes
    half = sizes["calibration"] + sizes["search"]
    assert sizes["calibration"] == int(0.4 * half)
    assert sizes["held_out"] == sizes["report"]
    assert half - 1 <= 2 * sizes["report"] <= half
    plenty = resolve_objective(asked("perplexity"), (), seq_length=32)
    assert size_objective(plenty, stories260k).sizes == {
        "calibration": 96, "search": 128, "held_out": 128, "report": 128,
    }  # fmt: skip
    assert size_objective(plenty, stories260k, chunks=200).sizes == {
        "calibration": 96, "search": 200, "held_out": 128, "report": 128,
    }  # fmt: skip
    exact = size_objective(source, stories260k, chunks=half - 10)
    assert (exact.sizes["calibration"], exact.sizes["search"]) == (10, half - 10)


@pytest.mark.parametrize("chunks", [1, 7, 100_000])
def test_a_number_of_chunks_that_cannot_be_is_refused(stories260k: Path, chunks: int) -> None:
    source = resolve_objective(asked("perplexity"), ())
    with pytest.raises(InvalidSpec) as caught:
        size_objective(source, stories260k, chunks=chunks)
    assert (caught.value.field, caught.value.value) == ("chunks", chunks)


def test_a_hopeless_number_of_chunks_is_refused_before_anything_is_counted() -> None:
    with pytest.raises(InvalidSpec, match="cannot tell") as caught:
        resolve_objective(asked("perplexity"), (), chunks=7)
    assert caught.value.field == "chunks"
    assert resolve_objective(asked("accuracy"), (), chunks=7).sizes == {}


def test_a_text_that_is_too_short_is_refused(stories260k: Path, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("Once upon a time there was a text. " * 10)
    source = resolve_objective(asked(f"perplexity:{file}"), [tmp_path], seq_length=32)
    with pytest.raises(InvalidSpec, match="too few chunks of 32 tokens") as caught:
        size_objective(source, stories260k, field="guards[0]")
    assert caught.value.field == "guards[0]"


def test_a_model_whose_tokenizer_only_loading_would_tell_is_sized_with_care(tmp_path: Path) -> None:
    sizes = size_objective(resolve_objective(asked("perplexity"), (), seq_length=64), tmp_path).sizes
    assert 16 <= sizes["search"] <= 104_404 / 64 / 2
    assert min(sizes.values()) >= 8


@given(
    counts=st.one_of(
        st.lists(st.integers(80, 400), min_size=1, max_size=1),
        st.lists(st.integers(20, 60), min_size=4, max_size=4),  # each part has enough of its own
        st.lists(st.integers(19, 22), min_size=4, max_size=4).map(lambda c: [0, c[0] + c[1], c[2], c[3]]),
        st.lists(st.integers(18, 60), min_size=4, max_size=4),
    ),
    seed=st.integers(0, 5),
    calibration=st.integers(1, 15),
    search=st.integers(8, 20),
    told=st.integers(1, 17),
)
def test_parts_of_a_text_are_disjoint(
    counts: list[int], seed: int, calibration: int, search: int, told: int
) -> None:
    sizes = {"calibration": calibration, "search": search, "held_out": told, "report": told}
    source = ObjectiveSource(metric="perplexity", text=TextSource(name="prose"), seed=seed, sizes=sizes)
    parts = {part: chunks_of_part(source, part, counts) for part in PARTS}
    assert {part: len(positions) for part, positions in parts.items()} == sizes
    assert len({position for positions in parts.values() for position in positions}) == sum(sizes.values())
    if len(counts) == 4:
        boundary = counts[0] + counts[1]
        assert all((p < boundary) == (part in PARTS[:2]) for part in PARTS for p in parts[part])
        pieces = [range(sum(counts[:place]), sum(counts[: place + 1])) for place in range(4)]
        for half in (slice(0, 2), slice(2, 4)):
            if all(sizes[part] <= count for part, count in zip(PARTS[half], counts[half], strict=True)):
                own = zip(PARTS[half], pieces[half], strict=True)
                assert all(set(parts[part]) <= set(piece) for part, piece in own)
    larger = source.model_copy(update={"sizes": sizes | {"search": search - 1}})
    if len(counts) == 1 or (counts[0] >= calibration and counts[1] >= search):
        assert chunks_of_part(larger, "search", counts) == parts["search"][:-1]


def test_a_text_that_shrank_is_refused() -> None:
    sizes = {"calibration": 8, "search": 8, "held_out": 8, "report": 8}
    source = ObjectiveSource(metric="perplexity", text=TextSource(name="prose"), sizes=sizes)
    assert len(chunks_of_part(source, "report", [32])) == 8
    assert len(chunks_of_part(source, "report", [0, 16, 3, 13])) == 8
    with pytest.raises(InvalidSpec, match="15 whole chunks"):
        chunks_of_part(source, "report", [31])
    with pytest.raises(InvalidSpec, match="15 whole chunks"):
        chunks_of_part(source, "report", [8, 8, 7, 8])


def clauses(count: int, repeat: int = 1) -> TextSource:
    records = (f"Clause {i}: the licensor grants {i} rights to everybody who asks. " for i in range(count))
    return TextSource(name="clauses", records=tuple(record * repeat for record in records))


def test_a_text_of_many_records_is_dealt_by_records(stories260k: Path) -> None:
    source = ObjectiveSource(metric="perplexity", text=clauses(4000), seq_length=32)
    sized = size_objective(source, stories260k)
    assert sized.sizes == {"calibration": 96, "search": 128, "held_out": 128, "report": 128}
    said = [set(piece.split("\n\n")) for piece in pieces_of(source)]
    assert len(said) == 4
    assert sum(map(len, said)) == len(set.union(*said)) == 4000
    for chunks in (100, 200):
        exact = size_objective(source, stories260k, chunks=chunks)
        assert exact.sizes == sized.sizes | {"search": chunks} | (
            {"held_out": 100, "report": 100} if chunks == 100 else {}
        )
    # Only as much is read as is needed, and that is what was counted.
    long = source.model_copy(update={"text": clauses(4000, repeat=30)})
    read = pieces_of(size_objective(long, stories260k))
    whole = pieces_of(long)
    assert all(piece.startswith(beginning) for piece, beginning in zip(whole, read, strict=True))
    assert sum(map(len, read)) < sum(map(len, whole)) / 4


def test_of_few_records_the_chunks_are_dealt(stories260k: Path) -> None:
    source = ObjectiveSource(metric="perplexity", text=clauses(4, repeat=120), seq_length=32)
    sizes = size_objective(source, stories260k).sizes
    assert min(sizes.values()) >= 8
    # More than the records of the search hold, but not more than its half.
    many = ObjectiveSource(metric="perplexity", text=clauses(200), seq_length=32)
    known = size_objective(many, stories260k).sizes
    more = size_objective(many, stories260k, chunks=known["search"] + 5).sizes
    assert more["search"] == known["search"] + 5
    assert more["calibration"] < known["calibration"]
