"""A service on several machines: each node in a network and a host name of its own, as far as this machine allows.

``python -m tests.support.nodes --nodes 3 -- pytest tests/e2e/test_merge.py`` runs a command against such a service.

Where namespaces may be made (Linux, root), every node has its own network (a bridge connects them, and this machine
is on it, too), its own host name, its own place for Ray's sockets and its own shared memory; killing it ends
all its processes and no other, and its link can be cut. Elsewhere the nodes are raylets under several loopback
addresses. All nodes see one data directory.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from aidocks.settings import Settings
from cluster import head
from cluster.bringup import APPLICATION, start_service, stop_service
from cluster.instance import Instance, read_instance, write_instance
from tests.support.namespaces import Network, enter, has_namespaces
from tests.support.second_node import SecondNode

START_S = 120.0
#: How often a node may be begun.
STARTS = 3
#: What `ray start` says when the cluster knows the node.
STARTED = "Ray runtime started"
#: What every node does before it becomes a node: files of its own in the places where two nodes would quarrel.
SHELL = """
set -e
hostname "$1"; mount --make-rprivate /
mount -t tmpfs tmpfs /dev/shm
mkdir -p "$2/tmp"; cp -a "$3/." "$2/tmp/"; mount --bind "$2/tmp" "$3"
mount --bind "$2/hosts" /etc/hosts
shift 3; exec "$@"
"""


@dataclass
class Node:
    """One machine of the cluster; number 1 is the head, whose end is the end of the service."""

    number: int
    address: str
    process: subprocess.Popen[bytes] | psutil.Process

    @property
    def is_head(self) -> bool:
        return self.number == 1


class NodeEnded(Exception):
    """A node died in its start."""


class Nodes:
    """A service on several nodes.

    Args:
        settings: Of the installation; where it listens is chosen here: see :attr:`settings`.
        cpus: Of each node.
        application: As of :func:`cluster.bringup.start_service`.
        logs: Directory into which all logs are copied in the end. Default: those of the nodes are lost.
    """

    def __init__(
        self,
        settings: Settings,
        cpus: int = 2,
        application: str = APPLICATION,
        logs: Path | None = None,
    ) -> None:
        self._cpus = cpus
        self._application = application
        self._logs = logs
        self._network = Network() if has_namespaces() else None
        if self._network is not None:
            address = self._network.address(1)
            changes = {
                "host": "0.0.0.0",
                "access": "open",
                "allowed_hosts": (*settings.allowed_hosts, address),
                "url": f"http://{address}:{settings.port}",
            }
            settings = settings.model_copy(update=changes)
        self.settings = settings
        self.nodes: list[Node] = []
        self._last = 1

    def start(self, count: int) -> None:
        """Start the service with so many nodes, and wait until it answers."""
        if self._network is None:
            start_service(self.settings, application=self._application)
            instance = read_instance(self.settings)
            assert instance is not None
            assert instance.pid is not None
            self.nodes.append(Node(1, head.LOOPBACK, psutil.Process(instance.pid)))
        else:
            self._start_head(self._network)
        for _ in range(count - len(self.nodes)):
            self.add()

    def add(self) -> Node:
        """Start one more node, and wait until the cluster counts it; begun again if it dies in its start.

        A raylet ends itself where its agents do not come up within 15 s, as on a machine that is very busy. Whoever
        brings machines starts another then.
        """
        for _ in range(STARTS - 1):
            with suppress(NodeEnded):
                return self._add()
        return self._add()

    def _add(self) -> Node:
        self._last += 1
        number = self._last
        if self._network is None:
            address = f"127.0.0.{number}"
            raylet = SecondNode(self.settings, self._cpus, address=address)
            raylet.start()
            process = raylet.process
        else:
            address = self._network.add(number)
            process = self._join(number, address)
            log = self._log(number)
            _until(lambda: process.poll() is not None or STARTED in log.read_text(), f"node {number}")
            if process.poll() is not None:
                self._network.drop(number)
                raise NodeEnded(f"node {number} has ended; see {log}")
        node = Node(number, address, process)
        self.nodes.append(node)
        return node

    def _join(self, number: int, address: str) -> subprocess.Popen[bytes]:
        instance = read_instance(self.settings)
        assert instance is not None
        options = {
            "address": instance.ray_address,
            "node-ip-address": address,
            "num-cpus": self._cpus,
            "object-store-memory": 100 * 1024 * 1024,
            "include-log-monitor": "false",
        }
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
        command += [f"--{name}={value}" for name, value in options.items()]
        return self._spawn(number, command, self._environment | instance.environment)

    def count_alive(self) -> int:
        """Ask the cluster how many nodes are alive."""
        code = (
            "import ray; ray.init(log_to_driver=False, configure_logging=False); "
            "print(sum(node['Alive'] for node in ray.nodes()))"
        )
        return int(self.run_on_head(sys.executable, "-c", code).split()[-1])

    def run_on_head(self, *command: str) -> str:
        """Run a program on the head, in the environment of a Ray driver, and return what it prints."""
        instance = read_instance(self.settings)
        assert instance is not None
        assert instance.pid is not None
        inside = [*enter(instance.pid), *command] if self._network else [*command]
        done = subprocess.run(
            inside, env=os.environ | instance.environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def processes(self, node: Node) -> list[psutil.Process]:
        """Return all processes of a node."""
        found = []
        for pid in self._pids(node):
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(pid))
        return found

    def kill(self, node: Node) -> None:
        """End a node as a power failure does: all its processes at once."""
        while processes := self.processes(node):
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            node.process.wait()
            psutil.wait_procs(processes, timeout=5)
        self.nodes.remove(node)
        if self._network is not None:
            self._network.drop(node.number)

    def stop(self, node: Node) -> None:
        """Halt all processes of a node: a machine that has stopped answering, and may come back."""
        self._signal(node, signal.SIGSTOP)

    def cont(self, node: Node) -> None:
        """Let the processes of a halted node go on."""
        self._signal(node, signal.SIGCONT)

    def partition(self, node: Node) -> None:
        """Cut a node's link. Only where there are namespaces."""
        assert self._network is not None, "loopback addresses have no link that could be cut"
        self._network.set_link(node.number, "down")

    def heal(self, node: Node) -> None:
        """Restore a node's link."""
        assert self._network is not None
        self._network.set_link(node.number, "up")

    def close(self) -> None:
        """End all nodes, and remove what was made for them."""
        for node in [node for node in reversed(self.nodes) if self._network or not node.is_head]:
            self.kill(node)
        stop_service(self.settings)
        self._keep_logs()
        if self._network is not None:
            self._network.remove()

    def _keep_logs(self) -> None:
        if self._logs is None:
            return
        shutil.copytree(self.settings.log_dir, self._logs / "service", dirs_exist_ok=True)
        for number in range(1, self._last + 1) if self._network is not None else ():
            for session in (self._place(number) / "tmp" / "r").glob("session_2*"):
                shutil.copytree(
                    session / "logs",
                    self._logs / f"node-{number}",
                    ignore_dangling_symlinks=True,
                    dirs_exist_ok=True,
                )

    def _start_head(self, network: Network) -> None:
        settings = self.settings
        for directory in (settings.log_dir, settings.models_dir, settings.workspaces_dir):
            directory.mkdir(parents=True, exist_ok=True)
        head.make_token(settings)
        head.make_temp_dir(settings)
        head.make_proxy_wrapper(settings)
        ports = head.Ports.choose()
        address = network.add(1)
        # As the embedded head, but for its address, which the other nodes must reach.
        client = {
            name: value.replace(head.LOOPBACK, address)
            for name, value in head.client_environment(settings, ports).items()
            if name != "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
        }
        environment = head.head_environment(settings, ports) | client
        environment.pop("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
        self._environment = environment
        command = [part.replace(head.LOOPBACK, address) for part in head.head_command(settings, ports)]
        command = [f"--num-cpus={self._cpus}" if "--num-cpus" in part else part for part in command]
        process = self._spawn(1, command, environment)
        self.nodes.append(Node(1, address, process))
        instance = Instance(
            pid=process.pid,
            started=psutil.Process(process.pid).create_time(),
            url=settings.service_url,
            ray_address=client["RAY_ADDRESS"],
            dashboard=client["RAY_API_SERVER_ADDRESS"],
            environment=client,
        )
        write_instance(settings, instance)
        # Not before it is in its namespaces: a driver has to be in the same.
        _until(lambda: (self._place(1) / "tmp" / "r").exists(), "the head's directory")
        deploy = [sys.executable, "-m", "cluster.deploy", self._application, head.marker(settings)]
        with (settings.log_dir / "deploy.log").open("ab") as log:
            done = subprocess.run([*enter(process.pid), *deploy], env=environment, stdout=log, stderr=log)
        assert done.returncode == 0, (settings.log_dir / "deploy.log").read_text()[-2000:]
        _until(lambda: _is_well(settings.service_url), "the service's answer")
        write_instance(settings, instance.model_copy(update={"ready": True}))

    def _spawn(
        self, number: int, command: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start a node's first process in its namespaces."""
        assert self._network is not None
        place = self._place(number)
        place.mkdir(parents=True, exist_ok=True)
        (place / "hosts").write_text(self._network.hosts)
        temp_dir = head.temp_dir(self.settings)
        shell = ["sh", "-c", SHELL, "node", f"node-{number}", str(place), str(temp_dir)]
        inside = ["ip", "netns", "exec", self._network.name(number), "unshare", "--mount", "--uts", *shell]
        with self._log(number).open("ab") as log:
            return subprocess.Popen(
                [*inside, *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _log(self, number: int) -> Path:
        return self.settings.log_dir / f"node-{number}.log"

    def _place(self, number: int) -> Path:
        assert self._network is not None
        return self._network.directory / f"node-{number}"

    def _pids(self, node: Node) -> list[int]:
        if self._network is not None:
            return self._network.pids(node.number)
        try:
            first = psutil.Process(node.process.pid)
            return [first.pid, *(process.pid for process in first.children(recursive=True))]
        except psutil.NoSuchProcess:
            return []

    def _signal(self, node: Node, number: signal.Signals) -> None:
        for process in self.processes(node):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


@contextmanager
def nodes(settings: Settings, count: int, cpus: int = 2) -> Iterator[Nodes]:
    """Run a service on several nodes for a while."""
    made = Nodes(settings, cpus)
    try:
        made.start(count)
        yield made
    finally:
        made.close()


def _is_well(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _until(condition: object, what: str) -> None:
    deadline = time.monotonic() + START_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.nodes", description=__doc__)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("command", nargs="+", help="Run with AIDOCKS_URL and AIDOCKS_HOME of the service.")
    asked = parser.parse_args()
    environment = os.environ | {"AIDOCKS_TEST_NODES": str(asked.nodes)}
    return subprocess.run(asked.command, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
