"""What requests of ``/train/emb`` and ``/train/rerank`` name, what of them cannot be, and what is planned for them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from aidocks.errors import AIDocksError, IncompatibleModels, InvalidSpec, UnknownModel
from aidocks.jobs.submit import plan_context
from aidocks.models.parents import DescribeParent
from aidocks.operations import find_operation
from aidocks.plan import PlanContext, Stage, UnitContext
from aidocks.retrieval.build import RetrievalBuild
from aidocks.retrieval.course import RetrievalCourse
from aidocks.retrieval.data.prepare import PrepareRetrievalData
from aidocks.retrieval.request import Found, RetrievalRequest
from aidocks.settings import Settings
from aidocks.specs.read import build_spec
from aidocks.training.device import TrainingDevice
from aidocks.training.resuming import NoteIdentity
from tests.support.tiny_retrievers import make_embedder, make_encoder, make_reranker, questions

SCORED = [{"sentence1": f"the city {n}", "sentence2": f"a city {n}", "score": n / 40} for n in range(40)]
CPU = TrainingDevice(
    name="CPU",
    cuda=False,
    memory=8_000_000_000,
    cores=2,
    machine_cores=2,
    machine_memory=8_000_000_000,
    precision="bfloat16",
    flops=1e10,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, make in (("embedder", make_embedder), ("encoder", make_encoder), ("reranker", make_reranker)):
        (root / name).mkdir()
        make(root / name)
    return root


@pytest.fixture
def context(models: Path, home: Path) -> PlanContext:
    return plan_context(Settings(home=home, allowed_roots=(models,)), "job-1")


def spec_of(models: Path, kind: str, base: str = "embedder", **further: Any) -> Any:
    body = {"base_model": str(models / base), "dataset": questions(40), **further}
    return build_spec(find_operation(kind).spec_type(), body)


def preflight(context: PlanContext, kind: str, spec: Any) -> None:
    find_operation(kind).load().preflight(spec, context)


def build(context: PlanContext, spec: Any, device: TrainingDevice = CPU) -> RetrievalBuild:
    """Return a training with every choice made, its data prepared here, and no model read."""
    request = RetrievalRequest(spec, context)
    plan = request.look()
    stage = next(plan)
    assert isinstance(stage, Stage)
    results: list[Any] = []
    for unit in stage.units:
        if isinstance(unit, PrepareRetrievalData) or "hash" in unit.label:
            results.append(unit.run(UnitContext(context.workspace)))
        else:
            results.append(device)
    with pytest.raises(StopIteration) as ended:
        plan.send(results)
    found = ended.value.value
    assert isinstance(found, Found)
    return RetrievalBuild(request, found)


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        ("train-emb", "embedder"),
        ("train-emb", "encoder"),
        ("train-rerank", "reranker"),
        ("train-rerank", "encoder"),
    ],
)
def test_what_can_be_trained_is_not_refused(context: PlanContext, models: Path, kind: str, base: str) -> None:
    preflight(context, kind, spec_of(models, kind, base))


@pytest.mark.parametrize(
    ("kind", "base", "further", "field"),
    [
        ("train-emb", "reranker", {}, "base_model"),
        ("train-rerank", "embedder", {}, "base_model"),
        ("train-emb", "embedder", {"matryoshka": [64, 16]}, "matryoshka"),
        ("train-emb", "embedder", {"pooling": "cls"}, "pooling"),
        ("train-emb", "embedder", {"task": "retrieval"}, "task"),
        ("train-emb", "embedder", {"target_modules": ["q_proj"]}, "target_modules"),
        ("train-emb", "embedder", {"loss": "distill_kl"}, "loss"),
        ("train-emb", "embedder", {"dataset": SCORED, "mine_negatives": True}, "mine_negatives"),
        ("train-emb", "embedder", {"dataset": "no-such-data"}, "dataset"),
        ("train-emb", "embedder", {"eval_dataset": ["no-such-data", "nor-this"]}, "eval_dataset[0]"),
        ("train-emb", "embedder", {"mine_negatives": {"model": "unknown"}}, "mine_negatives.model"),
        ("train-emb", "embedder", {"distill_from": "unknown"}, "distill_from"),
        ("train-emb", "embedder", {"resume_from_checkpoint": "job-other"}, "resume_from_checkpoint"),
        ("train-emb", "embedder", {"deepspeed": 3}, "deepspeed"),
        ("train-rerank", "reranker", {"retriever": "unknown"}, "retriever"),
        ("train-rerank", "reranker", {"dataset": SCORED, "loss": "lambda"}, "loss"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    context: PlanContext, models: Path, kind: str, base: str, further: dict[str, Any], field: str
) -> None:
    with pytest.raises(AIDocksError) as refused:
        preflight(context, kind, spec_of(models, kind, base, **further))
    assert refused.value.field == field
    assert not context.workspace.exists()


@pytest.mark.parametrize(
    ("further", "field"),
    [
        ({"task": "retrieval"}, "task"),
        ({"task": "retrieval.passage", "merge_adapter": False}, "merge_adapter"),
        ({"task": "retrieval.passage"}, None),
        ({"merge_adapter": False}, None),
    ],
)
def test_of_adapters_for_tasks_one_is_trained_and_it_is_merged(
    context: PlanContext, models: Path, further: dict[str, Any], field: str | None
) -> None:
    if not (models / "tasks").exists():
        shutil.copytree(models / "embedder", models / "tasks")
        for side in ("retrieval_query", "retrieval_passage"):
            (models / "tasks" / side).mkdir()
            (models / "tasks" / side / "adapter_config.json").write_text("{}")
            (models / "tasks" / side / "adapter_model.safetensors").write_bytes(b"")
    spec = spec_of(models, "train-emb", "tasks", **further)
    if field is None:
        preflight(context, "train-emb", spec)
        return
    with pytest.raises(InvalidSpec) as refused:
        preflight(context, "train-emb", spec)
    assert refused.value.field == field
    assert refused.value.hint


def test_an_adapter_is_not_put_on_another_one(context: PlanContext, models: Path) -> None:
    adapter = models / "adapter"
    adapter.mkdir()
    named = {"base_model_name_or_path": str(models / "embedder"), "task_type": "FEATURE_EXTRACTION"}
    (adapter / "adapter_config.json").write_text(json.dumps(named))
    factors = {"base_model.model.encoder.layer.0.output.dense.lora_A.weight": np.zeros((1, 64), np.float32)}
    save_file(factors, adapter / "adapter_model.safetensors")
    spec = spec_of(models, "train-emb", "adapter")
    preflight(context, "train-emb", spec)
    made = build(context, spec)
    assert made.identity.base_model.count("+") == 1
    assert made.request.base.adapter == adapter
    assert (made.result("new").model, made.result("new").adapter) == (made.output, None)
    with pytest.raises(InvalidSpec, match="an adapter already") as refused:
        preflight(context, "train-emb", spec_of(models, "train-emb", "adapter", merge_adapter=False))
    assert refused.value.field == "merge_adapter"


def test_a_reranker_cannot_teach_what_only_embeds(context: PlanContext, models: Path) -> None:
    embedder = str(models / "embedder")
    with pytest.raises(IncompatibleModels) as refused:
        preflight(context, "train-emb", spec_of(models, "train-emb", distill_from=embedder))
    assert refused.value.field == "distill_from"
    with pytest.raises(UnknownModel):
        preflight(context, "train-emb", spec_of(models, "train-emb", distill_from="unknown"))


def test_an_embedding_model_looks_for_its_own_negatives_and_a_plain_encoder_does_not(
    context: PlanContext, models: Path
) -> None:
    def miner(kind: str, base: str, **mined: Any) -> Any:
        return RetrievalRequest(spec_of(models, kind, base, mine_negatives=mined), context).miner

    assert miner("train-emb", "embedder").model == models / "embedder"
    assert miner("train-emb", "encoder") is None
    assert miner("train-rerank", "reranker") is None
    assert miner("train-rerank", "reranker", model=str(models / "embedder")).model == models / "embedder"


def test_every_choice_is_made_and_written_down(context: PlanContext, models: Path) -> None:
    spec = spec_of(models, "train-emb", query_prompt="query: ", name="result", workers=2, seed=7)
    made = build(context, spec)
    unit = made.unit(made.found.data.train, made.found.data.held_out)
    training = unit.training
    assert training.kind == "embedding"
    assert (training.loss, training.rows, training.precision) == ("mnrl", "ranking", "float32")
    assert training.retriever.prompts.query == "query: "
    assert training.hyper.max_length == training.retriever.max_length == 64
    # The model that is measured before: a new head is made by the seed.
    assert training.retriever.seed == made.request.base.seed == training.hyper.seed == 7
    assert (unit.members, unit.cpus_per_member, unit.gpus_per_member) == (2, 1.0, 0.0)
    assert made.steps == 1  # 32 queries of two batches of 32: one step, of smaller ones
    estimate = made.estimate
    assert estimate.fits
    assert estimate.tokens_per_epoch
    assert type(training).model_validate_json(training.model_dump_json()) == training


def test_the_plan_of_a_dry_run_says_what_it_will_need(context: PlanContext, models: Path) -> None:
    said: list[str] = []
    made = build(replace(context, say=said.append), spec_of(models, "train-rerank", "encoder", eval_split=0))
    course = RetrievalCourse(made)
    course.tell()
    planned = course.planned()
    assert planned.dry_run
    assert planned.loss == "lambda"
    assert planned.dimensions is None
    assert planned.estimate is not None
    assert "40 queries to train on" in said[0]
    assert "parameters are trained" in said[1]
    assert any("random weights" in note for note in planned.notes)
    assert any("Nothing is held out" in note for note in planned.notes)
    assert planned.hyperparameters["lora_rank"] == 16
    # Two layers with factors on their six matrices, a dense layer of 32 by 32, and the score.
    factors = 16 * 2 * (4 * (32 + 32) + 2 * (32 + 64))
    assert planned.trainable == factors + 32 * 32 + 32 + 32 + 1
    assert not {"temperature", "virtual_tokens"} & planned.hyperparameters.keys()


def test_scored_pairs_have_their_own_losses(context: PlanContext, models: Path) -> None:
    assert build(context, spec_of(models, "train-emb", dataset=SCORED)).loss == "cosent"
    other = plan_context(Settings(home=context.workspace.parents[1], allowed_roots=(models,)), "job-2")
    assert build(other, spec_of(models, "train-rerank", "reranker", dataset=SCORED)).loss == "bce"


def test_an_open_batch_becomes_what_fits(context: PlanContext, models: Path) -> None:
    small = CPU.model_copy(update={"memory": 897_000_000})
    made = build(context, spec_of(models, "train-emb"), small)
    assert made.hyper.per_device_train_batch_size < 32 or made.hyper.gradient_checkpointing
    other = plan_context(Settings(home=context.workspace.parents[1], allowed_roots=(models,)), "job-2")
    with pytest.raises(InvalidSpec, match="needs") as refused:
        build(other, spec_of(models, "train-emb"), CPU.model_copy(update={"memory": 500_000_000}))
    assert "adapter" not in (refused.value.hint or "")


def test_a_smaller_batch_of_lists_is_seen_more_often_in_a_step(context: PlanContext, models: Path) -> None:
    spec = spec_of(models, "train-rerank", "reranker", gradient_checkpointing=False, deepspeed=2)
    made = build(context, spec, CPU.model_copy(update={"memory": 892_000_000}))
    hyper = made.hyper
    assert hyper.per_device_train_batch_size < 8
    assert hyper.gradient_accumulation_steps == -(-16 // hyper.per_device_train_batch_size)
    assert made.fit.setup.hyper == hyper
    (note,) = (note for note in made.notes if "does not fit" in note)
    assert f"{hyper.gradient_accumulation_steps} times a step" in note


def test_a_checkpoint_of_another_loss_is_not_gone_on_from(context: PlanContext, models: Path) -> None:
    made = build(context, spec_of(models, "train-emb"))
    step = context.checkpoints_dir / "checkpoint-00000002"
    step.mkdir(parents=True)
    NoteIdentity(identity=made.identity, directory=context.checkpoints_dir).run(
        UnitContext(context.workspace)
    )
    home = context.workspace.parents[1]
    again = plan_context(Settings(home=home, allowed_roots=(models,)), "job-2")
    resumed = {"resume_from_checkpoint": "job-1"}
    same = build(again, spec_of(models, "train-emb", max_steps=9, **resumed))
    training = same.unit(same.found.data.train, None).training
    assert training.resume == step
    for other, field in (({"loss": "cached_mnrl"}, "loss"), ({"mine_negatives": True}, "dataset")):
        with pytest.raises(InvalidSpec) as refused:
            build(again, spec_of(models, "train-emb", **other, **resumed))
        assert refused.value.field == field


def test_rows_of_a_file_are_looked_at(context: PlanContext, models: Path) -> None:
    path = models / "rows.jsonl"
    path.write_text("".join(json.dumps({"what": n, "is": "this"}) + "\n" for n in range(20)))
    with pytest.raises(InvalidSpec) as refused:
        preflight(context, "train-emb", spec_of(models, "train-emb", dataset=str(path)))
    assert (refused.value.field or "").startswith(("dataset", "fields", "format"))


def test_every_part_of_a_model_counts_for_its_hash(models: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(models / "embedder", model)
    (model / "2_Dense").mkdir()
    hashes = set()
    for content in (b"", b"some", b"others"):
        (model / "2_Dense" / "model.safetensors").write_bytes(content)
        unit = DescribeParent(
            field="base_model", reference="m", directory=model, cache_dir=tmp_path, all_parts=True
        )
        hashes.add(unit.run(UnitContext(tmp_path)).content_hash)
    assert len(hashes) == 3
