"""Trainings of what finds texts, from the request to the registry, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aidocks.jobs.model import Event, Status
from aidocks.jobs.runner import run_locally
from aidocks.operations import find_operation
from aidocks.settings import Settings
from aidocks.specs.read import build_spec
from aidocks.specs.train_retrieval_result import RetrieverTrainResult
from tests.support.tiny_retrievers import make_embedder, make_encoder, questions

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def train(
    operation: str, body: dict[str, Any], home: Path, root: Path
) -> tuple[RetrieverTrainResult, list[str]]:
    """Return the result of a training, and what was said meanwhile."""
    events: list[Event] = []
    registration = find_operation(operation)
    spec = build_spec(registration.spec_type(), body)
    settings = Settings(home=home, allowed_roots=(root,))
    job = run_locally(operation, spec, settings, on_event=events.append)
    assert job.status is Status.SUCCEEDED, job.error
    result = registration.load().read_result(job.result or {})
    assert isinstance(result, RetrieverTrainResult)
    return result, [str(event.data["text"]) for event in events if event.type == "message"]


def test_an_embedding_model_is_trained_measured_and_loaded_by_others(tmp_path: Path, home: Path) -> None:
    base = make_embedder(tmp_path / "base")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in questions(80)))
    body = {
        "base_model": str(base),
        "dataset": str(rows),
        "eval_split": 24,
        "mine_negatives": 2,
        "query_prompt": "who ",
        "adapter": "full",
        "learning_rate": 3e-3,
        "max_steps": 30,
        "per_device_train_batch_size": 16,
        "name": "finder",
    }
    result, said = train("train-emb", body, home, tmp_path)
    assert (result.kind, result.loss, result.steps, result.verdict) == ("embedding", "mnrl", 30, "improved")
    (domain,) = result.domains
    assert (domain.trained, domain.queries) == (True, 24)
    figure = domain.figures[0]
    assert figure.metric == "ndcg@10"
    assert figure.low is not None
    assert figure.low > 0
    assert result.reload_error is not None
    assert result.reload_error <= 1e-5
    assert result.mined
    assert result.tokens
    assert any("better than the base" in sentence for sentence in said)
    assert any("hard negatives" in sentence for sentence in said)

    assert result.path is not None
    model = Path(result.path)
    assert {"report/report.json", "report/history.json", "report/examples.json"} == set(result.files)
    assert all((model / picture).is_file() for picture in result.pictures)
    manifest = json.loads((model / "aidocks.json").read_text())
    assert manifest["operation"] == "train-emb"
    assert manifest["parents"][0]["field"] == "base_model"
    card = (model / "README.md").read_text()
    assert "Before and after: rows.jsonl" in card
    assert str(tmp_path) not in card
    assert not list((home / "checkpoints").glob("*/checkpoint-*"))

    from sentence_transformers import SentenceTransformer

    loaded = SentenceTransformer(str(model), device="cpu")
    assert loaded.prompts["query"] == "who "
    vectors = loaded.encode(["where is the city?"], prompt_name="query")
    assert vectors.shape == (1, 32)
    assert np.linalg.norm(vectors) == pytest.approx(1, abs=1e-5)


def test_the_original_s_reranker_is_trained_from_a_plain_encoder(tmp_path: Path, home: Path) -> None:
    base = make_encoder(tmp_path / "base")
    rows = tmp_path / "rr.json"
    rows.write_text(json.dumps(questions(60)))
    config = {
        "training_data": str(rows),
        "lora_rank": 8,
        "lora_alpha": 16,
        "max_steps": 12,
        "learning_rate": 5e-3,
        "max_prompt_length": 64,
        "max_seq_length": 8192,
        "max_total_length": 96,
        "load_in_4bit": False,
        "eval_data": None,
        "eval_split": 20,
    }
    body = {
        "base_model_path": str(base),
        "peft_model_name": "judge",
        "category": "rr",
        "method": "peft",
        "config": config,
    }
    result, said = train("train", body, home, tmp_path)
    assert (result.kind, result.loss, result.adapter, result.max_length) == ("reranker", "lambda", "lora", 96)
    assert result.verdict == "improved"
    assert any("random weights" in note for note in result.notes)
    assert any("random weights" in sentence for sentence in said)

    from sentence_transformers import CrossEncoder

    assert result.path is not None
    row = questions(60)[0]
    loaded = CrossEncoder(result.path, device="cpu")
    scores = loaded.predict([(row["query"], row["pos"][0]), (row["query"], row["neg"][0])])
    assert scores[0] > scores[1]


def test_a_training_that_does_not_help_says_so(tmp_path: Path, home: Path) -> None:
    base = make_embedder(tmp_path / "base")
    body = {
        "base_model": str(base),
        "dataset": questions(40),
        "max_steps": 1,
        "learning_rate": 1e-8,
        "merge_adapter": False,
        "name": "same",
    }
    result, said = train("train-emb", body, home, tmp_path)
    assert not result.merged
    assert result.verdict == "not distinguishable"
    assert any("NOT" in note for note in result.notes)
    assert any("NOT" in sentence for sentence in said)
    assert result.path is not None
    card = (Path(result.path) / "README.md").read_text()
    assert "did NOT improve" in card
    config = json.loads((Path(result.path) / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"
