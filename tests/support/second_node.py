"""A second node for the private cluster of a service: another raylet, under another loopback address."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from aidocks.settings import Settings
from cluster import head
from cluster.instance import read_instance
from cluster.ports import free_ports

ADDRESS = "127.0.0.2"
START_S = 60.0
#: Mounts a directory over another one, for this process and what it starts alone.
UNSHARE = ("unshare", "--mount", "--propagation", "private")
APART = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
#: ``ray start`` refuses a second node where the cluster keeps to loopback; this is what it does otherwise.
PROGRAM = """
import json, signal, sys
import ray._private.node
from ray._private.parameter import RayParams
ray._private.node.Node(
    RayParams(**json.loads(sys.argv[1])), head=False, shutdown_at_exit=True, spawn_reaper=False
)
signal.pause()
"""


class SecondNode:
    """One more raylet. Ray Train takes what has another address for another node.

    Args:
        settings: Of the service.
        cpus: That the node says it has.
        own_home: A directory that the node's processes see in place of the data directory, as if it were a machine
            that shares no file system with the first one. Default: they see the data directory.
        address: Loopback address under which it is a node.
    """

    def __init__(
        self, settings: Settings, cpus: int, own_home: Path | None = None, address: str = ADDRESS
    ) -> None:
        self._address = address
        self._settings = settings
        self._cpus = cpus
        self._own_home = own_home
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, unless it runs, and wait until the cluster counts one node more."""
        if self._process is not None and self._process.poll() is None:
            return
        before = self._alive()
        instance = read_instance(self._settings)
        assert instance is not None
        names = (
            "dashboard_agent_listen_port",
            "metrics_agent_port",
            "runtime_env_agent_port",
            "metrics_export_port",
            "object_manager_port",
            "node_manager_port",
        )
        parameters = dict(zip(names, free_ports(len(names)), strict=True)) | {
            "gcs_address": instance.environment["RAY_ADDRESS"],
            "node_ip_address": self._address,
            "num_cpus": self._cpus,
            "object_store_memory": 100 * 1024 * 1024,
            "include_log_monitor": False,
        }
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment = inherited | head.settings_environment(self._settings) | instance.environment
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(head.service_root()), *filter(None, [inherited.get("PYTHONPATH")])]
        )
        with (self._settings.log_dir / "second-node.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._apart(), sys.executable, "-c", PROGRAM, json.dumps(parameters)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_S
        while self._alive() <= before:
            assert self._process.poll() is None, "the second node has ended"
            assert time.monotonic() < deadline, "the second node does not come up"

    def _apart(self) -> list[str]:
        """Return the beginning of a command that runs with a data directory of its own."""
        if self._own_home is None:
            return []
        for directory in (self._own_home, self._own_home / "logs"):
            directory.mkdir(parents=True, exist_ok=True)
        shutil.copy2(self._settings.token_file, self._own_home)
        own, home = str(self._own_home), str(self._settings.home)
        return [*UNSHARE, "sh", "-c", APART, "sh", own, home]

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The first of its processes."""
        assert self._process is not None
        return self._process

    def count_nodes(self) -> int:
        """Ask the cluster how many nodes are alive."""
        return len(self._alive())

    def _alive(self) -> set[str]:
        """Ask the cluster for the ids of its nodes; one that has just died may still be among them."""
        instance = read_instance(self._settings)
        assert instance is not None
        code = (
            "import ray; ray.init(log_to_driver=False, configure_logging=False); "
            "print(*(node['NodeID'] for node in ray.nodes() if node['Alive']))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | instance.environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        return set(done.stdout.splitlines()[-1].split())

    def kill(self) -> None:
        """End it as a power failure does: all its processes at once."""
        if self._process is None:
            return
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._process.pid)
            for process in (root, *root.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self._process.wait()
        self._process = None


def require_apart(directory: Path) -> None:
    """Skip a test where this machine does not let a process have mounts of its own."""
    command = [*UNSHARE, "sh", "-c", APART, "sh", str(directory), str(directory), "true"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=30, check=False)
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if done.returncode:
        pytest.skip("processes may not have mounts of their own here")


@contextmanager
def second_node(settings: Settings, cpus: int = 3, own_home: Path | None = None) -> Iterator[SecondNode]:
    """Give the running service of an installation a second node for a while."""
    node = SecondNode(settings, cpus, own_home)
    try:
        node.start()
        yield node
    finally:
        node.kill()
