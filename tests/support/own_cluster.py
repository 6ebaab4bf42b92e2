"""A Ray cluster as its users start it, on loopback: a head that does no work, and a node that does it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from aidocks.settings import Settings
from cluster.head import HEALTH_CHECKS
from cluster.ports import LOOPBACK, free_ports
from tests.conftest import free_port
from tests.support.second_node import ADDRESS, PROGRAM

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "tests" / "support" / "site"
START_S = 60.0
HEAD_PORTS = (
    "port",
    "ray-client-server-port",
    "dashboard-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
    "object-manager-port",
    "node-manager-port",
)
WORKER_PORTS = (
    "dashboard_agent_listen_port",
    "metrics_agent_port",
    "runtime_env_agent_port",
    "metrics_export_port",
    "object_manager_port",
    "node_manager_port",
)


@dataclass
class OwnCluster:
    """Head and worker node, which can be killed and started again.

    Attributes:
        settings: Of the installation that is to be deployed.
        storage: Variables that say where the head keeps what it knows.
        directory: Ray's temporary directory, which must have a short path.
    """

    settings: Settings
    storage: dict[str, str]
    directory: Path
    authenticated: bool = True
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    ports: dict[str, int] = field(
        default_factory=lambda: dict(zip(HEAD_PORTS, free_ports(len(HEAD_PORTS)), strict=True))
    )
    head: subprocess.Popen[bytes] | None = None
    worker: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self.ports['port']}"

    @property
    def client_address(self) -> str:
        return f"ray://{LOOPBACK}:{self.ports['ray-client-server-port']}"

    @property
    def dashboard(self) -> str:
        return f"http://{LOOPBACK}:{self.ports['dashboard-port']}"

    @property
    def access(self) -> dict[str, str]:
        """What whoever may use the cluster has in the environment."""
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        return (token if self.authenticated else {"RAY_AUTH_MODE": "disabled"}) | {
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"
        }

    def environment(self) -> dict[str, str]:
        """Return the environment of the nodes' processes: that of an image in which AIDocks is installed."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("AIDOCKS_", "RAY_"))}
        return (
            inherited
            | self.settings.environment()
            | self.access
            | self.storage
            | HEALTH_CHECKS
            | {
                "PATH": os.pathsep.join([str(Path(sys.executable).parent), inherited["PATH"]]),
                "PYTHONPATH": os.pathsep.join([str(SITE), str(ROOT)]),
                "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(free_port()),
                "RAY_gcs_rpc_server_reconnect_timeout_s": "300",
            }
        )

    def start_head(self) -> None:
        """Start the head, and wait until it answers."""
        flags = [f"--{name}={port}" for name, port in self.ports.items()]
        fixed = {
            "node-ip-address": LOOPBACK,
            "dashboard-host": LOOPBACK,
            "num-cpus": 0,
            "object-store-memory": 100 * 1024 * 1024,
            "temp-dir": self.directory,
            "include-log-monitor": "false",
        }
        flags += [f"--{name}={value}" for name, value in fixed.items()]
        # A head does not start where this file says that another one is there.
        (self.directory / "ray_current_cluster").unlink(missing_ok=True)
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--no-monitor"]
        self.head = self._spawn([*command, *flags], "head.log")
        request = urllib.request.Request(f"{self.dashboard}/api/version")
        if self.authenticated:
            request.add_header("Authorization", f"Bearer {self.token}")
        deadline = time.monotonic() + START_S
        while True:
            with suppress(OSError), urllib.request.urlopen(request, timeout=1):
                return
            assert self.head.poll() is None, (self.directory / "head.log").read_text()[-2000:]
            assert time.monotonic() < deadline, "the head does not come up"
            time.sleep(0.1)

    def start_worker(self, cpus: int = 2) -> None:
        """Start the other node; it joins by itself."""
        parameters = dict(zip(WORKER_PORTS, free_ports(len(WORKER_PORTS)), strict=True)) | {
            "gcs_address": self.address,
            "node_ip_address": ADDRESS,
            "num_cpus": cpus,
            "object_store_memory": 100 * 1024 * 1024,
            "include_log_monitor": False,
        }
        self.worker = self._spawn([sys.executable, "-c", PROGRAM, json.dumps(parameters)], "worker.log")

    def kill_head(self) -> None:
        """End the head as a power failure does: all its processes at once."""
        assert self.head is not None
        _kill_session(self.head)

    def stop(self) -> None:
        for process in (self.head, self.worker):
            if process is not None:
                _kill_session(process)

    def _spawn(self, command: list[str], log: str) -> subprocess.Popen[bytes]:
        with (self.directory / log).open("ab") as file:
            return subprocess.Popen(
                command,
                env=self.environment(),
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    for found in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if os.getsid(found.pid) == process.pid:
                os.kill(found.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def own_cluster(
    settings: Settings, storage: dict[str, str] | None = None, *, authenticated: bool = True
) -> Iterator[OwnCluster]:
    """Start a head for a while; whoever needs one starts the worker node."""
    directory = Path(tempfile.mkdtemp(prefix="oc-", dir="/tmp"))
    cluster = OwnCluster(settings, storage or {}, directory, authenticated)
    try:
        cluster.start_head()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(directory, ignore_errors=True)
