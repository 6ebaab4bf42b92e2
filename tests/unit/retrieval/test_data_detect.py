"""Rows of queries and passages are told apart by their columns and what these hold; what cannot be told is refused."""

from __future__ import annotations

from typing import Any

import pytest

from aidocks.errors import InvalidSpec
from aidocks.retrieval.data.detect import detect


@pytest.mark.parametrize(
    ("row", "form", "fields"),
    [
        ({"anchor": "q", "positive": "p"}, "pair", {"query": "anchor", "positive": "positive"}),
        (
            {"id": "1", "title": "t", "context": "p", "question": "q", "answers": {"text": ["a"]}},
            "pair",
            {"query": "question", "positive": "context"},
        ),
        (
            {"question": "q", "context": "p", "answer": "a"},
            "pair",
            {"query": "question", "positive": "context"},
        ),
        ({"Question": "q", "Answer": "a"}, "pair", {"query": "Question", "positive": "Answer"}),
        ({"title": "q", "text": "p"}, "pair", {"query": "title", "positive": "text"}),
        (
            {"query": "q", "positive": "p", "negative": "n"},
            "triplet",
            {"query": "query", "positive": "positive", "negative": "negative"},
        ),
        (
            {"anchor": "q", "positive": "p", "negative_1": "n", "negative_2": "m"},
            "triplet",
            {"query": "anchor", "positive": "positive", "negative": "negative_1", "negative_2": "negative_2"},
        ),
        (
            {"query": "q", "pos": ["p"], "neg": ["n", "m"], "prompt": "x"},
            "query_lists",
            {"query": "query", "positive": "pos", "negative": "neg"},
        ),
        (
            {"query": "q", "pos": ["p"], "neg": [], "pos_scores": [0.9], "neg_scores": []},
            "query_lists",
            {
                "query": "query",
                "positive": "pos",
                "negative": "neg",
                "positive_scores": "pos_scores",
                "negative_scores": "neg_scores",
            },
        ),
        (
            {"query": "q", "positive": "p", "negative": '["n", "m"]'},
            "query_lists",
            {"query": "query", "positive": "positive", "negative": "negative"},
        ),
        (
            {"sentence1": "a", "sentence2": "b", "score": "0.5", "split": "train"},
            "scored_pair",
            {"first": "sentence1", "second": "sentence2", "score": "score"},
        ),
        (
            {"query": "a", "passage": "b", "label": 1},
            "scored_pair",
            {"first": "query", "second": "passage", "score": "label"},
        ),
        (
            {"query": "q", "documents": ["p"], "labels": [1]},
            "labelled_documents",
            {"query": "query", "documents": "documents", "labels": "labels"},
        ),
    ],
)
def test_forms_in_common_use(row: dict[str, Any], form: str, fields: dict[str, str]) -> None:
    layout = detect([row])
    assert (layout.format, layout.detected, layout.named) == (form, True, fields)
    assert set(layout.unused) == set(row) - set(fields.values()) - {"answers"}


def test_a_field_map_counts_more_than_names_and_knows_what_roles_are_called() -> None:
    row = {"q": "q", "d": "p", "positive": "not this", "r": 3}
    assert detect([row], fields={"query": "q", "passage": "d"}).fields == {"query": "q", "positive": "d"}
    scored = detect([row], fields={"query": "q", "passage": "d", "score": "r"})
    assert (scored.format, scored.fields) == ("scored_pair", {"first": "q", "second": "d", "score": "r"})
    told = detect([{"query": "a", "passage": "b", "label": 1}], format="pair")
    assert (told.format, told.detected, told.unused) == ("pair", False, ("label",))


def test_a_text_that_looks_like_a_list_of_numbers_is_a_text() -> None:
    assert detect([{"query": "q", "passage": "[1, 2]"}]).format == "pair"


@pytest.mark.parametrize(
    ("row", "given", "field", "message", "hint"),
    [
        (
            {"query": "q", "passage": "p", "document": "d"},
            {},
            "dataset[1]",
            "The columns passage and document could both be the positive.",
            'fields: {"positive": "passage"}',
        ),
        (
            {"prompt": "q", "completion": "p"},
            {},
            "dataset[1]",
            "none of them is the query or the positive of pairs",
            'fields: {"query": "prompt", "positive": "completion"}',
        ),
        (
            {"query": "q"},
            {"fields": {"qery": "query"}},
            "fields.qery",
            "no role 'qery'",
            "Did you mean 'query'?",
        ),
        (
            {"query": "q"},
            {"fields": {"query": "quer"}},
            "fields.query",
            "no column 'quer'",
            "Did you mean 'query'?",
        ),
        (
            {"query": "q", "positive": "p", "labels": 1},
            {"format": "pair", "fields": {"labels": "labels"}},
            "fields.labels",
            "Rows of pairs have no labels.",
            "Their roles are query, positive.",
        ),
        ({"query": "q", "positive": "p"}, {"format": "beir"}, "format", "BEIR is a folder", "corpus.jsonl"),
        (
            {"query-id": "1", "corpus-id": "2", "score": 1},
            {},
            "dataset[1]",
            "judgements of a BEIR folder",
            "Name the folder",
        ),
    ],
)
def test_what_cannot_be_told_is_refused_with_what_to_write(
    row: dict[str, Any], given: dict[str, Any], field: str, message: str, hint: str
) -> None:
    with pytest.raises(InvalidSpec) as refused:
        detect([row], field="dataset[1]", **given)
    assert refused.value.field == field
    assert message in str(refused.value)
    assert hint in (refused.value.hint or "")
