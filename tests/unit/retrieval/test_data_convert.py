"""Each form of rows becomes queries with passages, or scored pairs; what is wrong is said of row and column."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aidocks.retrieval.data.convert import Converter, Passage, Ranking, Scored, normalised
from aidocks.retrieval.data.detect import detect
from aidocks.training.data.rows import BadRow


def convert(row: dict[str, Any], sample: dict[str, Any] | None = None) -> Any:
    return Converter(detect([sample or row])).convert(row)


def right(*texts: str) -> tuple[Passage, ...]:
    return tuple(Passage(text, 1) for text in texts)


def wrong(*texts: str) -> tuple[Passage, ...]:
    return tuple(Passage(text, 0) for text in texts)


@pytest.mark.parametrize(
    ("row", "passages"),
    [
        ({"anchor": "q", "positive": "p"}, right("p")),
        ({"query": "q", "positive": "p", "negative": "n"}, right("p") + wrong("n")),
        ({"query": "q", "positive": "p", "negative": "n", "negative_2": "m"}, right("p") + wrong("n", "m")),
        ({"query": "q", "positive": "p", "negative_1": "n", "negative_2": None}, right("p") + wrong("n")),
        ({"query": "q", "pos": "p", "neg": ["n", "m"]}, right("p") + wrong("n", "m")),
        ({"query": "q", "pos": '["p", "r"]', "neg": "[]"}, right("p", "r")),
        (
            {"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": [0.9], "neg_scores": ["0.1"]},
            (Passage("p", 1, 0.9), Passage("n", 0, 0.1)),
        ),
        (
            {"query": "q", "documents": ["p", "n", "r"], "labels": [2, 0, -1]},
            (Passage("p", 2), *wrong("n", "r")),
        ),
        (
            {
                "query": "q",
                "positive_passages": [{"docid": "1", "title": "t", "text": "p"}],
                "negative_passages": [{"text": "n"}],
            },
            right("t p") + wrong("n"),
        ),
        ({"query": "q", "passage": 12}, right("12")),
    ],
)
def test_rows_become_queries_with_passages(row: dict[str, Any], passages: tuple[Passage, ...]) -> None:
    assert convert(row) == Ranking("q", passages)


def test_scored_pairs_keep_their_scores() -> None:
    assert convert({"sentence1": "a", "sentence2": "b", "score": "4.2"}) == Scored("a", "b", 4.2)
    assert convert({"query": "a", "passage": "b", "label": True}) == Scored("a", "b", 1)


def test_a_passage_without_an_answer_is_no_positive() -> None:
    row = {"question": "q", "context": "p", "answers": {"text": [], "answer_start": []}}
    assert convert(row) is None
    assert convert(row | {"answers": {"text": ["a"]}}) == Ranking("q", right("p"))


@pytest.mark.parametrize(
    ("row", "sample", "reason", "field"),
    [
        ({"query": " ", "positive": "p"}, {"query": "q", "positive": "p"}, "query is empty", "query"),
        ({"positive": "p"}, {"query": "q", "positive": "p"}, "query is missing", "query"),
        ({"query": "q", "positive": None}, {"query": "q", "positive": "p"}, "positive is empty", "positive"),
        ({"query": {"a": 1}, "positive": "p"}, {"query": "q", "positive": "p"}, "query is not text", "query"),
        ({"query": "q", "pos": []}, {"query": "q", "pos": ["p"]}, "pos is empty", "pos"),
        ({"query": "q", "pos": ["p", ""]}, {"query": "q", "pos": ["p"]}, "pos is empty", "pos"),
        ({"query": "q", "pos": [["p"]]}, {"query": "q", "pos": ["p"]}, "pos is not text", "pos"),
        (
            {"query": "q", "positive": "p", "negative": ""},
            {"query": "q", "positive": "p", "negative": "n"},
            "negative is empty",
            "negative",
        ),
        (
            {"query": "q", "pos": ["p"], "pos_scores": [1, 2]},
            None,
            "pos_scores has not as many values as pos",
            "pos_scores",
        ),
        (
            {"query": "q", "documents": ["p"], "labels": ["x"]},
            None,
            "labels has a value that is no number",
            "labels",
        ),
        ({"query": "q", "documents": ["p"], "labels": [0.5]}, None, "labels has a part of 1", "labels"),
        (
            {"query": "q", "documents": ["p"], "labels": [1e308]},
            None,
            "labels has a number above 1000",
            "labels",
        ),
        (
            {"sentence1": "a", "sentence2": "b", "score": float("nan")},
            {"sentence1": "a", "sentence2": "b", "score": 1},
            "score is no number",
            "score",
        ),
        ({"query": "q\ud800", "positive": "p"}, None, "query has half of a character", "query"),
    ],
)
def test_bad_rows_are_blamed_on_a_column(
    row: dict[str, Any], sample: dict[str, Any] | None, reason: str, field: str
) -> None:
    with pytest.raises(BadRow) as bad:
        convert(row, sample)
    assert bad.value.reason.startswith(reason)
    assert bad.value.field == field


@given(st.text())
def test_texts_count_as_the_same_whatever_case_and_spaces(text: str) -> None:
    once = normalised(text)
    assert normalised(f"  {text}\n") == once
    assert once == " ".join(once.split())


def test_compatible_letters_are_the_same() -> None:
    assert normalised("ﬁnd  STRASSE") == normalised("Find Straße")
