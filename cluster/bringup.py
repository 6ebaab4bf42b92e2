"""Starts, stops and describes the embedded service of one installation: a private Ray on this machine."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import psutil
from pydantic import BaseModel, Field

from aidocks.errors import Conflict, StartupFailed
from aidocks.settings import Settings
from cluster import head
from cluster.existing import deploy_service, local_url, remove_service
from cluster.instance import Instance, end_instance, only_one, read_instance, write_instance
from cluster.ports import require_free

APPLICATION = "serve.app:build_app"
STARTUP_S = 120.0
HEALTH_TIMEOUT_S = 2.0
POLL_S = 0.1
#: What ``cluster.deploy`` reports last.
LAST_PHASE = "supervisor up"
#: A busy machine, or a proxy that is just being replaced, is no reason to restart everything.
PATIENCE_S = 15.0

#: Called with what has just been reached and the seconds since the start.
ProgressCallback = Callable[[str, float], None]


class ServiceStatus(BaseModel):
    """What there is to know of an embedded service."""

    running: bool = Field(description="Whether its processes are there.")
    healthy: bool = Field(description="Whether it answers requests.")
    url: str
    docs: str
    pid: int | None = Field(None, description="Process whose end is the end of the service.")
    ray_address: str | None = Field(None, description="What `ray.init(address=...)` takes.")
    dashboard: str | None = Field(None, description="Ray's dashboard; also where `ray job submit` goes.")
    log_dir: Path
    environment: dict[str, str] = Field(
        default_factory=dict, description="Variables that Ray drivers and `ray job submit` need."
    )


def service_status(settings: Settings) -> ServiceStatus:
    """Describe the service of this installation."""
    instance = read_instance(settings)
    process = instance.head() if instance else None
    healthy = instance is not None and (process is not None or instance.existing) and answers(instance.url)
    status = ServiceStatus(
        running=process is not None or healthy,
        healthy=healthy,
        url=settings.service_url,
        docs=f"{settings.service_url}/docs",
        log_dir=settings.log_dir,
    )
    if instance is None or not (process or instance.existing):
        return status
    known = {
        "url": instance.url,
        "docs": f"{instance.url}/docs",
        "pid": process.pid if process else None,
        "ray_address": instance.ray_address,
        "dashboard": instance.dashboard,
        "environment": instance.environment,
    }
    return status.model_copy(update=known)


def start_service(
    settings: Settings,
    wait: bool = True,
    progress: ProgressCallback | None = None,
    application: str = APPLICATION,
) -> ServiceStatus:
    """Start the service of this installation; when it is up already, do nothing.

    What is left of an earlier one (half started, or half dead) is ended first. When the start fails or is
    interrupted, everything it has started is ended.

    Args:
        settings: Of the installation.
        wait: Return when it answers, not when it was begun.
        progress: Told of every phase.
        application: Import string of the function that makes the Serve application.

    Raises:
        PortTaken: Something else listens on the port.
        StartupFailed: It did not become healthy; names the log.
        Conflict: Another process is starting or stopping it.
    """
    with only_one(settings):
        status = _patient_status(settings)
        if status.healthy:
            return status
        _refuse_if_elsewhere(settings)
        end_instance(settings)
        require_free(settings.host, settings.port)
        start = _Start(settings, application, progress)
        try:
            start.begin()
            if wait:
                start.finish()
        except BaseException:
            start.abandon()
            raise
        return service_status(settings)


def _patient_status(settings: Settings) -> ServiceStatus:
    """Describe the service; one that was up gets a while to answer before it is taken for dead."""
    instance = read_instance(settings)
    patience_s = PATIENCE_S if instance and instance.ready else 0.0
    deadline = time.monotonic() + patience_s
    while True:
        status = service_status(settings)
        if (
            status.healthy
            and instance is not None
            and not (instance.existing or _accepts(instance.ray_address))
        ):
            # HAProxy and the replica go on for a while when the rest is dead.
            status = status.model_copy(update={"healthy": False})
        if status.healthy or not status.running or time.monotonic() >= deadline:
            return status
        time.sleep(POLL_S)


def _accepts(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=HEALTH_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def deploy_to_cluster(
    settings: Settings,
    address: str,
    *,
    allow_no_token: bool = False,
    progress: ProgressCallback | None = None,
    application: str = APPLICATION,
) -> ServiceStatus:
    """Bring the service of this installation up, or up to date, on a Ray cluster that others have started.

    Args:
        settings: Of the installation.
        address: Of the cluster, ``host:port``, or ``auto`` for the one of which this machine is a node.
        allow_no_token: Also on a cluster without token authentication.
        progress: Told of every phase.
        application: Import string of the function that makes the Serve application.

    Raises:
        StartupFailed: No cluster is there, it was refused, or the service did not come up; names the log.
        Conflict: An embedded service of this data directory is up, or another process is deploying.
    """
    instance = read_instance(settings)
    if instance is not None and instance.head() is not None:
        raise Conflict(
            f"{settings.home} has a service of its own at {instance.url}.",
            hint="Stop it first: aidocks down.",
        )
    deploy_service(
        settings, address, application=application, allow_no_token=allow_no_token, progress=progress
    )
    return service_status(settings)


def _refuse_if_elsewhere(settings: Settings) -> None:
    instance = read_instance(settings)
    if instance is not None and instance.existing:
        raise Conflict(
            f"The service of {settings.home} was deployed to the cluster at {instance.ray_address}, "
            "and does not answer.",
            hint="Deploy it again with --ray-address, or give it up: aidocks down.",
        )


def stop_service(settings: Settings) -> bool:
    """End the service of this installation, and nothing else; says whether there was one.

    Of one that was deployed to a cluster of others only what was deployed is ended.

    Raises:
        StartupFailed: That cluster does not answer.
    """
    with only_one(settings):
        instance = read_instance(settings)
        if instance is not None and instance.existing:
            remove_service(settings, instance, APPLICATION)
            return True
        return end_instance(settings)


def answers(url: str) -> bool:
    """Say whether the service at ``url`` reports good health."""
    try:
        # Not through a proxy of the environment: this is always the machine itself or its own network.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{url}/health", timeout=HEALTH_TIMEOUT_S) as response:
            return bool(response.status == 200)
    # The last: something that does not speak HTTP has the port.
    except (OSError, ValueError, urllib.error.URLError, http.client.HTTPException):
        return False


class _Start:
    """One start under way: the head, and the process that deploys onto it."""

    def __init__(self, settings: Settings, application: str, progress: ProgressCallback | None) -> None:
        self._settings = settings
        self._application = application
        self._progress = progress or (lambda _phase, _seconds: None)
        self._log = settings.log_dir / "service.log"
        self._begin = time.monotonic()
        self._head: subprocess.Popen[bytes] | None = None
        self._deploy: subprocess.Popen[bytes] | None = None
        self._phases = settings.log_dir / "startup.jsonl"
        self._told = 0
        self._phase = ""

    def begin(self) -> None:
        """Start both processes at once; the second waits for the first as late as possible."""
        settings = self._settings
        for directory in (settings.home, settings.log_dir, settings.models_dir, settings.workspaces_dir):
            directory.mkdir(parents=True, exist_ok=True)
        head.make_token(settings)
        head.make_temp_dir(settings)
        head.make_proxy_wrapper(settings)
        ports = head.Ports.choose()
        client = head.client_environment(settings, ports)
        instance = Instance(
            url=local_url(settings),
            ray_address=client["RAY_ADDRESS"],
            dashboard=client["RAY_API_SERVER_ADDRESS"],
            environment=client,
        )
        write_instance(settings, instance)
        environment = head.head_environment(settings, ports)
        with self._log.open("wb") as log, self._phases.open("wb") as phases:
            command = head.head_command(settings, ports)
            self._head = _spawn(command, environment, log, log)
            started = psutil.Process(self._head.pid).create_time()
            instance = instance.model_copy(update={"pid": self._head.pid, "started": started})
            write_instance(settings, instance)
            command = [sys.executable, "-m", "cluster.deploy", self._application, head.marker(settings)]
            self._deploy = _spawn(command, environment, phases, log)
        self._instance = instance

    def finish(self) -> None:
        """Wait until the service answers."""
        assert self._head is not None
        assert self._deploy is not None
        url = local_url(self._settings)
        while True:
            self._tell()
            exit_code = self._deploy.poll()
            # Not when the deploying process has ended: taking leave of Ray costs it another second.
            if self._phase == LAST_PHASE and answers(url):
                write_instance(self._settings, self._instance.model_copy(update={"ready": True}))
                self._progress("healthy", self._seconds())
                return
            if exit_code not in (None, 0):
                raise self._failure("The service could not be deployed.")
            if self._head.poll() is not None:
                raise self._failure(f"Ray ended with exit code {self._head.returncode}.")
            if self._seconds() > STARTUP_S:
                raise self._failure(f"The service did not answer within {STARTUP_S:.0f} s.")
            time.sleep(POLL_S)

    def abandon(self) -> None:
        """End everything that was started."""
        if self._deploy is not None:
            self._deploy.kill()
            self._deploy.wait()
        end_instance(self._settings)

    def _seconds(self) -> float:
        return round(time.monotonic() - self._begin, 2)

    def _tell(self) -> None:
        lines = [line for line in self._phases.read_text().splitlines(keepends=True) if line.endswith("\n")]
        for line in lines[self._told :]:
            self._phase = json.loads(line)["phase"]
            self._progress(self._phase, self._seconds())
        self._told = len(lines)

    def _failure(self, message: str) -> StartupFailed:
        tail = self._log.read_text(errors="replace").strip().splitlines()[-5:]
        return StartupFailed(
            " ".join([message, "The log ends:", *tail]) if tail else message,
            hint=f"See {self._log} and {self._settings.log_dir / 'ray'}.",
        )


def _spawn(
    command: list[str], environment: dict[str, str], stdout: BinaryIO, stderr: BinaryIO
) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C in the terminal is for the command that starts the service, not for this.
    return subprocess.Popen(  # noqa: S603 - our own command
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
        close_fds=True,
    )
