"""The stages that learn a router: what is chosen, and jobs that are killed or run by any number of workers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from aidocks.checkpoints.files import OutputFile, hash_file
from aidocks.checkpoints.writer import ShardPlan
from aidocks.executor import Claim, Outcome
from aidocks.jobs.model import EventType, Job, Status
from aidocks.jobs.runner import run_job
from aidocks.jobs.store import JobStore
from aidocks.jobs.submit import submit_job
from aidocks.models.registry import Registry
from aidocks.moe.examples import Examples
from aidocks.moe.gate_stages import PROMPT_SCALE, REPLICAS, ROUND_STEPS, SCALES, Learned, Learner
from aidocks.moe.learning import (
    FitGates,
    Floor,
    GateFile,
    JudgeAverage,
    JudgeGates,
    Judgement,
    PrepareDraft,
    TrainedGates,
    TrainGates,
)
from aidocks.plan import Stage, Unit, UnitContext
from aidocks.settings import Settings
from aidocks.specs.moe import MoESpec
from aidocks.specs.read import build_spec
from tests.support.routing import records

LENGTH = 16


Losses = tuple[float, ...]


def choose(
    floor: Losses, scaled: list[Losses], trained: tuple[Losses, ...] = (), chunks: int = 1, **fields: Any
) -> tuple[Learned, list[Stage]]:
    """Return what a learner chooses whose candidates have these losses, and the stages that it asked for."""
    texts = [Examples(prompts=(str(number),), chunks=chunks) for number in range(len(floor))]
    experts = [{"source_model": "m", "positive_prompts": each.prompts} for each in texts]
    spec = build_spec(MoESpec, {"base_model": "m", "gate_mode": "fitted", "experts": experts, **fields})
    place = Path("/nowhere")
    router = ShardPlan(file_name="router.safetensors", tensors=())
    learner = Learner(spec, place, place, router, ("r",), texts, place, (place,) * len(texts))
    later = iter(trained)

    def answer(stage: Stage, unit: Unit[Any]) -> Any:
        file = OutputFile(path=place / unit.unit_id, bytes=1, sha256="0" * 64)
        if isinstance(unit, JudgeGates):
            losses = scaled[SCALES.index(unit.scale)] if stage.name == "scale" else next(later)
            return Judgement(file=file, losses=losses, balance=(2.0, 4.0))
        if isinstance(unit, TrainGates):
            return TrainedGates(file=file, losses=(1.0,) * unit.count, tokens=10 * unit.count)
        return Floor(losses=floor) if isinstance(unit, JudgeAverage) else GateFile(file=file)

    plan, stages, results = learner.run(), [], None
    while True:
        try:
            stages.append(plan.send(results))  # type: ignore[arg-type]
        except StopIteration as stop:
            return stop.value, stages
        results = [answer(stages[-1], unit) for unit in stages[-1].units]


def test_the_scale_with_the_least_loss_is_chosen() -> None:
    learned, stages = choose((9.0, 9.0), [(4, 2), (3, 2), (2, 2), (2, 3), (2, 4), (2, 5)])
    assert (learned.scale, learned.training, learned.curve) == (4.0, None, ())
    judged = next(unit for unit in stages[-1].units if getattr(unit, "scale", None) == 4.0)
    assert learned.file.path.name == judged.unit_id
    assert [stage.name for stage in stages] == ["draft", "fit", "scale"]


def test_of_prompts_alone_no_scale_is_chosen() -> None:
    learned, stages = choose((9.0, 9.0), [(1, 1)] * len(SCALES), chunks=0)
    assert learned.scale == PROMPT_SCALE
    assert [unit.scale for unit in stages[-1].units if isinstance(unit, JudgeGates)] == [PROMPT_SCALE]


def test_beating_the_average_on_every_text_counts_more_than_the_mean() -> None:
    learned, _ = choose((3.0, 3.0), [(1, 4), (2.9, 2.9), (1, 3.1), (2.95, 2.95), (9, 9), (9, 9)])
    assert learned.scale == 2.0


def test_what_is_not_finite_is_never_chosen() -> None:
    nan = 1e9  # what a unit reports for a loss that is not finite
    learned, _ = choose((1.0, 1.0), [(nan, 2), (2, nan), (nan, nan), (2, 2), (nan, 2), (nan, 2)])
    assert learned.scale == 8.0
    learned, _ = choose((1.0, 1.0), [(2, 2)] * 6, ((nan, nan), (2, nan)), gate_mode="trained", gate_steps=30)
    assert learned.training is not None
    assert learned.training.loss_after == 2.0


def test_a_training_goes_round_by_round_with_two_replicas() -> None:
    scaled = [(5.0, 5.0)] * 6
    learned, stages = choose((9.0, 9.0), scaled, ((4, 4), (3, 3), (3, 4)), gate_mode="trained", gate_steps=60)
    rounds = [[unit for unit in stage.units if isinstance(unit, TrainGates)] for stage in stages[3:-1]]
    assert [[(u.replica, u.step, u.count) for u in units] for units in rounds] == [
        [(replica, step, count) for replica in range(REPLICAS)]
        for step, count in ((0, ROUND_STEPS), (ROUND_STEPS, ROUND_STEPS), (2 * ROUND_STEPS, 10))
    ]
    for before, after in pairwise(rounds):
        ids = [unit.unit_id for unit in before]
        assert all([file.path.name for file in unit.starts] == ids for unit in after)
    assert [(point.step, point.losses) for point in learned.curve] == [
        (0, {"experts[0]": 5.0, "experts[1]": 5.0}),
        (25, {"experts[0]": 4.0, "experts[1]": 4.0}),
        (50, {"experts[0]": 3.0, "experts[1]": 3.0}),
        (60, {"experts[0]": 3.0, "experts[1]": 4.0}),
    ]
    training = learned.training
    assert training is not None
    assert (training.steps, training.tokens) == (60, 10 * 60 * REPLICAS)
    assert (training.loss_before, training.loss_after) == (5.0, 3.0), "the best round, not the last"
    assert (training.aux_loss_before, training.aux_loss_after) == (3.0, 3.0)


def test_a_training_that_makes_it_worse_leaves_the_fitted_rows() -> None:
    learned, stages = choose((9.0, 9.0), [(5.0, 5.0)] * 6, ((6, 6),), gate_mode="trained", gate_steps=5)
    first = next(unit for unit in stages[2].units if isinstance(unit, JudgeGates))
    assert learned.file.path.name == first.unit_id
    assert learned.training is not None
    assert learned.training.loss_after == 5.0


# Whole jobs, in this process.


class Killed(BaseException):
    """Stands for kill -9 of the supervisor."""


class Pool:
    """Runs units at once, ``parallelism`` of them being under way, and does as ``before`` says."""

    def __init__(self, parallelism: int = 1, before: Callable[[Unit[Any]], None] = lambda _: None) -> None:
        self.parallelism = parallelism
        self.before = before
        self.ran: list[Unit[Any]] = []

    async def run(
        self, unit: Unit[Any], workspace: Path, started: Callable[[str], None], claim: Claim
    ) -> Outcome:
        started("worker-1")
        self.before(unit)
        await asyncio.sleep(0)
        result = unit.run(UnitContext(workspace))
        self.ran.append(unit)
        return Outcome(result, 0.01, "worker-1")

    async def close(self) -> None:
        return


@pytest.fixture
def store(settings: Settings) -> Iterator[JobStore]:
    opened = JobStore(settings.store_url)
    yield opened
    opened.close()


@pytest.fixture
def body(tmp_path: Path, tiny_model: Any) -> dict[str, Any]:
    models = [tiny_model(tmp_path / f"model-{seed}", seed=seed) for seed in range(2)]
    return {
        "base_model": str(models[0]),
        "gate_mode": "trained",
        "gate_steps": 60,
        "evaluate": False,
        "seqlen": LENGTH,
        "fit_tokens": 64,
        "experts": [
            {"source_model": str(model), "positive_texts": records(number)}
            for number, model in enumerate(models)
        ],
    }


def begin(settings: Settings, store: JobStore, body: dict[str, Any]) -> tuple[Job, int]:
    job, _ = submit_job(settings, store, "byo-moe", body)
    return claim(store, job)


def claim(store: JobStore, job: Job) -> tuple[Job, int]:
    token = store.acquire_lease("service", "test")
    claimed = store.claim(job.id, token)
    assert claimed is not None
    return claimed, token


@pytest.fixture
def here(home: Path, tmp_path: Path) -> Settings:
    return Settings(home=home, allowed_roots=(tmp_path,))


def weights(settings: Settings, name: str) -> dict[str, str]:
    return {
        path.name: hash_file(path) for path in Registry(settings.models_dir).path(name).glob("*.safetensors")
    }


def test_the_result_does_not_depend_on_the_number_of_workers(
    here: Settings, store: JobStore, body: dict[str, Any]
) -> None:
    for parallelism in (1, 4):
        job, token = begin(here, store, body | {"name": f"with-{parallelism}"})
        pool = Pool(parallelism)
        ended = asyncio.run(run_job(job, store, here, pool, token))
        assert ended.status is Status.SUCCEEDED, ended.error
        trained = Counter(unit.step for unit in pool.ran if isinstance(unit, TrainGates))
        assert trained == {0: REPLICAS, 25: REPLICAS, 50: REPLICAS}
    assert weights(here, "with-1") == weights(here, "with-4")


def test_a_job_that_is_killed_between_rounds_repeats_nothing(
    here: Settings, store: JobStore, body: dict[str, Any]
) -> None:
    whole, token = begin(here, store, body | {"name": "whole"})
    asyncio.run(run_job(whole, store, here, Pool(), token))

    def die(unit: Unit[Any]) -> None:
        if isinstance(unit, TrainGates) and unit.step == 2 * ROUND_STEPS:
            raise Killed

    job, token = begin(here, store, body | {"name": "killed"})
    before = Pool(before=die)
    with pytest.raises(Killed):
        asyncio.run(run_job(job, store, here, before, token))
    journalled = set(store.units(job.id))
    assert len([unit for unit in before.ran if isinstance(unit, TrainGates)]) == 2 * REPLICAS
    again, token = claim(store, job)
    after = Pool()
    ended = asyncio.run(run_job(again, store, here, after, token))
    assert (ended.status, ended.attempt) == (Status.SUCCEEDED, 2), ended.error
    assert not {unit.unit_id for unit in after.ran} & journalled
    assert {type(unit) for unit in after.ran} >= {TrainGates, JudgeGates}
    assert not {type(unit) for unit in after.ran} & {PrepareDraft, FitGates, JudgeAverage}
    finished = [
        event.data["unit_id"] for event in store.events(job.id) if event.type is EventType.UNIT_FINISHED
    ]
    assert len(finished) == len(set(finished))
    assert weights(here, "killed") == weights(here, "whole")
    results = [store.get(each.id).result for each in (whole, job)]
    assert results[0] is not None
    assert results[1] is not None
    assert results[0]["training"] == results[1]["training"]


def test_a_training_that_runs_away_ends_with_the_fitted_rows(
    here: Settings, store: JobStore, body: dict[str, Any]
) -> None:
    job, token = begin(here, store, body | {"name": "away", "gate_learning_rate": 10, "gate_steps": 50})
    ended = asyncio.run(run_job(job, store, here, Pool(), token))
    assert ended.status is Status.SUCCEEDED, ended.error
    assert ended.result is not None
    training = ended.result["training"]
    assert training["loss_after"] <= training["loss_before"]
    network = AutoModelForCausalLM.from_pretrained(Registry(here.models_dir).path("away"))
    assert all(bool(parameter.isfinite().all()) for parameter in network.parameters())
