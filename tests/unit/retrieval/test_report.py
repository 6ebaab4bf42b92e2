"""What is told of a training: the verdict aloud, the card, the report's files and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aidocks.plan import UnitContext
from aidocks.retrieval.figures import draw_figures
from aidocks.retrieval.report import (
    FIGURES,
    WriteRetrievalReport,
    card_sections,
    domain_sentence,
    has_effect,
    shown,
    verdict_of,
    worth_notes,
)
from aidocks.specs.train_llm_result import TrainEstimate
from aidocks.specs.train_retrieval_result import (
    Domain,
    Figure,
    FoundExample,
    RankingData,
    RetrieverTrainResult,
)
from aidocks.training.report import CURVES
from aidocks.training.run import History, Point

ESTIMATE = TrainEstimate(
    parameters=22_000_000,
    trainable=1000,
    weights_bytes=1,
    gradients_bytes=1,
    optimizer_bytes=1,
    activations_bytes=1,
    total_bytes=4,
    fits=True,
    workers=1,
    steps=10,
)
PLACE = "/data/of/this/machine/squad.jsonl"


def figure(verdict: Any = "improved", **given: Any) -> Figure:
    fields = {
        "metric": "ndcg@10",
        "before": 0.5,
        "after": 0.75,
        "delta": 0.25,
        "low": 0.2,
        "high": 0.3,
        "before_low": 0.4,
        "before_high": 0.6,
        "after_low": 0.7,
        "after_high": 0.8,
        "p": 0.001,
        "verdict": verdict,
    }
    return Figure(**(fields | given))


def domain(verdict: Any = "improved", *, trained: bool = True, **given: Any) -> Domain:
    fields = {"dataset": PLACE, "trained": trained, "rows": "ranking", "queries": 60, "passages": 900}
    return Domain(**(fields | {"figures": (figure(verdict),)} | given))


def result(**given: Any) -> RetrieverTrainResult:
    data = RankingData(
        dataset=PLACE,
        format="query_lists",
        detected=True,
        fields={"query": "query", "positive": "pos"},
        rows="ranking",
        lines=600,
        train=540,
        held_out=60,
        leaked=3,
        shared_passages=5,
    )
    fields = {
        "base_model": "/models/of/this/machine/minilm",
        "kind": "embedding",
        "loss": "mnrl",
        "adapter": "lora",
        "merged": True,
        "dimensions": 384,
        "max_length": 256,
        "device": "cpu",
        "workers": 1,
        "precision": "float32",
        "trainable": 1000,
        "parameters": 22_000_000,
        "estimate": ESTIMATE,
        "licence": "apache-2.0",
        "data": (data,),
        "steps": 10,
        "epochs": 1.0,
        "reload_error": 1e-7,
        "mined": 1234,
        "domains": (domain(), domain("worse", trained=False)),
        "examples": (
            FoundExample(dataset=PLACE, query="where?", right="there " * 100, rank_before=None, rank_after=1),
        ),
        "hyperparameters": {"temperature": 0.05, "margin": 0.3, "lora_rank": 16, "negatives": 1},
    }
    return RetrieverTrainResult(**(fields | given))


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ([], None),
        ([domain("improved", trained=False)], None),
        ([domain("improved")], "improved"),
        ([domain("improved"), domain("not distinguishable")], "improved"),
        ([domain("improved"), domain("worse")], "worse"),
        ([domain("not distinguishable"), domain("improved", trained=False)], "not distinguishable"),
    ],
)
def test_the_verdict_is_that_of_the_trained_domains(found: list[Domain], verdict: Any) -> None:
    assert verdict_of(found) == verdict


def test_what_did_not_improve_is_said_aloud() -> None:
    notes = worth_notes([domain("not distinguishable")], has_trained=True)
    assert "NOT" in notes[0]
    assert "cannot be told" in notes[1]
    worse = worth_notes([domain("worse")], has_trained=True)
    assert "WORSE" in worse[1]


def test_what_improved_needs_no_note_and_what_was_forgotten_does() -> None:
    assert (
        worth_notes([domain("improved"), domain("not distinguishable", trained=False)], has_trained=True)
        == ()
    )
    (note,) = worth_notes([domain("improved"), domain("worse", trained=False)], has_trained=True)
    assert "WORSE" in note
    (unknown,) = worth_notes([domain("improved", trained=False)], has_trained=False)
    assert "held out" in unknown


def test_sentences_give_figures_and_intervals_and_no_directories() -> None:
    told = domain_sentence(domain()) or ""
    for word in ("squad.jsonl", "nDCG@10", "0.5000", "0.7500", "+0.2000 to +0.3000"):
        assert word in told
    assert "/data" not in told
    assert domain_sentence(domain(figures=())) is None


def test_the_card_has_all_tables_and_no_directories() -> None:
    sections = card_sections(result())
    titles = [section.title for section in sections]
    assert titles == [
        "Training",
        "Data: squad.jsonl",
        "Before and after: squad.jsonl",
        "Before and after: squad.jsonl",
        "Examples",
        "Hyper-parameters",
    ]
    whole = json.dumps([section.model_dump(mode="json") for section in sections])
    for word in (
        "apache-2.0",
        "1,234 hard negatives",
        "3 rows were not trained on",
        "not found",
        "temperature",
    ):
        assert word in whole
    assert "margin" not in whole
    assert "this/machine" not in whole


def test_a_retriever_of_its_own_has_a_column() -> None:
    one = domain(figures=(figure(retriever=0.6),))
    table = card_sections(result(domains=(one,)))[2].table
    assert table is not None
    assert table.header[1] == "retriever alone"
    assert table.rows[0][1] == "0.6000"
    assert all(len(row) == len(table.header) for row in table.rows)


def test_settings_that_do_nothing_are_not_shown() -> None:
    assert has_effect("temperature", result())
    assert not has_effect("temperature", result(loss="cosent"))
    assert not has_effect("lora_rank", result(adapter="full"))
    assert not has_effect("gather_negatives", result())
    assert has_effect("gather_negatives", result(workers=2))


def test_the_report_is_written_and_the_same_each_time(tmp_path: Path) -> None:
    history = History(points=tuple(Point(step=n, loss=2.0 / n, learning_rate=1e-4) for n in range(1, 20)))
    written = []
    for name in ("one", "two"):
        unit = WriteRetrievalReport(
            directory=tmp_path / name, result=shown(result()), history=history, tensorboard=tmp_path / "none"
        )
        files = unit.run(UnitContext(tmp_path)).files
        written.append({file.path.relative_to(tmp_path / name).as_posix(): file.sha256 for file in files})
    assert written[0] == written[1]
    assert set(written[0]) == {
        "report/report.json", "report/history.json", "report/examples.json", CURVES, FIGURES
    }  # fmt: skip
    told = (tmp_path / "one" / "report" / "report.json").read_text()
    assert "this/machine" not in told
    RetrieverTrainResult.model_validate_json(told)


def test_nothing_measured_is_nothing_drawn() -> None:
    assert draw_figures(()) is None
    assert draw_figures((domain(figures=()),)) is None
    drawn = draw_figures((domain(), domain("worse", trained=False), domain(rows="scored", queries=9)))
    assert drawn is not None
    assert drawn.startswith(b"\x89PNG")
