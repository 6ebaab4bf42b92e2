"""Deploys the service onto a Ray cluster that others have started, and takes it down from there again.

The cluster is made by ``ray up``, KubeRay or ``ray start``; we start and stop none of its processes. The work is done
by ``python -m cluster.deploy`` in the environment of the caller, which says how the cluster is reached.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aidocks._root import service_root
from aidocks.errors import StartupFailed
from aidocks.settings import Settings
from cluster.instance import Instance, only_one, write_instance

#: A cluster that has to fetch a container image first takes its time.
DEPLOY_S = 600.0
#: What a driver or `ray job submit` needs besides addresses. The token itself is never written down.
CARRIED = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")

Told = Callable[[str, float], None]


def deploy_service(
    settings: Settings,
    address: str,
    *,
    application: str,
    allow_no_token: bool = False,
    progress: Told | None = None,
) -> Instance:
    """Bring the service up on a cluster; where it is already, bring it up to date.

    Args:
        settings: Of the installation.
        address: Of the cluster, ``host:port``, or ``auto`` for the one of which this machine is a node.
        application: Import string of the function that makes the Serve application.
        allow_no_token: Also on a cluster without token authentication.
        progress: Told of every phase.

    Raises:
        StartupFailed: No cluster is there, it was refused, or the service did not come up; names the log.
        Conflict: Another process is deploying it now.
    """
    with only_one(settings):
        for directory in (settings.models_dir, settings.workspaces_dir):
            directory.mkdir(parents=True, exist_ok=True)
        options = ["--existing", *(["--allow-no-token"] if allow_no_token else [])]
        connected = _run(settings, address, [application, *options], progress)
        environment = {
            "RAY_ADDRESS": connected["ray_address"],
            "RAY_API_SERVER_ADDRESS": connected["dashboard"],
        } | {name: os.environ[name] for name in CARRIED if name in os.environ}
        instance = Instance(
            url=local_url(settings),
            ray_address=connected["ray_address"],
            dashboard=connected["dashboard"],
            environment=environment,
            ready=True,
            existing=True,
        )
        write_instance(settings, instance)
        return instance


def remove_service(settings: Settings, instance: Instance, application: str) -> None:
    """Take the service down, and leave the cluster as it is. Jobs under way go on at the next deployment.

    Raises:
        StartupFailed: The cluster does not answer.
    """
    environment = {name: value for name, value in instance.environment.items() if name not in os.environ}
    _run(settings, instance.ray_address, [application, "--remove"], None, environment)
    settings.state_file.unlink(missing_ok=True)


def local_url(settings: Settings) -> str:
    """Return where the service is reached from this machine."""
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "") else settings.host  # noqa: S104 - not bound
    return f"http://{'[::1]' if host == '::' else host}:{settings.port}"


def _run(
    settings: Settings,
    address: str,
    arguments: list[str],
    progress: Told | None,
    more: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Run the deploying process to its end; returns what it said of the cluster."""
    settings.log_dir.mkdir(parents=True, exist_ok=True)
    log_file = settings.log_dir / "deploy.log"
    path = [str(service_root()), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = (
        {name: value for name, value in os.environ.items() if not name.startswith("AIDOCKS_")}
        | (more or {})
        | settings.environment()
        | {"RAY_ADDRESS": address, "PYTHONPATH": os.pathsep.join(dict.fromkeys(path))}
    )
    command = [sys.executable, "-m", "cluster.deploy", *arguments]
    with log_file.open("wb") as log:
        # Ray puts a driver's working directory on the path of the workers: not whatever the caller stands in.
        process = subprocess.Popen(  # noqa: S603 - our own command
            command, env=environment, cwd=service_root(), stdout=subprocess.PIPE, stderr=log, text=True
        )
        overdue = threading.Timer(DEPLOY_S, process.kill)
        overdue.start()
        try:
            told = _listen(process, progress or (lambda _phase, _seconds: None))
        finally:
            overdue.cancel()
            process.kill()
            code = process.wait()
    if "refused" in told:
        raise StartupFailed(told["refused"]["message"], hint=told["refused"]["hint"])
    if told.get("done") is None:
        raise _failure(log_file, code)
    connected: dict[str, Any] = told["connected"]
    return connected


def _listen(process: subprocess.Popen[str], progress: Told) -> dict[str, Any]:
    """Pass the phases on as they are reached; returns all, by name, and ``done`` where the process ended well."""
    begin = time.monotonic()
    told: dict[str, Any] = {}
    assert process.stdout is not None
    for line in process.stdout:
        said = json.loads(line)
        told[said["phase"]] = said
        progress(said["phase"], round(time.monotonic() - begin, 2))
    if process.wait() == 0:
        told["done"] = True
    return told


def _failure(log_file: Path, code: int) -> StartupFailed:
    tail = log_file.read_text(errors="replace").strip().splitlines()[-5:]
    return StartupFailed(
        " ".join([f"The deployment ended with exit code {code}. Its log ends:", *tail]),
        hint=f"See {log_file} and, on the cluster, Ray's own logs.",
    )
