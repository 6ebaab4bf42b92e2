"""What is told of a training: curves, sections of the card, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aidocks.plan import UnitContext
from aidocks.specs.train_data import DataSummary, LengthSummary, SkippedRows
from aidocks.specs.train_llm_result import LLMTrainResult, Sample
from aidocks.training.figures import draw_curves
from aidocks.training.measuring import Measures, comparisons
from aidocks.training.report import (
    WriteTrainingReport,
    all_hyperparameters,
    card_sections,
    shown,
    verdict_sentence,
)
from aidocks.training.run import AdapterSettings, History, LLMHyperparameters, Point
from aidocks.training.samples import asked_of, told, whole_text

POINTS = tuple(
    Point(
        step=step,
        loss=3.0 / step,
        eval_loss=2.0 if step % 20 == 0 else None,
        learning_rate=1e-4,
        further={"reward": step / 100, "reward_std": 0.1, "rewards/margins": step / 10},
    )
    for step in range(1, 101)
)
GAIN = comparisons("sft", Measures(nats=(9.0, 8.0, 9.5) * 5, tokens=(3,) * 15),
                   Measures(nats=(6.0, 5.5, 6.2) * 5, tokens=(3,) * 15))  # fmt: skip


def result(**changes: Any) -> LLMTrainResult:
    data = DataSummary(
        dataset="/secret/place/rows.jsonl",
        format="prompt_completion",
        detected=True,
        fields={"prompt": "question", "completion": "answer"},
        rows=20,
        train=15,
        held_out=3,
        skipped=(SkippedRows(reason="completion is empty", count=2, lines=(4, 9)),),
        tokens=900,
        loss_tokens=400,
        truncated=1,
        lengths=LengthSummary(median=50, p95=70, longest=90),
        sha256="f" * 64,
    )
    settings: dict[str, Any] = {
        "model": "m",
        "base_model": "/secret/place/base",
        "method": "sft",
        "adapter": "lora",
        "merged": True,
        "backend": "trl",
        "backend_reason": "no GPU",
        "data": data,
        "steps": 10,
        "epochs": 1.0,
        "held_out": GAIN,
        "samples": (Sample(prompt="Why?", before="No.", after="Because."),),
        "hyperparameters": {"learning_rate": 1e-4, "beta": None},
    }
    return LLMTrainResult(**(settings | changes))


@pytest.mark.parametrize("method", ["sft", "dpo", "grpo"])
def test_curves_are_a_picture_and_always_the_same(method: Any) -> None:
    picture = draw_curves(method, POINTS)
    assert picture is not None
    assert picture.startswith(b"\x89PNG")
    assert picture == draw_curves(method, POINTS)


def test_without_points_there_is_no_picture() -> None:
    assert draw_curves("sft", ()) is None
    assert draw_curves("sft", (Point(step=1),)) is None


def test_the_card_tells_data_figures_samples_and_settings() -> None:
    sections = {section.title: section for section in card_sections(result())}
    assert list(sections) == ["Training", "Data", "Before and after", "Samples", "Hyper-parameters"]
    assert "2 rows were left out: completion is empty." in sections["Data"].notes
    table = sections["Before and after"].table
    assert table is not None
    assert table.rows[0][0] == "perplexity"
    assert table.rows[0][-1] == "improved"
    settings = sections["Hyper-parameters"].table
    assert settings is not None
    assert settings.rows == (("learning_rate", "0.0001"),)


def test_the_card_shows_settings_that_do_something() -> None:
    chosen = all_hyperparameters(LLMHyperparameters(learning_rate=1e-4), AdapterSettings())
    assert set(LLMHyperparameters.model_fields) < set(chosen)

    def shown_for(**changes: Any) -> set[str]:
        sections = {s.title: s for s in card_sections(result(hyperparameters=chosen, **changes))}
        table = sections["Hyper-parameters"].table
        assert table is not None
        return {name for name, _ in table.rows}

    of_all = {"learning_rate", "seed", "max_length", "optim"}
    assert of_all | {"lora_rank", "lora_alpha", "packing"} <= shown_for()
    assert not {"num_generations", "temperature", "desirable_weight", "virtual_tokens"} & shown_for()
    whole = shown_for(method="kto", adapter="full")
    assert of_all | {"desirable_weight"} <= whole
    assert not {"lora_rank", "rslora", "packing"} & whole
    assert {"num_generations", "max_completion_length"} <= shown_for(method="grpo")


def test_a_training_that_was_of_no_use_says_so() -> None:
    same = Measures(nats=(9.0, 8.0), tokens=(3, 3))
    assert "cannot be told from the base" in verdict_sentence(comparisons("sft", same, same))
    worse = comparisons("grpo", Measures(rewards=(1.0, 0.9) * 9), Measures(rewards=(0.1, 0.2) * 9))
    assert "WORSE" in verdict_sentence(worse)


def test_nothing_of_this_machine_is_in_what_is_published() -> None:
    published = shown(result())
    assert "/secret" not in published.model_dump_json()
    assert "/secret" not in "".join(s.model_dump_json() for s in card_sections(result()))


def test_the_report_is_written_with_the_files_of_tensorboard(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events.1").write_bytes(b"x")
    unit = WriteTrainingReport(
        directory=tmp_path / "model",
        result=result(),
        history=History(points=POINTS),
        method="sft",
        tensorboard=tmp_path / "tensorboard",
    )
    written = {
        f.path.relative_to(tmp_path / "model").as_posix() for f in unit.run(UnitContext(tmp_path)).files
    }
    assert written == {
        "report/report.json",
        "report/history.json",
        "report/samples.json",
        "report/curves.png",
        "report/tensorboard/events.1",
    }
    history = json.loads((tmp_path / "model/report/history.json").read_text())
    assert history["points"][0]["loss"] == 3.0


def test_prompts_are_found_in_every_form_of_rows() -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert asked_of({"messages": turns}) == (turns[:1], "Hello", None)
    assert asked_of({"prompt": "Why?", "chosen": "So.", "rejected": "No."})[:2] == ("Why?", "So.")
    begun = asked_of({"text": "one two three four"})
    assert (begun.prompt, begun.reference) == ("one two", " three four")
    assert told(turns) == "user: Hi\nassistant: Hello"
    assert whole_text({"prompt": turns[:1], "completion": turns[1:]}) == "Hi\nHello"
