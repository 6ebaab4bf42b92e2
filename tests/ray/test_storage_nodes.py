"""Two nodes that share no file system: storage by URL, and on each node a data directory of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aidocks import operations
from aidocks.jobs.model import EventType, Status
from aidocks.jobs.store import JobStore
from aidocks.jobs.submit import plan_context, submit_job
from aidocks.merge.operation import Merge
from aidocks.models.registry import Registry
from aidocks.settings import Settings
from aidocks.specs.merge import MergeSpec
from aidocks.specs.read import build_spec
from cluster.bringup import start_service, stop_service
from tests.conftest import free_port
from tests.ray.conftest import SITE, TRIVIAL_APPLICATION
from tests.support.driving import drive
from tests.support.gang_jobs import GangJob, until
from tests.support.gang_operation import REGISTRATION, members
from tests.support.merge_jobs import add_models, digests, make_family
from tests.support.second_node import ADDRESS, SecondNode, require_apart

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

#: More CPUs than the first node has: whoever asks for so many in one place is on the second one.
LARGE = 6
MERGE: dict[str, Any] = {
    "merge_method": "slerp",
    "name": "merged",
    "base_model": "one",
    "models": [{"model": "two"}],
    "parameters": {"t": 0.3},
    "dtype": "float32",
    "max_shard_size": "60KB",
}

StartNode = Callable[[Path], SecondNode]


@pytest.fixture
def installation(tmp_path: Path) -> Iterator[tuple[Settings, StartNode]]:
    """A service, and what makes a machine with a data directory of its own its second node."""
    require_apart(tmp_path)
    url = f"file://{tmp_path}/store"
    settings = Settings(home=tmp_path / "home", port=free_port(), workers=1, storage_url=url)
    nodes: list[SecondNode] = []

    def start(own: Path) -> SecondNode:
        nodes.append(SecondNode(settings, LARGE, own))
        nodes[-1].start()
        return nodes[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operations, "OPERATIONS", (*operations.OPERATIONS, REGISTRATION))
        patch.setenv("PYTHONPATH", str(SITE))
        patch.setenv("AIDOCKS_HOME", str(settings.home))
        patch.setenv("AIDOCKS_STORAGE_URL", url)
        try:
            start_service(settings, application=TRIVIAL_APPLICATION)
            yield settings, start
        finally:
            for node in nodes:
                node.kill()
            stop_service(settings)


def alone(home: Path, *sources: Path) -> dict[str, str]:
    """Return what the merge makes in one process, where the data directory is all there is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("AIDOCKS_STORAGE_URL")
        settings = Settings(home=home)
        add_models(settings, *sources)
        context = plan_context(settings, "job-00000000000-c0ffee00")
        context.workspace.mkdir(parents=True)
        drive(Merge().plan(build_spec(MergeSpec, MERGE), context), context.workspace)
        return digests(Registry(settings.models_dir).path("merged"))


def test_jobs_on_nodes_without_a_common_file_system(
    installation: tuple[Settings, StartNode], tmp_path: Path
) -> None:
    settings, start_node = installation
    store = JobStore(settings.store_url)
    # A gang for which the first node is too small; the second one is lost, and another machine takes its place.
    first = start_node(tmp_path / "second")
    traces = tmp_path / "traces"
    traces.mkdir()
    job = GangJob(settings, store, traces, steps=6, waits_after=3, cpus=LARGE / 2)
    job.wait_inside()
    shared = tmp_path / "store" / "trees" / "checkpoints" / job.id
    until(lambda: [path.name for path in shared.glob("*")] == ["checkpoint-00000002"], "it to be shared")
    assert not job.checkpoints, "it is on the node of the gang alone"
    until(lambda: len(job.events(EventType.METRICS)) == 3, "its steps to be heard")
    first.kill()
    (traces / "go").touch()
    start_node(tmp_path / "third")
    ended = job.ended()
    assert ended.status is Status.SUCCEEDED, ended.error
    assert ended.result is not None
    assert (ended.result["total"], ended.result["begun_at"]) == (6 * 3, [0, 2])
    assert {member["node"] for member in members(traces)} == {ADDRESS}
    steps = [event.data["step"] for event in job.events(EventType.METRICS)]
    assert steps == [1, 2, 3, 3, 4, 5, 6], "whatever is told on either node is heard"
    until(lambda: not shared.exists(), "checkpoints of no use to be forgotten")

    # Models of the first node, units on the second one, a result for both.
    make_family(tmp_path / "family", "one", "two")
    sources = [tmp_path / "family" / name for name in ("one", "two")]
    add_models(settings, *sources)
    own = tmp_path / "third"
    assert not (own / "models").exists()
    spec = MERGE | {"resources": {"cpus": LARGE - 1}}
    merge = submit_job(settings, store, "merge", spec)[0].id
    until(lambda: store.get(merge).status.terminal, "the merge")
    assert store.get(merge).status is Status.SUCCEEDED, store.get(merge).error
    found = digests(Registry(settings.models_dir).bring("merged"))
    assert found == alone(tmp_path / "alone", *sources)
    assert {path.name for path in (own / "models").iterdir()} - {".brought"} == {"one", "two"}
    assert not list((settings.home / "workspaces").glob("job-*/model"))
    assert not list((tmp_path / "store" / "files").rglob("job-*"))
    store.close()
