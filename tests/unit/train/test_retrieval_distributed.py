"""Two processes on a CPU that share the steps of a training: with gathered negatives, the curve of one process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sentence_transformers")
pytest.importorskip("deepspeed")

from aidocks.training.checkpoints import checkpoint_name
from aidocks.training.launch import _environment, _free_port, read_outcome
from aidocks.training.process import STARTER
from tests.support.small_retriever_training import rankings, small_training
from tests.support.small_training import curve, points
from tests.support.tiny_retrievers import make_embedder, make_encoder
from train.loop import run
from train.reporter import LocalReporter


def _lists() -> list[dict[str, Any]]:
    """Return rankings of different lengths: lists are filled up to the longest of their batch."""
    return [row | {"negatives": row["negatives"][: 1 + number % 2]} for number, row in enumerate(rankings())]


_SEVERAL = Path(__file__).parents[2] / "support" / "train_several.py"
#: Name -> what differs; the last ones with DeepSpeed.
_TRAININGS: dict[str, dict[str, Any]] = {
    "mnrl": {"held_out": rankings(60)[40:]},
    "nested": {"loss": "cached_mnrl", "chunk": 3, "matryoshka": (8, 16), "max_steps": 2},
    # One held-out row: too few for two.
    "apart": {"gather_negatives": False, "held_out": rankings(41)[40:], "max_steps": 1, "eval_steps": 1},
    "full": {"adapter": "full", "learning_rate": 1e-3, "max_steps": 2},
    "listnet": {"kind": "reranker", "loss": "listnet", "rows": _lists()},
    "stage-1": {
        "kind": "reranker",
        "loss": "listnet",
        "rows": _lists(),
        "deepspeed": {"zero_optimization": {"stage": 1}},
    },
    "stage-2": {"deepspeed": {"zero_optimization": {"stage": 2}}},
    "full-2": {
        "adapter": "full",
        "learning_rate": 1e-3,
        "max_steps": 2,
        "deepspeed": {"zero_optimization": {"stage": 2}},
    },
}
_RESUMED = ("mnrl", "stage-2")
#: Which curve of one process each has.
_SAME = {
    "mnrl": "mnrl",
    "nested": "nested",
    "full": "full",
    "listnet": "listnet",
    "stage-1": "listnet",
    "stage-2": "mnrl",
    "full-2": "full",
}


@pytest.fixture(autouse=True, scope="module")
def _environment_before() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def _wait_for(members: list[subprocess.Popen[bytes]]) -> list[int | None]:
    """Return the exit codes when all have ended, or one has failed, for which the other would wait."""
    while True:
        codes = [member.poll() for member in members]
        if any(codes) or None not in codes:
            return codes
        time.sleep(0.1)


def _make(directory: Path, bases: dict[str, Path], name: str, batch: int, **further: Any) -> Any:
    given = {"kind": "embedding"} | _TRAININGS[name]
    return small_training(
        directory,
        bases[given["kind"]],
        per_device_train_batch_size=batch,
        **({"max_steps": 4, "negatives": 2 if given["kind"] == "reranker" else 1} | given | further),
    )


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {"embedding": make_embedder(root / "embedder"), "reranker": make_encoder(root / "encoder")}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, bases: dict[str, Path]) -> dict[str, Any]:
    """One gang of two that trains one after another, since most of the time goes into imports."""
    root = tmp_path_factory.mktemp("gang")
    trainings: dict[str, Any] = {}
    for name in _TRAININGS:
        trainings[name] = _make(root / name, bases, name, 4)
        if name in _RESUMED:
            resume = trainings[name].checkpoints / checkpoint_name(2)
            trainings[f"{name} again"] = _make(root / f"{name} again", bases, name, 4, resume=resume)
    paths = [str(training.story.parent / "training.json") for training in trainings.values()]
    for path, training in zip(paths, trainings.values(), strict=True):
        Path(path).write_text(training.model_dump_json())
    port, members = _free_port(), []
    for rank in range(2):
        environment = _environment(rank, 2, 1, port)
        del environment[STARTER]
        with (root / f"log-{rank}.txt").open("wb") as log:
            command = [sys.executable, str(_SEVERAL), *paths]
            members.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        codes = _wait_for(members)
    finally:
        for member in members:
            member.kill()
            member.wait()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in root.glob("log-*.txt"))
    return trainings


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, bases: dict[str, Path]) -> dict[str, Any]:
    """The same in this process alone, with batches of twice the size."""
    root = tmp_path_factory.mktemp("alone")
    trainings = {}
    for name in sorted(set(_SAME.values())):
        trainings[name] = _make(root / name, bases, name, 8)
        run(trainings[name], LocalReporter(trainings[name]))
    return trainings


@pytest.mark.parametrize("name", _SAME)
def test_two_processes_have_the_curve_of_one(
    name: str, shared: dict[str, Any], alone: dict[str, Any]
) -> None:
    one, other = curve(shared[name]), curve(alone[_SAME[name]])
    assert len(one) == (2 if name in ("nested", "full", "full-2") else 4)
    assert one == pytest.approx(other, rel=1e-3)


def test_negatives_that_are_not_gathered_are_fewer(shared: dict[str, Any]) -> None:
    assert curve(shared["apart"])[0] < curve(shared["mnrl"])[0]


def test_the_held_out_loss_and_the_tokens_are_those_of_all(
    shared: dict[str, Any], alone: dict[str, Any]
) -> None:
    both = [
        [p.eval_loss for p in points(each["mnrl"]) if p.eval_loss is not None] for each in (shared, alone)
    ]
    assert both[0] == pytest.approx(both[1], rel=1e-3)
    one, other = (read_outcome(each["mnrl"].story.parent).tokens for each in (shared, alone))
    assert one == other


@pytest.mark.parametrize("name", _RESUMED)
def test_a_gang_goes_on_as_if_it_had_not_died(name: str, shared: dict[str, Any]) -> None:
    again = shared[f"{name} again"]
    assert read_outcome(again.story.parent).resumed_from == 2
    assert curve(again) == pytest.approx(curve(shared[name]), rel=1e-6)
