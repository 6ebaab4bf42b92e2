"""Exact search in vectors, BM25, and the files both are kept in."""

from __future__ import annotations

from math import log
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from aidocks.errors import CorruptCheckpoint
from aidocks.plan import UnitContext
from aidocks.retrieval.bm25 import IndexWords, WordIndex, open_index, words_of
from aidocks.retrieval.embedding import (
    VectorFiles,
    Vectors,
    find_nearest,
    open_array,
    similarity_of,
    write_array,
)
from aidocks.retrieval.parts import parts_of, read_lines, texts_of, write_part
from aidocks.training.retriever import Retriever
from tests.support.driving import write_rows


def stored(directory: Path, *arrays_of: np.ndarray) -> tuple[Vectors, ...]:
    return tuple(
        Vectors(
            file=write_array(directory / f"{number}.npy", one.astype(np.float32)),
            count=one.shape[0],
            dimensions=one.shape[1],
        )
        for number, one in enumerate(arrays_of)
    )


@given(st.integers(0, 5000), st.integers(1, 40), st.integers(1, 60))
def test_parts_are_all_rows_once(count: int, least: int, more: int) -> None:
    parts = parts_of(count, least=least, most=least + more)
    assert [row for begin, end in parts for row in range(begin, end)] == list(range(count))
    assert all(end - begin <= least + more for begin, end in parts)
    assert all(end - begin >= least for begin, end in parts[:-1])


# Few different values, so that many rows are equally alike.
@settings(max_examples=25, deadline=None)
@given(
    arrays.arrays(np.int8, st.tuples(st.integers(1, 60), st.just(3)), elements=st.integers(-2, 2)),
    st.integers(1, 70),
    st.integers(0, 60),
)
def test_search_is_exact_and_equal_rows_stay_in_order(
    tmp_path_factory: pytest.TempPathFactory, made: np.ndarray, count: int, cut: int
) -> None:
    directory = tmp_path_factory.mktemp("vectors")
    passages = made.astype(np.float32)
    parts = [part for part in (passages[:cut], passages[cut:]) if len(part)]
    queries = np.array([[1, 0, 0], [1, -1, 2]], np.float32)
    bars = np.array([0.5, 1.5], np.float32)
    found = find_nearest(queries, VectorFiles(stored(directory, *parts), "dot"), count, bars_Q=bars)
    for number, query in enumerate(queries):
        scores = passages @ query
        expected = sorted(range(len(scores)), key=lambda line: (-scores[line], line))[:count]
        assert found.lines[number].tolist() == expected
        assert found.scores[number].tolist() == scores[expected].tolist()
        assert found.above[number] == (scores > bars[number]).sum()


def test_vectors_are_compared_by_cosine_or_as_they_are(tmp_path: Path) -> None:
    passages = stored(tmp_path, np.array([[9.0, 1.0], [0.1, 0.0], [0.0, 0.0]]))
    query = np.array([[1.0, 0.0]], np.float32)
    assert find_nearest(query, VectorFiles(passages), 3).lines[0].tolist() == [1, 0, 2]
    assert find_nearest(query, VectorFiles(passages, "dot"), 3).lines[0].tolist() == [0, 1, 2]


def test_a_vector_that_is_no_number_is_like_nothing(tmp_path: Path) -> None:
    passages = stored(tmp_path, np.array([[np.nan, 1.0], [-1.0, 0.0]]))
    assert find_nearest(np.array([[1.0, 0.0]], np.float32), VectorFiles(passages), 2).lines[0].tolist() == [
        1,
        0,
    ]


def test_the_models_own_similarity_counts(tmp_path: Path) -> None:
    model = Retriever(kind="embedding", name="m", model=tmp_path)
    assert similarity_of(model) == "cosine"
    (tmp_path / "config_sentence_transformers.json").write_text('{"similarity_fn_name": "dot"}')
    assert similarity_of(model) == "dot"


def test_arrays_with_code_in_them_are_not_read(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(CorruptCheckpoint):
        open_array(tmp_path / "objects.npy")
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(CorruptCheckpoint):
        open_array(tmp_path / "cut.npy")


@pytest.mark.parametrize("shape", [(0, 4), (3, 4), (5,)])
def test_arrays_are_what_was_written(tmp_path: Path, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    file = write_array(tmp_path / "a.npy", array)
    assert file.path.stat().st_size == file.bytes
    np.testing.assert_array_equal(open_array(file.path), array)


def test_bm25_is_lucenes() -> None:
    passages = ["the cat sat", "the dog sat on the cat", "birds sing"]
    index = WordIndex.of(passages)
    # ln(1 + (N - n + 0.5) / (n + 0.5)) * tf / (tf + k1 (1 - b + b length / mean length)), k1 = 1.2, b = 0.75
    mean = sum(len(words_of(passage)) for passage in passages) / 3

    def part(frequency: int, having: int, length: int) -> float:
        rarity = log(1 + (3 - having + 0.5) / (having + 0.5))
        return rarity * frequency / (frequency + 1.2 * (0.25 + 0.75 * length / mean))

    expected = [part(1, 2, 3) + part(1, 2, 3), part(2, 2, 6) + part(1, 2, 6), 0]
    assert index.scores("The cat, zebra!").tolist() == pytest.approx(expected, rel=1e-6)


def test_bm25_finds_nothing_where_no_word_is_the_same() -> None:
    index = WordIndex.of(["one two", "", "two three"])
    assert index.find("TWO", 5) == [0, 2]
    assert index.find("two", 1) == [0]
    assert index.find("four", 5) == []
    assert WordIndex.of(["", "?!"]).find("one", 5) == []


def test_words_are_unicodes() -> None:
    assert words_of("Größe: 3,5 m² – ÉTÉ") == ["größe", "3", "5", "m²", "été"]


def test_an_index_is_read_from_its_files(tmp_path: Path) -> None:
    corpus = write_rows(tmp_path / "corpus.jsonl", [{"text": "red fish"}, {"text": "blue Fisch"}])
    unit = IndexWords(corpus=corpus, of="fish", directory=tmp_path / "words")
    context = UnitContext(workspace=tmp_path)
    made = unit.run(context)
    assert unit.run(context) == made, "the same again over what is there"
    assert all(file.path.stat().st_size == file.bytes for file in unit.outputs(made))
    assert open_index(made.directory, context).find("blue", 3) == [1]


def test_some_lines_of_a_file_are_read(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "r.jsonl", [{"text": f"line {number}"} for number in range(9)])
    assert read_lines(rows.path, {7, 2}) == {2: {"text": "line 2"}, 7: {"text": "line 7"}}
    assert read_lines(rows.path, set()) == {}
    with pytest.raises(KeyError):
        read_lines(rows.path, {9})
    part = write_part(tmp_path / "p.jsonl", [{"text": "a \ud800 b"}, {"text": "ü"}])
    assert part.count == 2
    assert read_lines(part.file.path, {0, 1}) == {0: {"text": "a \ud800 b"}, 1: {"text": "ü"}}
    assert list(texts_of(rows))[:2] == ["line 0", "line 1"]
