"""Data are looked at before any work: files, rows and BEIR folders below the allowed roots, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aidocks.errors import InvalidSpec, PathNotAllowed
from aidocks.retrieval.data import check
from aidocks.retrieval.data.check import check_retrieval_data, retrieval_source
from aidocks.training.data.rows import DataSource, source_of_files, source_of_rows


def beir(directory: Path, **files: list[dict[str, Any]]) -> Path:
    """Write a BEIR folder of two queries and three passages."""
    corpus = [{"_id": f"d{n}", "title": "Title" if n else "", "text": f"passage {n}"} for n in range(3)]
    queries = [{"_id": f"q{n}", "text": f"query {n}"} for n in range(3)]
    (directory / "qrels").mkdir(parents=True)
    for name, rows in ({"corpus": corpus, "queries": queries} | files).items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ["query-id\tcorpus-id\tscore", "q0\td0\t1", "q0\td1\t2", "q1\td2\t1", "q1\td1\t0"]
    (directory / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return directory


def source(reference: Any, root: Path, split: str = "test", field: str = "dataset[1]") -> DataSource:
    context: Any = SimpleNamespace(resolver=SimpleNamespace(allowed_roots=(root,)), datasets_dir=None)
    found = retrieval_source(reference, context, field, split)
    assert found is not None
    return found


def test_a_beir_folder_is_a_data_set(tmp_path: Path) -> None:
    found = source(str(beir(tmp_path / "folder")), tmp_path)
    checked = check_retrieval_data(found, "embedding")
    assert (checked.format, checked.rows, checked.complete) == ("beir", "ranking", True)
    assert (checked.lines, checked.queries, checked.positives, checked.negatives) == (4, 2, 3, 1)


def test_files_and_rows_are_data_sets_as_elsewhere(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"query": "q", "positive": "p"}\n')
    assert check_retrieval_data(source(str(file), tmp_path), "reranker").queries == 1
    rows = [{"query": f"q{n}", "pos": [f"p{n}"], "pos_scores": [0.5]} for n in range(3)]
    checked = check_retrieval_data(source(rows, tmp_path), "reranker")
    assert (checked.format, checked.queries, checked.scored) == ("query_lists", 3, True)
    context: Any = SimpleNamespace(resolver=SimpleNamespace(allowed_roots=()), datasets_dir=None)
    assert retrieval_source("org/of-the-hub", context, "dataset", "train") is None


@pytest.mark.parametrize(
    ("split", "field", "message", "hint"),
    [
        ("train", "dataset_split", "has no split 'train'", "It has test."),
        ("test[1", "dataset_split", "is not a split", "train[:1000]"),
    ],
)
def test_a_beir_folder_has_named_splits(
    tmp_path: Path, split: str, field: str, message: str, hint: str
) -> None:
    beir(tmp_path / "folder")
    with pytest.raises(InvalidSpec) as refused:
        source(str(tmp_path / "folder"), tmp_path, split)
    assert (refused.value.field, message in str(refused.value)) == (field, True)
    assert hint in (refused.value.hint or "")


def test_another_folder_is_refused_by_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "corpus.jsonl").write_text("")
    with pytest.raises(InvalidSpec, match=r"it has no queries\.jsonl and no qrels/") as refused:
        source(str(tmp_path / "folder"), tmp_path)
    assert refused.value.field == "dataset[1]"


def test_nothing_outside_the_allowed_roots_is_read(tmp_path: Path) -> None:
    outside = beir(tmp_path / "outside")
    inside = tmp_path / "inside"
    with pytest.raises(PathNotAllowed):
        source(str(outside), inside)
    beir(inside / "folder")
    (inside / "folder" / "corpus.jsonl").unlink()
    (inside / "folder" / "corpus.jsonl").symlink_to(outside / "corpus.jsonl")
    with pytest.raises(PathNotAllowed):
        source(str(inside / "folder"), inside)


def test_a_link_within_the_allowed_roots_is_followed_whatever_it_leads_to(tmp_path: Path) -> None:
    folder = beir(tmp_path / "folder")
    (folder / "corpus.jsonl").rename(tmp_path / "texts.jsonl")
    (folder / "corpus.jsonl").symlink_to(tmp_path / "texts.jsonl")
    assert check_retrieval_data(source(str(folder), tmp_path), "embedding").queries == 2


def test_lines_of_a_beir_folder_that_are_bad_are_counted_by_file(tmp_path: Path) -> None:
    corpus = [{"_id": f"d{n}", "text": f"passage {n}"} for n in range(3)] + [{"_id": "d1", "text": "again"}]
    folder = beir(tmp_path / "folder", corpus=[*corpus, {"_id": "d9", "text": " "}])
    with (folder / "qrels" / "test.tsv").open("a") as file:
        file.write("q9\td0\t1\nq0\td9\t1\nq2\td0\tx\n")
    skipped = check_retrieval_data(source(str(folder), tmp_path), "embedding").skipped
    assert {(one.reason, one.lines) for one in skipped} == {
        ("in corpus.jsonl, its _id was there before", (4,)),
        ("in corpus.jsonl, text is empty", (5,)),
        ("in test.tsv, its query-id is not in queries.jsonl", (6,)),
        ("in test.tsv, its corpus-id is not in corpus.jsonl", (7,)),
        ("in test.tsv, score is no number", (8,)),
    }


def test_a_beir_folder_of_other_ids_is_refused(tmp_path: Path) -> None:
    folder = beir(tmp_path / "folder", queries=[{"_id": f"x{n}", "text": "query"} for n in range(3)])
    with pytest.raises(InvalidSpec, match=r"test\.tsv: its query-id is not in queries\.jsonl \(q0\)"):
        check_retrieval_data(source(str(folder), tmp_path), "embedding")


@pytest.mark.parametrize("format", ["auto", "beir", "pair"])
def test_of_a_large_data_set_the_beginning_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: Any
) -> None:
    monkeypatch.setattr(check, "CHECKED_BYTES", 10)
    monkeypatch.setattr(check, "CHECKED_ROWS", 2)
    checked = check_retrieval_data(
        source(str(beir(tmp_path / "folder")), tmp_path), "embedding", format=format
    )
    assert (checked.complete, checked.lines, checked.positives) == (False, 2, 2)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"query": f"q{n}", "positive": "p"}) + "\n" for n in range(5)))
    checked = check_retrieval_data(source_of_files("rows", [file]), "embedding")
    assert (checked.complete, checked.lines, checked.queries) == (False, 2, 2)


def test_mostly_bad_data_are_refused_with_line_and_column() -> None:
    rows = [{"query": "q", "pos": ["p"]}, {"query": "q", "pos": []}, {"query": "", "pos": ["p"]}]
    with pytest.raises(InvalidSpec) as refused:
        check_retrieval_data(source_of_rows(rows), "embedding", field="eval_dataset")
    assert str(refused.value).startswith("Row 2 of inline: pos is empty. 2 of 3 rows cannot be used.")
    assert refused.value.field == "eval_dataset"
    assert "1 row: query is empty (row 3)" in (refused.value.hint or "")


@pytest.mark.parametrize("scores", [[-0.5, 0.5], [0, 200]])
def test_scores_of_no_known_scale_are_refused(scores: list[float]) -> None:
    rows = [{"sentence1": f"a{n}", "sentence2": "b", "score": score} for n, score in enumerate(scores)]
    with pytest.raises(InvalidSpec, match="no known scale") as refused:
        check_retrieval_data(source_of_rows(rows), "embedding")
    assert '{"query": "sentence1", "positive": "sentence2"}' in (refused.value.hint or "")


def test_queries_without_any_right_passage_are_no_data() -> None:
    rows = [{"query": "q", "documents": ["a", "b"], "labels": [0, 0]}] * 2
    with pytest.raises(InvalidSpec, match="No query of inline has a right passage"):
        check_retrieval_data(source_of_rows(rows), "embedding")


def test_looking_needs_neither_torch_nor_numpy() -> None:
    code = (
        "import sys\n"
        "from aidocks.retrieval.data.check import check_retrieval_data\n"
        "from aidocks.training.data.rows import source_of_rows\n"
        "check_retrieval_data(source_of_rows([{'query': 'a', 'positive': 'b'}]), 'embedding')\n"
        "print({'torch', 'numpy', 'transformers', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
