"""The service on a Ray cluster that others have started: its doors, and the loss of the head."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from aidocks import operations
from aidocks.errors import Conflict
from aidocks.jobs.model import Status
from aidocks.jobs.store import JobStore
from aidocks.jobs.submit import submit_job
from aidocks.settings import Settings
from cluster.bringup import answers, service_status, start_service
from cluster.instance import Instance, write_instance
from cluster.ports import LOOPBACK, free_ports
from tests.conftest import free_port
from tests.support.own_cluster import OwnCluster, own_cluster
from tests.support.trivial_operation import REGISTRATION, count_traces

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

#: Until units run again after the head was lost; what it took is printed.
RECOVERY_S = 60.0


@pytest.fixture(scope="module", autouse=True)
def _trivial_operation() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operations, "OPERATIONS", (*operations.OPERATIONS, REGISTRATION))
        yield


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnCluster]:
    """Head with RocksDB and a worker node, onto which the command line has deployed the service."""
    home = tmp_path_factory.mktemp("existing")
    storage = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(home / "gcs")}
    with own_cluster(Settings(home=home / "data", port=free_port(), workers=2), storage) as running:
        running.start_worker()
        assert up(running).returncode == 0
        yield running


@pytest.fixture
def store(cluster: OwnCluster) -> Iterator[JobStore]:
    opened = JobStore(cluster.settings.store_url)
    yield opened
    opened.close()


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    directory = tmp_path / "traces"
    directory.mkdir()
    return directory


def up(cluster: OwnCluster, *options: str) -> subprocess.CompletedProcess[str]:
    return command(cluster, "up", "--ray-address", cluster.address, "--json", *options)


def command(cluster: OwnCluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line on the head."""
    return subprocess.run(
        [sys.executable, "-m", "aidocks", *arguments],
        env=cluster.environment(),
        cwd=cluster.directory,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def laptop(cluster: OwnCluster, directory: Path) -> dict[str, Any]:
    """Return how a process is run that has Ray's token, an installation, and nothing else of the cluster."""
    return {
        "env": {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.defpath]),
            "HOME": str(directory),
            **cluster.access,
        },
        "cwd": directory,
        "capture_output": True,
        "text": True,
        "check": False,
        "timeout": 240,
    }


def drive(cluster: OwnCluster, program: str) -> Any:
    """Run a program as a driver on the head, and return what it leaves in ``answer``."""
    connected = "import json\nfrom aidocks import remote\nremote.connect()\nimport ray"
    code = f"{connected}\n{program}\nprint(json.dumps(answer))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=cluster.environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


PING = "answer = ray.get(remote.supervisor().ping.remote())"


def wait_until(fact: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.05)


def submit(cluster: OwnCluster, store: JobStore, traces: Path, **spec: Any) -> str:
    job, _ = submit_job(cluster.settings, store, "trivial", {"traces": str(traces)} | spec)
    return job.id


def test_control_is_on_the_head_and_work_is_not(cluster: OwnCluster, store: JobStore, traces: Path) -> None:
    assert cluster.head is not None
    assert cluster.worker is not None
    job = submit(cluster, store, traces, seconds=0.2)
    wait_until(lambda: store.get(job).status.terminal)
    ping = drive(cluster, PING)
    assert os.getsid(ping["pid"]) == cluster.head.pid
    assert {os.getsid(worker["pid"]) for worker in ping["workers"]} == {cluster.worker.pid}


def test_deploying_again_changes_what_has_changed(cluster: OwnCluster) -> None:
    before = drive(cluster, PING)
    done = up(cluster)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["healthy"]
    assert drive(cluster, PING)["pid"] == before["pid"], "the same settings: the same supervisor"

    cluster.settings = cluster.settings.model_copy(update={"workers": 1})
    assert up(cluster).returncode == 0
    after = drive(cluster, PING)
    assert after["token"] > before["token"]
    assert after["parallelism"] == 1
    status = service_status(cluster.settings)
    assert status.healthy
    assert status.ray_address == cluster.address
    assert cluster.token not in cluster.settings.state_file.read_text()


