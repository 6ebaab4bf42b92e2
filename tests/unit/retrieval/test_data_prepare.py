"""Preparing joins rows of one query, never trains on what it measures on, and tells what it made of the data."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aidocks.errors import InvalidSpec
from aidocks.plan import UnitContext
from aidocks.retrieval.data.beir import beir_source
from aidocks.retrieval.data.prepare import PreparedRetrieval, PrepareRetrievalData
from aidocks.training.data.rows import DataSource, source_of_files, source_of_rows
from aidocks.training.run import Rows


def prepare(
    place: Path, *datasets: Any, evals: Any = (), kind: Any = "embedding", **given: Any
) -> PreparedRetrieval:
    def sources(field: str, named: Any) -> dict[str, DataSource]:
        found = [one if isinstance(one, DataSource) else source_of_rows(one) for one in named]
        return {f"{field}[{n}]": one for n, one in enumerate(found)}

    unit = PrepareRetrievalData(
        kind=kind,
        datasets=sources("dataset", datasets),
        eval_datasets=sources("eval_dataset", evals),
        **({"directory": place / "data"} | given),
    )
    return PrepareRetrievalData.model_validate_json(unit.model_dump_json()).run(UnitContext(workspace=place))


def lines(rows: Rows | None) -> list[dict[str, Any]]:
    return [json.loads(line) for line in rows.path.read_text().splitlines()] if rows else []


def pairs(count: int, name: str = "q") -> list[dict[str, Any]]:
    return [{"query": f"{name}{n}", "positive": f"passage {n % (count - 5)}"} for n in range(count)]


def test_files_are_what_is_told_of_them(tmp_path: Path) -> None:
    made = prepare(tmp_path, pairs(40), eval_split=10)
    assert made.rows == "ranking"
    assert (made.data[0].train, made.data[0].held_out) == (30, 10)
    train, held_out = lines(made.train), lines(made.held_out)
    assert (len(train), len(held_out), made.train.count) == (30, 10, 30)
    assert not {row["query"] for row in train} & {row["query"] for row in held_out}
    assert train[0].keys() == held_out[0].keys() == {"query", "positives", "negatives", "set"}
    (measured,) = made.sets
    assert (measured.trained, measured.rows, measured.queries.count) == (True, "ranking", 10)
    assert measured.corpus == made.corpora[0]
    corpus = [row["text"] for row in lines(measured.corpus)]
    assert len(corpus) == len(set(corpus)) == 35
    found = {row["query"]: [corpus[int(line)] for line in row["relevant"]] for row in lines(measured.queries)}
    assert found == {row["query"]: row["positives"] for row in held_out}
    assert {file.path.name for file in made.files} == {path.name for path in (tmp_path / "data").iterdir()}
    for file in made.files:
        content = file.path.read_bytes()
        assert (file.bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert made.data[0].sha256 == made.train.sha256
    assert made.sentences[0].startswith(
        "inline: pairs (query, positive), 40 rows: 30 queries to train on, 10 held out; 30 right passages and 0 wrong "
        "ones to learn from; 35 different passages of 2 words in the median."
    )


def test_rows_of_one_query_are_joined_and_right_anywhere_is_right(tmp_path: Path) -> None:
    rows = [
        {"query": "What is it?", "pos": ["One"], "neg": ["two", "three"]},
        {"query": "what  IS it?", "pos": ["two"], "neg": ["ONE", "four"]},
        {"query": "What is it?", "pos": ["One"], "neg": ["two", "three"]},
        {"query": "another", "pos": ["five"]},
    ]
    made = prepare(tmp_path, rows, eval_split=0)
    assert lines(made.train) == [
        {"query": "What is it?", "positives": ["One", "two"], "negatives": ["three", "four"], "set": 0},
        {"query": "another", "positives": ["five"], "negatives": [], "set": 0},
    ]
    (data,) = made.data
    assert (data.duplicates, data.positives, data.negatives, data.passages) == (1, 3, 2, 5)
    assert made.sets == ()
    assert made.held_out is None
    assert (
        "2 passages that one row calls wrong and another right, of the same query, count as right."
        in (made.sentences[0])
    )


@pytest.mark.parametrize("kind", ["embedding", "reranker"])
def test_pairs_labelled_0_and_1_become_rankings(tmp_path: Path, kind: Any) -> None:
    rows = [
        {"query": "a", "passage": "right", "label": 1},
        {"query": "a", "passage": "wrong", "label": 0},
        {"query": "b", "passage": "right", "label": 1.0},
        {"query": "c", "passage": "wrong", "label": 0},
    ]
    made = prepare(tmp_path, rows, kind=kind, eval_split=0)
    assert [(row["query"], row["positives"], row["negatives"]) for row in lines(made.train)] == [
        ("a", ["right"], ["wrong"]),
        ("b", ["right"], []),
    ]
    assert [(one.reason, one.count, one.lines) for one in made.data[0].skipped] == [
        ("its query has no right passage", 1, (4,))
    ]
    assert "labelled 0 and 1" in made.sentences[0]


def test_labelled_pairs_of_different_queries_stay_scores_for_vectors_alone(tmp_path: Path) -> None:
    rows = [{"sentence1": f"a{n}", "sentence2": f"b{n}", "label": n % 2} for n in range(8)]
    embedding = prepare(tmp_path / "e", rows, eval_split=0)
    assert (embedding.rows, embedding.data[0].train, embedding.corpora) == ("scored", 8, ())
    reranker = prepare(tmp_path / "r", rows, kind="reranker", eval_split=0)
    assert (reranker.rows, reranker.data[0].train) == ("ranking", 4)
    alike = prepare(tmp_path / "a", [row | {"label": 1} for row in rows], eval_split=0)
    assert (alike.rows, alike.data[0].train) == ("ranking", 8)


def test_scores_are_brought_to_0_to_1_and_pairs_never_lie_on_both_sides(tmp_path: Path) -> None:
    rows = [
        {"sentence1": f"a{n // 2}", "sentence2": f"b{n}", "score": round(n / 8, 3)} for n in range(40)
    ] + [{"sentence1": "b7", "sentence2": "a3", "score": 1.0}]
    made = prepare(tmp_path, rows, eval_split=0.25)
    train, held_out = lines(made.train), lines(made.held_out)
    assert train[0].keys() == {"first", "second", "score"}
    assert {row["score"] for row in train + held_out} <= {n / 40 for n in range(41)}
    assert not {row["first"] for row in train} & {row["first"] for row in held_out}
    either_way = [{frozenset((row["first"], row["second"])) for row in rows} for rows in (train, held_out)]
    assert not either_way[0] & either_way[1]
    assert lines(made.sets[0].queries) == held_out
    assert made.sets[0].corpus is None
    assert "Scores go up to 5, and are divided by that." in made.sentences[0]
    assert made.data[0].train + made.data[0].held_out + made.data[0].leaked == 41


def test_what_is_measured_on_is_trained_on_in_no_data_set(tmp_path: Path) -> None:
    first, second = pairs(30), pairs(30)[10:] + pairs(10, name="other")
    evals = [{"query": " Q3 ", "positive": "passage 3"}, {"query": "new", "positive": "another passage"}]
    made = prepare(tmp_path, first, second, evals=[evals], eval_split=6)
    train = lines(made.train)
    measured = {row["query"].strip().lower() for one in made.sets for row in lines(one.queries)}
    assert not {row["query"] for row in train} & measured
    assert [(one.trained, one.name) for one in made.sets] == [
        (True, "inline"),
        (True, "inline"),
        (False, "inline"),
    ]
    assert [one.held_out for one in made.data] == [6, 6, 2]
    assert sum(one.leaked for one in made.data) > 0
    assert [one.train + one.held_out + one.leaked for one in made.data] == [30, 30, 2]
    assert {row["set"] for row in train} == {0, 1}
    assert made.data[2].shared_passages == any("passage 3" in row["positives"] for row in train)
    assert "only measured on" in made.sentences[2]


def test_with_data_to_measure_on_nothing_is_held_out_unless_asked(tmp_path: Path) -> None:
    made = prepare(tmp_path, pairs(30), evals=[pairs(9, name="e")])
    assert (made.held_out, [one.trained for one in made.sets]) == (None, [False])
    made = prepare(tmp_path, pairs(30))
    assert made.data[0].held_out == 8


def test_measuring_is_bounded_and_right_passages_stay_findable(tmp_path: Path) -> None:
    rows = [{"query": f"q{n}", "pos": [f"p{n}"], "neg": [f"n{n}"]} for n in range(60)]
    made = prepare(tmp_path, rows, eval_split=30, most_queries=10, most_passages=25)
    (measured,) = made.sets
    assert (measured.queries.count, made.held_out and made.held_out.count) == (10, 30)
    assert made.corpora[0].count == 120
    corpus = [row["text"] for row in lines(measured.corpus)]
    assert len(corpus) == 25
    for row in lines(measured.queries):
        number = row["query"][1:]
        assert [corpus[int(line)] for line in row["relevant"]] == [f"p{number}"]
        assert {corpus[line] for line in row["candidates"]} == {f"p{number}", f"n{number}"}
    assert "(10 of them are measured on)" in made.sentences[0]
    assert "look in 25 passages" in made.sentences[0]


def test_a_passage_that_is_the_query_itself_is_marked(tmp_path: Path) -> None:
    # Questions that mean the same: each is asked, and is what another one should find.
    rows = [{"anchor": f"Question {n}?", "positive": f"question {n ^ 1}?"} for n in range(20)]
    rows += [{"anchor": "alone", "positive": "nothing like it"}, {"anchor": "echo", "positive": "Echo"}]
    made = prepare(tmp_path, pairs(10), evals=[rows]).sets[0]
    texts = [row["text"] for row in lines(made.corpus)]
    found = {row["query"]: row.get("itself") for row in lines(made.queries)}
    assert all(texts[found[f"Question {n}?"]] == f"question {n}?" for n in range(20))
    assert (found["alone"], found["echo"]) == (None, None)


def test_the_order_of_candidates_does_not_tell_which_are_right(tmp_path: Path) -> None:
    rows = [{"query": f"q{n}", "pos": [f"p{n}"], "neg": [f"n{n}", f"m{n}"]} for n in range(80)]
    made = prepare(tmp_path, rows, eval_split=40)
    places = [
        row["candidates"].index(int(line)) for row in lines(made.sets[0].queries) for line in row["relevant"]
    ]
    assert {0, 1, 2} == set(places)


def test_grades_and_scores_are_kept_where_all_rows_have_them(tmp_path: Path) -> None:
    graded = [{"query": f"q{n}", "documents": ["a", f"b{n}", "c"], "labels": [3, 1, 0]} for n in range(4)]
    (row, *_) = lines(prepare(tmp_path, graded, eval_split=0).train)
    assert row == {
        "query": "q0",
        "positives": ["a", "b0"],
        "negatives": ["c"],
        "grades": [3, 1],
        "set": 0,
    }
    scored = [
        {"query": f"q{n}", "pos": ["a"], "neg": ["b"], "pos_scores": [0.9], "neg_scores": [0.1]}
        for n in range(4)
    ]
    (row, *_) = lines(prepare(tmp_path, scored, eval_split=0).train)
    assert row["scores"] == [0.9, 0.1]
    made = prepare(tmp_path, [*scored, {"query": "q", "pos": ["a"], "neg": ["b"]}], eval_split=0)
    assert "scores" not in lines(made.train)[0]
    assert "Scores are not used" in made.sentences[0]


def test_columns_of_prompts_are_said_to_be_left(tmp_path: Path) -> None:
    rows = [{"query": f"q{n}", "pos": ["p"], "neg": [], "prompt": "find"} for n in range(4)]
    made = prepare(tmp_path, rows, eval_split=0)
    assert made.data[0].unused == ("prompt",)
    assert "`query_prompt`" in made.sentences[0]


def test_a_beir_folder_is_trained_on(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": f"d{n}", "title": "T" if n % 2 else "", "text": f"passage {n}"} for n in range(30)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    queries = [{"_id": str(n), "text": f"query {n}"} for n in range(20)]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    judged = [f"{n}\td{n}\t2\n{n}\td{n + 1}\t0\n" for n in range(20)]
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(judged))
    source = beir_source(folder, "./folder", "train[:16]", [tmp_path], "dataset")
    made = prepare(tmp_path, source, eval_split=4)
    assert (made.data[0].format, made.data[0].train, made.data[0].held_out) == ("beir", 12, 4)
    assert made.corpora[0].count == 30
    for row in lines(made.train):
        number = int(row["query"].split()[1])
        text = f"T passage {number}" if number % 2 else f"passage {number}"
        assert (row["positives"], row["grades"], len(row["negatives"])) == ([text], [2], 1)
    assert set(lines(made.sets[0].queries)[0]["relevant"].values()) == {2}


def scored(count: int) -> list[dict[str, Any]]:
    return [{"sentence1": f"Q{n}", "sentence2": f"b{n}", "score": n / count} for n in range(count)]


def test_all_data_sets_that_are_trained_on_are_of_one_kind(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidSpec, match="inline has queries with passages, inline has pairs with scores"
    ) as error:
        prepare(tmp_path, pairs(10), scored(4))
    assert error.value.field == "dataset[1]"
    assert "eval_dataset" in (error.value.hint or "")


@pytest.mark.parametrize("kind", ["embedding", "reranker"])
def test_what_is_measured_on_may_be_of_another_kind(tmp_path: Path, kind: Any) -> None:
    made = prepare(tmp_path / "a", pairs(40), evals=[scored(4)], kind=kind, eval_split=8)
    assert (made.rows, [one.rows for one in made.sets]) == ("ranking", ["ranking", "scored"])
    assert (made.sets[1].corpus, len(made.corpora), made.data[1].rows) == (None, 1, "scored")
    # Queries of both kinds are told apart: those of the pairs are not trained on.
    assert not {"q0", "q1", "q2", "q3"} & {row["query"] for row in lines(made.train)}
    other = prepare(tmp_path / "b", scored(40), evals=[pairs(10)], kind=kind)
    assert (other.rows, other.corpora, [one.rows for one in other.sets]) == ("scored", (), ["ranking"])
    assert other.sets[0].corpus is not None
    assert other.data[0].leaked == 10


def test_a_training_of_what_is_measured_on_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidSpec, match=r"Nothing of inline is left to train on: 0 .* and 10 are in another"
    ):
        prepare(tmp_path, pairs(10), evals=[pairs(10)])
    assert not list((tmp_path / "data").iterdir())


def test_rows_that_are_added_later_leave_held_out_what_was(tmp_path: Path) -> None:
    held = [
        {row["query"] for row in lines(prepare(tmp_path / str(count), pairs(count), eval_split=10).held_out)}
        for count in (100, 104)
    ]
    assert len(held[0] & held[1]) >= 8
    again = prepare(tmp_path / "again", pairs(100), eval_split=10)
    assert again.train.sha256 == prepare(tmp_path / "100", pairs(100), eval_split=10).train.sha256
    other = prepare(tmp_path / "other", pairs(100), eval_split=10, seed=1)
    assert {row["query"] for row in lines(other.held_out)} != held[0]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 12), st.integers(0, 6), st.lists(st.integers(0, 9), max_size=3)),
        min_size=4,
        max_size=40,
    ),
    split=st.sampled_from([0, 2, 0.3]),
)
def test_whatever_the_rows_both_sides_are_apart_and_nothing_is_lost(
    tmp_path: Path, rows: list[tuple[int, int, list[int]]], split: float
) -> None:
    data = [
        {"query": f"q{query}", "pos": [f"p{right}"], "neg": [f"p{n}" for n in wrong]}
        for query, right, wrong in rows
    ]
    made = prepare(tmp_path, data, eval_split=split)
    train, held_out = lines(made.train), lines(made.held_out)
    asked = [row["query"] for row in train + held_out]
    assert sorted(asked) == sorted({row["query"] for row in data})
    for row in train + held_out:
        assert set(row["positives"]) == {
            p for one in data if one["query"] == row["query"] for p in one["pos"]
        }
        assert not set(row["positives"]) & set(row["negatives"])
    texts = {text for one in data for text in (*one["pos"], *one["neg"])}
    assert {row["text"] for row in lines(made.corpora[0])} == texts


def test_the_shared_data_are_read(tmp_path: Path, shared_data: Path) -> None:
    squad = source_of_files("squad", [shared_data / "rerank_squad.jsonl"])
    cranfield = beir_source(shared_data / "cranfield", "cranfield", "test", [shared_data], "dataset[1]")
    made = prepare(tmp_path, squad, cranfield, evals=[])
    assert [(one.format, one.train, one.held_out) for one in made.data] == [
        ("query_lists", 540, 60),
        ("beir", 125, 14),
    ]
    assert [one.count for one in made.corpora] == [503, 1398]
    # Two documents of Cranfield are empty, and one judgement is of one of them.
    assert [one.count for one in made.data[1].skipped] == [2, 1]
