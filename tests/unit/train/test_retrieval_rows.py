"""Which examples are made of rows, and which of them share a step."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sentence_transformers")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.small_retriever_training import rankings, scored, write_rows
from train.retrieval.batches import Batches
from train.retrieval.rows import Example, Examples, load_examples


def _load(tmp_path: Path, rows: list[dict[str, Any]], loss: str, **given: Any) -> Examples:
    kind = given.pop("kind", "embedding")
    return load_examples(
        write_rows(tmp_path / "rows.jsonl", rows), kind, loss, **({"negatives": 1, "seed": 0} | given)
    )


_ROW = {"query": "q", "positives": ["p1", "p2"], "negatives": ["n1", "n2", "n3"]}


def test_every_positive_is_an_example_and_they_take_turns_at_the_negatives(tmp_path: Path) -> None:
    examples = _load(tmp_path, [_ROW], "mnrl", negatives=2)
    assert [examples[n] for n in range(len(examples))] == [
        {"anchor": "q", "positive": "p1", "negative_1": "n1", "negative_2": "n2"},
        {"anchor": "q", "positive": "p2", "negative_1": "n3", "negative_2": "n1"},
    ]


def test_missing_negatives_are_passages_of_other_rows_that_answer_nothing_here(tmp_path: Path) -> None:
    rows = [{"query": "q", "positives": ["p1", "p2"], "negatives": ["n"]}, *rankings(4)]
    examples = _load(tmp_path, rows, "mnrl", negatives=4)
    for number in range(2):
        example = examples[number]
        wrong = [example[f"negative_{n}"] for n in range(1, 5)]
        assert wrong[0] == "n"
        assert len({*wrong, "p1", "p2"}) == 6
    assert examples[0] == _load(tmp_path, rows, "mnrl", negatives=4)[0]


def test_rows_without_negatives_need_none_where_the_step_has_them(tmp_path: Path) -> None:
    rows = [{"query": f"q{n}", "positives": [f"p{n}"], "negatives": []} for n in range(3)]
    assert _load(tmp_path, rows, "mnrl", negatives=0)[0] == {"anchor": "q0", "positive": "p0"}
    lists = _load(tmp_path, rows, "lambda", kind="reranker", negatives=0)
    assert lists[0]["passages"][0] == "p0"
    assert lists[0]["labels"] == [1.0, 0.0]


def test_a_triplet_has_one_negative_each(tmp_path: Path) -> None:
    examples = _load(tmp_path, [_ROW], "triplet", negatives=2)
    assert [(each["positive"], each["negative_1"]) for each in map(examples.__getitem__, range(4))] == [
        ("p1", "n1"),
        ("p1", "n2"),
        ("p2", "n3"),
        ("p2", "n1"),
    ]
    assert len(examples) == 4


def test_lists_begin_with_the_best(tmp_path: Path) -> None:
    examples = _load(tmp_path, [_ROW | {"grades": [1, 3]}], "listmle", kind="reranker", negatives=2)
    assert examples[0] == {
        "query": "q",
        "passages": ["p2", "p1", "n1", "n2"],
        "labels": [3.0, 1.0, 0.0, 0.0],
    }


def test_scores_stay_with_their_passages(tmp_path: Path) -> None:
    row = _ROW | {"scores": [5.0, 4.0, 1.0, 2.0, 3.0]}
    examples = _load(tmp_path, [row], "margin_mse", negatives=2)
    assert [examples[n]["label"] for n in range(2)] == [[5.0, 1.0, 2.0], [4.0, 3.0, 1.0]]
    pairs = _load(tmp_path, [row], "mse", kind="reranker", negatives=3)
    found = {pairs[n]["second"]: pairs[n]["label"] for n in range(len(pairs))}
    assert found == {"p1": 5.0, "p2": 4.0, "n1": 1.0, "n2": 2.0, "n3": 3.0}


def test_scored_pairs_are_pairs(tmp_path: Path) -> None:
    examples = _load(tmp_path, scored(3), "cosent")
    assert [examples[n]["label"] for n in range(3)] == [1.0, 0.5, 0.0]


def test_a_reranker_s_passages_carry_their_prompt(tmp_path: Path) -> None:
    examples = _load(tmp_path, [_ROW], "bce", kind="reranker", before_passages="text: ")
    assert [examples[n]["second"] for n in range(3)] == ["text: p1", "text: p2", "text: n1"]


def _examples(pairs: list[tuple[int, int]]) -> Examples:
    """Return examples of queries (numbers from 0) and of passages (from 1000)."""
    answers: dict[int, frozenset[int]] = {}
    for query, passage in pairs:
        answers[query] = answers.get(query, frozenset()) | {1000 + passage}
    texts = [str(number) for number in range(1100)]
    examples = [Example(query, (1000 + passage,)) for query, passage in pairs]
    return Examples("columns", texts, examples, answers, len(pairs), 0)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    pairs=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=80),
    batch=st.integers(1, 6),
    epoch=st.integers(0, 3),
    apart=st.booleans(),
)
def test_two_processes_see_the_steps_of_one(
    pairs: list[tuple[int, int]], batch: int, epoch: int, apart: bool
) -> None:
    examples = _examples(pairs)
    both = Batches(examples, batch, 2, 7, apart=apart)
    one = Batches(examples, 2 * batch, 1, 7, apart=apart)
    for each in (both, one):
        each.set_epoch(epoch)
    shared = list(both)
    assert len(shared) == len(both)
    assert {len(each) for each in shared} <= {both.batch_size}
    if one.batch_size == 2 * both.batch_size:
        steps = [sorted(first + second) for first, second in zip(shared[::2], shared[1::2], strict=True)]
        assert steps == [sorted(step) for step in one]


def test_texts_that_answer_each_other_s_queries_are_kept_apart() -> None:
    examples = _examples([(number // 4, number) for number in range(64)])  # 16 queries with 4 passages each
    batches = Batches(examples, 8, 2, 0, apart=True)
    assert batches.batch_size == 8
    seen = []
    for epoch in range(3):
        batches.set_epoch(epoch)
        steps = list(batches)
        for first, second in zip(steps[::2], steps[1::2], strict=True):
            queries = [examples.examples[each].query for each in (*first, *second)]
            assert len(set(queries)) == 16
        seen.append(steps)
    assert seen[0] != seen[1]


def test_a_query_of_very_many_passages_does_not_have_the_same_others_seen_again_and_again() -> None:
    """Of its passages each step takes one, and the examples beside it are those that were seen again least lately."""
    examples = _examples([(0, number) for number in range(60)] + [(n, 60 + n) for n in range(1, 30)])
    seen = Counter(each for step in Batches(examples, 4, 1, 0, apart=True) for each in step)
    others = [seen[each] for each in range(60, 89)]
    assert sum(seen.values()) == 88
    assert max(others) - min(others) <= 2
    assert max(seen[each] for each in range(60)) == 1


def test_examples_that_do_not_fill_a_step_make_a_smaller_one() -> None:
    batches = Batches(_examples([(number, number) for number in range(5)]), 32, 2, 0, apart=True)
    assert [len(each) for each in batches] == [2, 2]
    none = Batches(_examples([(0, 0)]), 32, 2, 0, apart=True)
    assert list(none) == []
    assert len(none) == 0
