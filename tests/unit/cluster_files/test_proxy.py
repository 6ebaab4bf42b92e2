"""The program that stands before HAProxy: what it makes of the configuration, and who holds the port when one dies."""

from __future__ import annotations

import http.client
import json
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from aidocks.settings import Settings
from cluster import front, head
from cluster.instance import is_ours
from tests.conftest import free_port

#: As Serve writes it, as far as it matters here.
CONFIGURATION = """\
global
    stats socket {directory}/p mode 666 level admin expose-fd listeners
    hard-stop-after 5s
defaults
    mode http
    timeout client 5s
    timeout connect 5s
    timeout server 5s
    errorfile 503 {directory}/500.http
frontend prometheus
    bind :{statistics}
    http-request return status 200 content-type text/plain string "figures"
frontend http_frontend
    bind {host}:{port}
{route}
    default_backend default_backend
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path \\'%[path]\\' not found."
backend http-api
    http-request return status 200 content-type text/plain lf-string "%[req.fhdr(x-forwarded-for)]"
"""
ROUTE = "    use_backend http-api if TRUE"
DEADLINE_S = 20.0


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value


class Front:
    """What Serve does with its HAProxy, in a session of its own, as under Ray's head."""

    def __init__(self, home: Path, host: str = "127.0.0.1") -> None:
        self.settings = Settings(home=home, host=host, port=free_port())
        self.directory = head.make_temp_dir(self.settings) / "node"
        self.directory.mkdir()
        head.make_proxy_wrapper(self.settings)
        self.wrapper = self.directory.parent / "haproxy"
        self.configuration = self.directory / "haproxy.cfg"
        self.statistics = free_port()
        # Starts in the background whatever it reads.
        self.head = subprocess.Popen(
            ["sh"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    def write(self, route: str = ROUTE) -> None:
        host = self.settings.host.replace("0.0.0.0", "*")
        places = {"directory": self.directory, "host": host, "port": self.settings.port}
        self.configuration.write_text(CONFIGURATION.format(**places, statistics=self.statistics, route=route))
        (self.directory / "500.http").write_text("HTTP/1.1 500 Internal Server Error\r\n\r\n")

    def start(self, *arguments: str, route: str = ROUTE) -> psutil.Process:
        """Start HAProxy as Serve does; it is the process that was started. Returns when it is ready."""
        self.write(route)
        process = self.run([str(self.wrapper), "-db", "-f", str(self.configuration), "-dR", *arguments])
        until(lambda: f"Pid: {process.pid}\n" in self.info())
        return process

    def run(self, command: list[str]) -> psutil.Process:
        assert self.head.stdin is not None
        assert self.head.stdout is not None
        self.head.stdin.write(f"{shlex.join(command)} >>{self.directory}/log 2>&1 & echo $!\n")
        self.head.stdin.flush()
        return psutil.Process(int(self.head.stdout.readline()))

    def info(self) -> str:
        """Ask HAProxy's own socket, as Serve does to see whether its HAProxy is there."""
        with socket.socket(socket.AF_UNIX) as admin, suppress(OSError):
            admin.connect(str(self.directory / "p"))
            admin.sendall(b"show info\n")
            return admin.makefile().read()
        return ""

    def ask(self, **headers: str) -> tuple[int, str, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.settings.port, timeout=5)
        with closing(connection):
            connection.request("GET", "/jobs", headers=headers)
            response = connection.getresponse()
            return response.status, response.read().decode(), response.headers.get("retry-after", "")

    def answers(self) -> bool:
        with suppress(OSError, http.client.HTTPException):
            return self.ask()[0] == 200
        return False

    def processes(self) -> list[psutil.Process]:
        """Return the processes of HAProxy and its guards."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if any(str(self.directory) in argument for argument in process.cmdline()):
                    found.append(process)
        return found


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Front]:
    made = Front(tmp_path)
    if not made.wrapper.exists():
        pytest.skip("there is no HAProxy here")
    yield made
    made.head.kill()
    made.head.communicate()
    for process in made.processes():
        with suppress(psutil.Error):
            process.kill()
    shutil.rmtree(made.directory.parent)


def test_only_the_service_listens_everywhere() -> None:
    written = "    bind :9101\n    bind *:8723\n  bind *:8404\n    bind 192.0.2.1:80\n"
    lines = front.correct(written, 8723).splitlines()
    assert [line for line in lines if "bind" in line] == [
        "    bind 127.0.0.1:9101",
        "    bind *:8723",
        "  bind 127.0.0.1:8404",
        "    bind 192.0.2.1:80",
    ]
    assert front.correct(front.correct(written, 8723), 8723) == front.correct(written, 8723)


def test_callers_cannot_say_where_they_come_from(made: Front) -> None:
    made.start()
    assert made.ask(**{"X-Forwarded-For": "203.0.113.9"}) == (200, "127.0.0.1", "")


def test_without_routes_the_answer_is_to_come_again(made: Front) -> None:
    made.start(route="")
    status, body, retry_after = made.ask()
    assert (status, json.loads(body)["code"], retry_after) == (503, "service_unreachable", "1")


def test_somebody_answers_though_haproxy_dies_again_and_again(made: Front) -> None:
    process = made.start()
    for _ in range(3):
        process.kill()
        until(made.answers)
        (process,) = (one for one in made.processes() if one.name() == "haproxy" and one.is_running())
    assert made.info() == "", "Serve sees that its own is gone"


def test_the_next_haproxy_takes_over_when_it_knows_the_routes(made: Front) -> None:
    made.start().kill()
    until(made.answers)
    empty = made.start(route="")
    assert made.ask()[0] == 200, "the stand-in goes on"
    following = made.start("-sf", str(empty.pid), "-x", f"{made.directory}/p")
    until(lambda: [one.pid for one in made.processes() if one.name() == "haproxy"] == [following.pid])
    assert made.answers()
    following.kill()
    until(made.answers)


def test_a_reload_leaves_one_guard(made: Front) -> None:
    first = made.start()
    second = made.start("-sf", str(first.pid), "-x", f"{made.directory}/p")
    until(lambda: len(made.processes()) == 2)
    assert second.is_running()
    assert made.answers()


def test_an_older_one_serves_on_when_the_next_dies_at_once(made: Front) -> None:
    first = made.start()
    made.write()
    arguments = ["-dR", "-sf", str(first.pid), "-x", f"{made.directory}/none"]
    # It cannot get the listening sockets, and ends.
    following = made.run([str(made.wrapper), "-db", "-f", str(made.configuration), *arguments])
    until(lambda: not following.is_running() or following.status() == psutil.STATUS_ZOMBIE)
    assert first.is_running()
    assert made.answers()
    first.kill()
    until(made.answers)


@pytest.mark.parametrize("dies_first", [True, False])
def test_nothing_is_left_when_the_head_is_gone(made: Front, dies_first: bool) -> None:
    process = made.start()
    if dies_first:
        process.kill()
        until(made.answers)
    made.head.kill()
    made.head.wait()
    until(lambda: not made.processes())


def test_what_runs_without_a_head_is_known_as_ours(made: Front) -> None:
    made.start()
    commands = [process.cmdline() for process in made.processes()]
    assert len(commands) == 2
    assert all(is_ours(command, made.settings) for command in commands)
