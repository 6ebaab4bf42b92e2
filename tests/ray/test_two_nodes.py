"""Gangs over two nodes: two raylets under two addresses, which is what Ray Train takes for two machines."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from aidocks.jobs.model import EventType, Status
from tests.support.gang_jobs import GangJob
from tests.support.gang_operation import members
from tests.support.second_node import ADDRESS, SecondNode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]


def test_a_gang_outlives_a_node_or_says_that_it_cannot(
    begin: Callable[..., GangJob], two_nodes: SecondNode
) -> None:
    # One member of this needs more than half of either node.
    large = begin(steps=4, waits_after=3, cpus=3, patience_s=1)
    large.wait_inside()
    assert {member["node"] for member in members(large.traces)} == {"127.0.0.1", ADDRESS}
    two_nodes.kill()
    failed = large.ended()
    assert failed.status is Status.FAILED
    assert failed.error is not None
    assert failed.error["code"] == "worker_lost"
    assert "room for 1 worker of 3 CPU each, on 1 node." in failed.error["detail"]
    assert large.checkpoints == ["checkpoint-00000002"]
    # Who says so depends on whether the actor that watches the members was on the node, too.
    told = [said.data["text"] for said in large.events(EventType.MESSAGE)]
    whence = ("It goes on from checkpoint-00000002", "it begins anew from its last checkpoint")
    assert any(words in text for text in told for words in whence), told

    # What it left is enough to go on from with less; and that fits one node when the other is lost, too.
    two_nodes.start()
    last = large.settings.checkpoints_dir / large.id / large.checkpoints[-1]
    job = begin(steps=6, waits_after=5, spread=True, resume=str(last))
    job.wait_inside()
    assert {member["node"] for member in members(job.traces)} == {"127.0.0.1", ADDRESS}
    two_nodes.kill()
    (job.traces / "go").touch()
    ended = job.ended()
    assert ended.status is Status.SUCCEEDED, ended.error
    assert ended.result is not None
    assert ended.result["total"] == 6 * 3
    assert ended.result["begun_at"] == [2, 4], "at most one interval between checkpoints is repeated"
    assert {member["node"] for member in members(job.traces)[2:]} == {"127.0.0.1"}


def test_a_gang_goes_on_with_fewer_and_grows_again(
    begin: Callable[..., GangJob], two_nodes: SecondNode
) -> None:
    two_nodes.start()
    # Of these there is room for one on either node.
    job = begin(steps=8, waits_after=3, until_more=4, cpus=3, fewer=(1,))
    job.wait_inside()
    two_nodes.kill()
    (job.traces / "waiting").unlink()
    job.wait_inside()
    two_nodes.start()
    (job.traces / "go").touch()
    ended = job.ended()
    assert ended.status is Status.SUCCEEDED, ended.error
    assert ended.result is not None
    assert ended.result["begun_at"] == [0, 2, 4]
    assert ended.result["total"] == 2 * 3 + 2 * 1 + 4 * 3
    told = [said.data["text"] for said in job.events(EventType.MESSAGE)]
    sizes = [text for text in told if text.startswith("There is room for")]
    assert [text.split(" workers")[0] for text in sizes] == [
        "There is room for 1 of 2",
        "There is room for 2 of 2",
    ]
