"""One private cluster for all tests of this directory, with the trivial operation in its supervisor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aidocks import operations
from aidocks.jobs.store import JobStore
from aidocks.settings import Settings
from cluster.bringup import start_service, stop_service
from tests.conftest import free_port, service_environment
from tests.support.gang_jobs import GangJob
from tests.support.gang_operation import REGISTRATION
from tests.support.second_node import SecondNode, second_node

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "tests" / "support" / "site"
TRIVIAL_APPLICATION = "tests.support.trivial_app:build_app"

Drive = Callable[..., Any]


@pytest.fixture(scope="session")
def trivial_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Settings of a running service that has the trivial operation, and hardly any HTTP."""
    settings = Settings(home=tmp_path_factory.mktemp("trivial"), port=free_port(), workers=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SITE))
        # Nothing of this may reach the private cluster.
        patch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        try:
            start_service(settings, application=TRIVIAL_APPLICATION)
            yield settings
        finally:
            stop_service(settings)


@pytest.fixture
def drive(trivial_settings: Settings) -> Drive:
    """Run a program as a Ray driver of its own, and return what it leaves in ``answer``."""
    environment = service_environment(trivial_settings)
    environment["PYTHONPATH"] = os.pathsep.join([str(SITE), str(ROOT)])

    def run(program: str, *arguments: object) -> Any:
        code = (
            "import json, sys\nfrom aidocks import remote\nremote.connect()\nimport ray\n"
            f"{textwrap.dedent(program)}\nprint(); print('answer', json.dumps(answer))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        # Ray may print after it what it has to say of workers that were killed.
        (answer,) = (line for line in done.stdout.splitlines() if line.startswith("answer "))
        return json.loads(answer.removeprefix("answer "))

    return run


@pytest.fixture
def begin(
    trivial_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., GangJob]]:
    """Submit a gang; what still runs in the end is cancelled."""
    monkeypatch.setattr(operations, "OPERATIONS", (*operations.OPERATIONS, REGISTRATION))
    store = JobStore(trivial_settings.store_url)
    begun: list[GangJob] = []

    def submit(**spec: object) -> GangJob:
        traces = tmp_path / f"traces-{len(begun)}"
        traces.mkdir()
        begun.append(GangJob(trivial_settings, store, traces, **spec))
        return begun[-1]

    yield submit
    for job in begun:
        if not job.job().status.terminal:
            store.request_cancel(job.id)
            job.ended()
    store.close()


@pytest.fixture(scope="module")
def two_nodes(trivial_settings: Settings) -> Iterator[SecondNode]:
    """A second node of the running service, for the tests of one file."""
    with second_node(trivial_settings) as node:
        yield node
