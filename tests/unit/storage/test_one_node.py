"""Trainings on nodes without a common file system: all of it on one node, or a refusal."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from aidocks.errors import InvalidSpec, WorkerLost
from aidocks.plan import Gang, PlanContext
from aidocks.training.run import LLMTraining
from tests.support.gang_operation import AddUp, GangSpec, make_training

pytest.importorskip("ray")


def test_a_gang_runs_on_one_node_that_is_large_enough() -> None:
    from train.one_node import choose, on_node

    nodes = [
        {"NodeID": "a", "NodeManagerAddress": "10.0.0.1", "Resources": {"CPU": 2.0}},
        {"NodeID": "b", "NodeManagerAddress": "10.0.0.2", "Resources": {"CPU": 8.0, "GPU": 2.0}},
        {"NodeID": "c", "NodeManagerAddress": "10.0.0.3", "Resources": {"CPU": 8.0, "GPU": 2.0}},
    ]
    gang = Gang(members=2, checkpoints=Path("/x"), cpus=1)
    assert choose(gang, nodes, "c").node_id == "c"
    assert choose(gang, nodes, "a").node_id == "a"
    assert choose(Gang(members=2, checkpoints=Path("/x"), gpus=1), nodes, "a").address == "10.0.0.2"
    assert list(on_node("10.0.0.2")) == ["node:10.0.0.2"]
    with pytest.raises(InvalidSpec, match="share no file system"):
        choose(Gang(members=12, checkpoints=Path("/x"), cpus=1), nodes, "a")


def test_a_node_that_is_gone_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from train import one_node

    node = {"NodeID": "a", "NodeManagerAddress": "10.0.0.1", "Resources": {"CPU": 2.0}, "Alive": True}
    looks = iter([[], [], [node]])
    monkeypatch.setattr(one_node, "_LOOK_S", 0.0)
    monkeypatch.setattr(one_node.ray, "nodes", lambda: next(looks, []))
    monkeypatch.setattr(one_node.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "a"))
    unit = AddUp(training=training_in(tmp_path), spec=GangSpec(traces=tmp_path, patience_s=60))
    with pytest.raises(InvalidSpec, match="share no file system"):
        one_node.choose_place(unit, again=False)
    assert one_node.choose_place(unit, again=True).address == "10.0.0.1"
    assert "It waits for it to come back" in unit.story.read_text()
    hopeless = unit.model_copy(update={"spec": GangSpec(traces=tmp_path, patience_s=0)})
    with pytest.raises(WorkerLost, match="did not come back"):
        one_node.choose_place(hopeless, again=True)


def training_in(directory: Path) -> LLMTraining:
    (directory / "training").mkdir()
    context = SimpleNamespace(workspace=directory, job_id="job-1", checkpoints_dir=directory / "checkpoints")
    return make_training(GangSpec(traces=directory), cast(PlanContext, context))
