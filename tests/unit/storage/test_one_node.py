"""Trainings on nodes without a common file system: all of it on one node, or a refusal."""

from __future__ import annotations

from pathlib import Path

import pytest

from aidocks.errors import InvalidSpec
from aidocks.plan import Gang

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
