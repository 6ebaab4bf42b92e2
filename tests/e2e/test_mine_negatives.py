"""Mining from the request to a data set that a training can name, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aidocks.datasets.store import DatasetStore
from aidocks.errors import IncompatibleModels, InvalidSpec, NameTaken, UnknownModel
from aidocks.jobs.model import Event, Status
from aidocks.jobs.runner import run_locally
from aidocks.retrieval.data.check import check_retrieval_data
from aidocks.settings import Settings
from aidocks.specs.mine_negatives import MineNegativesResult, MineNegativesSpec
from aidocks.training.data.rows import source_of_files
from tests.support.driving import write_rows
from tests.support.tiny_retrievers import make_embedder, make_reranker, questions

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with models, and rows that have no negatives."""
    directory = tmp_path_factory.mktemp("place")
    make_embedder(directory / "embedder")
    make_reranker(directory / "reranker")
    write_rows(
        directory / "pairs.jsonl",
        [{"query": row["query"], "positive": row["pos"][0]} for row in questions(60)],
    )
    write_rows(directory / "more.jsonl", [{"text": text} for row in questions(60) for text in row["neg"]])
    write_rows(
        directory / "scored.jsonl",
        [{"sentence1": f"one {n}", "sentence2": "two", "score": n / 8} for n in range(9)],
    )
    return directory


def run(place: Path, home: Path, **body: Any) -> tuple[MineNegativesResult, list[str]]:
    settings = Settings(home=home, allowed_roots=(place,))
    spec = MineNegativesSpec.model_validate({"dataset": str(place / "pairs.jsonl"), **body})
    events: list[Event] = []
    job = run_locally("mine-negatives", spec, settings, on_event=events.append)
    assert job.status is Status.SUCCEEDED, job.error
    told = [str(event.data["text"]) for event in events if event.type == "message"]
    return MineNegativesResult.model_validate(job.result), told


def test_negatives_become_a_data_set(place: Path, home: Path) -> None:
    result, told = run(
        place,
        home,
        model=str(place / "embedder"),
        corpus=str(place / "more.jsonl"),
        per_query=4,
        margin=0.001,
        max_length=64,
        name="found",
    )
    assert result.queries == 60
    assert result.passages > 60, "those of the file are looked in, too"
    assert result.rank_of_positive is not None
    stored = DatasetStore(home / "datasets").get("found")
    assert (result.dataset, result.file_id) == ("found", stored.id)
    rows = [json.loads(line) for line in stored.path.read_text().splitlines()]
    assert sum(len(row["neg"]) for row in rows) == result.negatives > 60
    assert all(row["pos"] and not set(row["pos"]) & set(row["neg"]) for row in rows)
    further = {row["text"] for row in map(json.loads, (place / "more.jsonl").read_text().splitlines())}
    assert any(set(row["neg"]) & further for row in rows)
    found = check_retrieval_data(source_of_files("found", [stored.path]), "embedding")
    assert (found.rows, found.queries, found.negatives) == ("ranking", 60, result.negatives)
    assert any("hard negatives for 60 queries" in one for one in told)


def test_words_alone_find_some_and_settings_without_effect_are_said(place: Path, home: Path) -> None:
    result, told = run(place, home, per_query=2, max_score=0.5, query_prompt="query: ")
    assert result.negatives == 120
    assert result.dataset.startswith("pairs-negatives-")
    assert [note.split()[0] for note in result.notes] == ["`max_score`", "`query_prompt`", "No"]
    assert set(result.notes) <= set(told)


def test_a_judge_decides_what_is_too_alike(place: Path, home: Path) -> None:
    result, _ = run(place, home, judge=str(place / "reranker"), per_query=3, margin=0.001, max_length=64)
    assert result.too_alike > 0
    assert result.rank_of_positive is None


@pytest.mark.parametrize(
    ("body", "error", "field"),
    [
        ({"bm25": False}, InvalidSpec, "bm25"),
        ({"dataset": "scored.jsonl"}, InvalidSpec, "dataset"),
        ({"dataset": "missing.jsonl"}, InvalidSpec, "dataset"),
        ({"model": "reranker"}, IncompatibleModels, "model"),
        ({"judge": "embedder"}, IncompatibleModels, "judge"),
        ({"model": "nothing"}, UnknownModel, "model"),
        ({"corpus": "embedder"}, InvalidSpec, "corpus"),
        ({"name": "taken"}, NameTaken, "name"),
        ({"name": "file-0123456789abcdef01234567"}, InvalidSpec, "name"),
    ],
)
def test_what_cannot_succeed_is_refused_before_any_work(
    place: Path, home: Path, body: dict[str, Any], error: type[Exception], field: str
) -> None:
    DatasetStore(home / "datasets").add(place / "pairs.jsonl", "taken")
    settings = Settings(home=home, allowed_roots=(place,))
    asked = {
        name: str(place / value) if isinstance(value, str) and name != "name" else value
        for name, value in body.items()
    }
    spec = MineNegativesSpec.model_validate({"dataset": str(place / "pairs.jsonl"), **asked})
    with pytest.raises(error) as refused:
        run_locally("mine-negatives", spec, settings)
    assert getattr(refused.value, "field", None) == field
