"""Networks of network namespaces on this machine: each a machine of its own, as far as the others can tell."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path


@cache
def has_namespaces() -> bool:
    """Say whether network namespaces can be made here (and ``AIDOCKS_TEST_NAMESPACES`` is not 0)."""
    if os.environ.get("AIDOCKS_TEST_NAMESPACES") == "0":
        return False
    name = f"adtry{os.getpid()}"
    if os.getuid() != 0 or not shutil.which("ip") or not shutil.which("nsenter"):
        return False
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    if made:
        entered = ["ip", "netns", "exec", name, "unshare", "--mount", "--uts", "hostname", name]
        made = subprocess.run(entered, capture_output=True).returncode == 0
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return made


class Network:
    """A bridge of this machine, and a network namespace for every node behind it."""

    def __init__(self) -> None:
        # Names of interfaces have at most 15 characters; several of these may be there at once.
        self._token = f"{os.getpid() % 0xFFFFF:05x}"
        self._prefix = f"10.{64 + os.getpid() // 250 % 64}.{os.getpid() % 250}"
        self._made: list[int] = []
        self.directory = Path(tempfile.mkdtemp(prefix="aidocks-nodes-"))
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self._prefix}.254/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")

    @property
    def _bridge(self) -> str:
        return f"adb{self._token}"

    @property
    def hosts(self) -> str:
        """What the nodes find in /etc/hosts."""
        nodes = "".join(f"{self.address(number)} node-{number}\n" for number in range(1, 33))
        return f"127.0.0.1 localhost\n{nodes}"

    def address(self, number: int) -> str:
        return f"{self._prefix}.{number}"

    def name(self, number: int) -> str:
        return f"ad{self._token}-{number}"

    def add(self, number: int) -> str:
        """Make the namespace of a node and connect it; returns its address."""
        name, outer, inner = self.name(number), f"adv{self._token}-{number}", f"adw{self._token}-{number}"
        _ip("netns", "add", name)
        self._made.append(number)
        _ip("link", "add", outer, "type", "veth", "peer", "name", inner, "netns", name)
        _ip("link", "set", outer, "master", self._bridge, "up")
        _ip("-n", name, "link", "set", inner, "name", "eth0")
        _ip("-n", name, "addr", "add", f"{self.address(number)}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", name, "link", "set", device, "up")
        return self.address(number)

    def set_link(self, number: int, state: str) -> None:
        _ip("link", "set", f"adv{self._token}-{number}", state)

    def pids(self, number: int) -> list[int]:
        return [int(pid) for pid in _ip("netns", "pids", self.name(number)).split()]

    def drop(self, number: int) -> None:
        """Remove the namespace of a node; what still runs in it is ended."""
        for pid in self.pids(number):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _ip("netns", "del", self.name(number))
        self._made.remove(number)

    def remove(self) -> None:
        for number in list(self._made):
            self.drop(number)
        _ip("link", "del", self._bridge)
        shutil.rmtree(self.directory, ignore_errors=True)


def enter(pid: int) -> list[str]:
    """Return the beginning of a command that runs another in the namespaces of a process."""
    return ["nsenter", f"--target={pid}", "--net", "--mount", "--uts", f"--wd={os.getcwd()}", "--"]


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
