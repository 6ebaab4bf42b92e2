"""Two nodes that share no file system: storage on S3, and on each node a data directory of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from aidocks.client.http import Client
from aidocks.jobs.store import JobStore
from aidocks.jobs.submit import plan_context
from aidocks.merge.operation import Merge
from aidocks.models.registry import Registry
from aidocks.moe.operation import BuildMoE
from aidocks.plan import Operation
from aidocks.settings import Settings
from aidocks.specs.merge import MergeSpec
from aidocks.specs.moe import MoESpec
from aidocks.specs.read import build_spec
from cluster.bringup import start_service, stop_service
from tests.conftest import free_port, service_environment
from tests.support.driving import drive
from tests.support.merge_jobs import add_models, digests, make_family
from tests.support.s3 import s3_bucket
from tests.support.second_node import ADDRESS, require_apart, second_node

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MERGE: dict[str, Any] = {
    "merge_method": "slerp",
    "name": "merged",
    "base_model": "one",
    "models": [{"model": "two"}],
    "parameters": {"t": 0.3},
    "dtype": "float32",
    "max_shard_size": "60KB",
}
MOE: dict[str, Any] = {
    "name": "mixed",
    "base_model": "one",
    "gate_mode": "random",
    "dtype": "float32",
    "experts": [{"source_model": "one"}, {"source_model": "two"}],
    "max_shard_size": "60KB",
}
#: Takes all CPUs of the first node but one, so that the second of two workers finds its place on the second node.
CROWD = """
import sys
from aidocks import remote
remote.connect()
import ray
ray.init(namespace="tests", ignore_reinit_error=True)
free = ray._private.state.available_resources_per_node()
(mine,) = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeManagerAddress"] != sys.argv[1]]
class Crowd:
    def ready(self): pass
taken = free[mine]["CPU"] - 1
crowd = ray.remote(Crowd).options(
    name="crowd", lifetime="detached", num_cpus=taken, resources={"node:127.0.0.1": 0.001}
).remote()
ray.get(crowd.ready.remote())
"""


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Settings, Path]]:
    """A service of two nodes on S3, and the data directory of the second one."""
    home, own = tmp_path_factory.mktemp("shared"), tmp_path_factory.mktemp("second")
    require_apart(own)
    with s3_bucket() as (url, _), pytest.MonkeyPatch.context() as patch:
        settings = Settings(home=home, port=free_port(), workers=2, storage_url=url)
        patch.setenv("AIDOCKS_HOME", str(home))
        patch.setenv("AIDOCKS_STORAGE_URL", url)
        try:
            start_service(settings)
            with second_node(settings, 1, own):
                crowd = [sys.executable, "-c", CROWD, ADDRESS]
                subprocess.run(crowd, env=service_environment(settings), check=True, timeout=100)
                yield settings, own
        finally:
            stop_service(settings)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("family")
    make_family(directory, "one", "two")
    return directory


def alone(home: Path, sources: Path, operation: Operation[Any, Any], spec: Any) -> dict[str, str]:
    """Return what an operation makes in one process, where the data directory is all there is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("AIDOCKS_STORAGE_URL")
        settings = Settings(home=home)
        add_models(settings, *sources.iterdir())
        context = plan_context(settings, "job-00000000000-c0ffee00")
        context.workspace.mkdir(parents=True)
        drive(operation.plan(spec, context), context.workspace)
        return digests(Registry(settings.models_dir).path(spec.name))


def workers_of(settings: Settings, job_id: str) -> set[str]:
    store = JobStore(settings.store_url)
    try:
        return {record.worker for record in store.units(job_id).values()}
    finally:
        store.close()


def test_units_on_nodes_without_a_common_file_system_make_the_same_model(
    two_nodes: tuple[Settings, Path], sources: Path, tmp_path: Path
) -> None:
    settings, own = two_nodes
    # Imported where the service is: the second node has none of it.
    add_models(settings, *sources.iterdir())
    assert not (own / "models").exists()
    for operation, kind, body in ((Merge(), MergeSpec, MERGE), (BuildMoE(), MoESpec, MOE)):
        name = body["name"]
        spec = build_spec(kind, body)
        expected = alone(tmp_path / name, sources, operation, spec)
        with Client(settings.service_url) as client:
            job = getattr(client, "merge" if name == "merged" else "byo_moe")(**body)
            job.wait()
        assert workers_of(settings, job.id) == {"worker-1", "worker-2"}
        url = f"{settings.service_url}/models/{name}/files"
        files = {row["path"]: row for row in httpx.get(url, timeout=60).raise_for_status().json()["files"]}
        assert {path for path in files if path not in ("aidocks.json", "README.md")} == set(expected)
        assert digests(Registry(settings.models_dir).bring(name)) == expected
        weights = next(path for path in files if path.endswith(".safetensors"))
        content = httpx.get(f"{url}/{weights}", timeout=60).raise_for_status().content
        assert len(content) == files[weights]["bytes"]
        assert not list((settings.home / "workspaces").glob("job-*/model"))
    # Both models were read there, and only those.
    assert {path.name for path in (own / "models").iterdir() if not path.name.startswith(".")} == {
        "one",
        "two",
    }
    assert json.loads((own / "models" / ".brought" / "one.json").read_text())["whole"]