def test_ray_job_submit_from_a_laptop(
    cluster: OwnCluster, store: JobStore, traces: Path, tmp_path: Path
) -> None:
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    (jobs / "squares.yaml").write_text(f"traces: {traces}\nunits: 4\n")
    (jobs / "weights.bin").write_bytes(b"0" * 1000)
    (jobs / ".rayignore").write_text("*.bin\n")
    before = {job.id for job in store.list()}
    submission = ["job", "submit", "--address", cluster.dashboard, "--working-dir", "jobs", "--"]
    done = subprocess.run(
        [Path(sys.executable).with_name("ray"), *submission, "aidocks", "trivial", "squares.yaml"],
        **laptop(cluster, tmp_path),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (job,) = [job for job in store.list() if job.id not in before]
    assert job.status is Status.SUCCEEDED
    assert job.result is not None
    assert job.result["total"] == 14
    assert job.id in done.stdout


def test_a_remote_function_from_outside(cluster: OwnCluster, traces: Path, tmp_path: Path) -> None:
    program = f"""
import sys
from aidocks import remote
remote.connect(address={cluster.client_address!r})
import ray
from aidocks.operations import OPERATIONS
submit = remote.supervisor().submit
job = ray.get(submit.remote("trivial", {{"traces": {str(traces)!r}, "units": 3}}, None))
print(job["id"])
heavy = {{"torch", "sqlalchemy", "fastapi", "transformers"}} & set(sys.modules)
assert not heavy, heavy
result = ray.get(remote.trivial.remote({{"traces": {str(traces)!r}, "units": 4}}))
print("total", result.total)
"""
    # A client knows the operations that it uses; here the trivial one.
    how = laptop(cluster, tmp_path)
    how["env"]["PYTHONPATH"] = cluster.environment()["PYTHONPATH"]
    done = subprocess.run([sys.executable, "-c", program], **how)
    assert done.returncode == 0, done.stderr
    assert "total 14" in done.stdout

    how["env"]["RAY_AUTH_TOKEN"] = "0" * 32
    refused = subprocess.run([sys.executable, "-c", program], **how)
    assert "ServiceUnreachable" in refused.stderr


@pytest.mark.chaos
def test_the_head_is_lost_and_comes_back_with_rocksdb(
    cluster: OwnCluster, store: JobStore, traces: Path
) -> None:
    seconds = lose_the_head(cluster, store, traces)
    print(f"units ran again after {seconds:.1f} s")
    assert seconds <= RECOVERY_S


def test_down_leaves_the_cluster_and_the_jobs(cluster: OwnCluster, store: JobStore, traces: Path) -> None:
    job = submit(cluster, store, traces, units=1, seconds=600)
    wait_until(lambda: count_traces(traces)[0] == 1)
    done = command(cluster, "down", "--json")
    assert json.loads(done.stdout) == {"stopped": True}, done.stderr
    assert not answers(service_status(cluster.settings).url)
    assert store.get(job).status is Status.RUNNING
    assert cluster.head is not None
    assert cluster.head.poll() is None

    assert up(cluster).returncode == 0
    wait_until(lambda: count_traces(traces)[0] == 2)
    assert store.get(job).attempt == 2
    store.request_cancel(job)
    wait_until(lambda: store.get(job).status.terminal)


def test_a_cluster_that_lets_anybody_in_is_refused(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "data", port=free_port(), workers=1)
    with own_cluster(settings, authenticated=False) as open_to_all:
        refused = up(open_to_all)
        assert refused.returncode != 0
        assert "RAY_AUTH_MODE=token" in refused.stderr
        assert not settings.state_file.exists()


def test_no_cluster_is_an_answer(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    environment = {**os.environ, "AIDOCKS_HOME": str(tmp_path / "data")}
    done = subprocess.run(
        [sys.executable, "-m", "aidocks", "up", "--ray-address", f"{LOOPBACK}:{port}"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode != 0
    assert "No Ray cluster answers" in done.stderr


def test_what_was_deployed_elsewhere_is_not_started_here(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, port=free_port())
    (port,) = free_ports(1)
    address = f"{LOOPBACK}:{port}"
    instance = Instance(
        url=settings.service_url, ray_address=address, dashboard="", environment={}, existing=True
    )
    write_instance(settings, instance)
    with pytest.raises(Conflict, match=address):
        start_service(settings)
    assert not service_status(settings).running


@pytest.mark.chaos
@pytest.mark.skipif(shutil.which("redis-server") is None, reason="there is no redis-server here")
def test_the_head_is_lost_and_comes_back_with_redis(tmp_path: Path, traces: Path) -> None:
    settings = Settings(home=tmp_path / "data", port=free_port(), workers=2)
    with redis(tmp_path) as address, own_cluster(settings, {"RAY_REDIS_ADDRESS": address}) as cluster:
        cluster.start_worker()
        assert up(cluster).returncode == 0
        store = JobStore(settings.store_url)
        seconds = lose_the_head(cluster, store, traces)
        store.close()
    print(f"units ran again after {seconds:.1f} s")
    assert seconds <= RECOVERY_S


def lose_the_head(cluster: OwnCluster, store: JobStore, traces: Path) -> float:
    """Kill the head under a job and start it again; returns the seconds until a unit was finished again."""
    job = submit(cluster, store, traces, units=24, seconds=0.3)
    wait_until(lambda: len(store.units(job)) >= 4)
    cluster.kill_head()
    begin = time.monotonic()
    finished = len(store.units(job))
    assert not answers(service_status(cluster.settings).url)
    cluster.start_head()
    wait_until(lambda: len(store.units(job)) > finished, RECOVERY_S + 30)
    seconds = time.monotonic() - begin
    wait_until(lambda: answers(service_status(cluster.settings).url))
    wait_until(lambda: store.get(job).status.terminal)
    ended = store.get(job)
    assert ended.status is Status.SUCCEEDED, ended.error
    assert ended.result is not None
    assert ended.result["total"] == sum(number**2 for number in range(24))
    assert ended.attempt == 2
    return seconds


@contextmanager
def redis(directory: Path) -> Iterator[str]:
    (port,) = free_ports(1)
    options = {"port": port, "bind": LOOPBACK, "dir": directory, "appendonly": "yes", "save": ""}
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    process = subprocess.Popen(["redis-server", *flags], stdout=subprocess.DEVNULL)
    try:
        yield f"{LOOPBACK}:{port}"
    finally:
        process.kill()
        process.wait()
