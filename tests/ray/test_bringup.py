"""Starting and stopping the embedded service."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from aidocks.errors import PortTaken, StartupFailed
from aidocks.settings import Settings
from cluster import head
from cluster.bringup import answers, service_status, start_service, stop_service
from cluster.head import temp_dir
from tests.conftest import free_port

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow

TRIVIAL_APPLICATION = "tests.support.trivial_app:build_app"


def session_processes(session: int) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if _session(process.pid) == session]


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return -1


def test_starting_what_runs_does_nothing(trivial_settings: Settings) -> None:
    before = service_status(trivial_settings)
    assert before.healthy
    phases: list[str] = []
    after = start_service(trivial_settings, progress=lambda phase, _: phases.append(phase))
    assert (after.pid, phases) == (before.pid, [])


def test_everything_listens_on_loopback(trivial_settings: Settings) -> None:
    pid = service_status(trivial_settings).pid
    assert pid is not None
    outside = []
    for process in session_processes(pid):
        with suppress(psutil.NoSuchProcess):  # some are short-lived helpers of Ray
            for connection in process.net_connections(kind="tcp"):
                address = connection.laddr.ip.removeprefix("::ffff:") if connection.laddr else ""
                if connection.status == psutil.CONN_LISTEN and address not in ("127.0.0.1", "::1"):
                    outside.append((process.name(), address))
    # A replica's own gRPC port is on all interfaces (Serve has no option); it asks for the token.
    assert {name for name, _ in outside} <= {"ray::ServeReplica:api:Trivial", "ray::ServeRepli"}


def test_the_token_is_for_this_user_only(trivial_settings: Settings) -> None:
    assert stat.S_IMODE(trivial_settings.token_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(temp_dir(trivial_settings).stat().st_mode) == 0o700


def test_a_taken_port_is_said_before_anything_is_started(settings: Settings) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(PortTaken, match=f"Port {port} is taken by process {os.getpid()}") as caught:
            start_service(settings.model_copy(update={"port": port}))
    assert str(port + 1) in str(caught.value)
    assert not settings.state_file.exists()
    assert not temp_dir(settings).exists()


def test_what_does_not_speak_http_is_not_the_service() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()

        def greet() -> None:
            connection, _ = holder.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(bytes([0, 0, 18, 4, 0, 0, 0, 0, 0]) * 3 + b"\r\n")  # settings of HTTP/2

        greeting = threading.Thread(target=greet)
        greeting.start()
        assert answers(f"http://127.0.0.1:{holder.getsockname()[1]}") is False
        greeting.join()


def test_a_failing_start_leaves_nothing(settings: Settings) -> None:
    mine = settings.model_copy(update={"port": free_port()})
    with pytest.raises(StartupFailed, match="no_such_module") as caught:
        start_service(mine, application="no_such_module:build_app")
    assert str(mine.log_dir) in str(caught.value)
    assert not mine.state_file.exists()
    assert not temp_dir(mine).exists()
    assert not service_status(mine).running


def test_an_interrupted_start_leaves_nothing(settings: Settings) -> None:
    mine = settings.model_copy(update={"port": free_port()})
    program = (
        "import sys; from pathlib import Path; from aidocks.settings import Settings\n"
        "from cluster.bringup import start_service\n"
        "settings = Settings(home=Path(sys.argv[1]), port=int(sys.argv[2]))\n"
        "start_service(settings, progress=lambda phase, _: print(phase, flush=True))"
    )
    command = [sys.executable, "-c", program, str(mine.home), str(mine.port)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as starting:
        assert starting.stdout is not None
        assert starting.stdout.readline() == "imported\n"
        pid = service_status(mine).pid
        starting.send_signal(signal.SIGINT)
        assert starting.wait(30) != 0
    assert pid is not None
    assert session_processes(pid) == []
    assert not mine.state_file.exists()
    assert not temp_dir(mine).exists()


def test_no_port_is_a_default_of_ray(settings: Settings) -> None:
    ports = head.Ports.choose()
    chosen = {str(port) for port in dataclasses.astuple(ports)}
    assert len(chosen) == len(dataclasses.fields(ports))
    environment = head.head_environment(settings, ports)
    options = [option for option in head.head_command(settings, ports) if "port" in option]
    given = {value for name, value in environment.items() if name.endswith("_PORT") and "INGRESS" not in name}
    given |= {option.partition("=")[2] for option in options}
    assert chosen <= given | {environment["RAY_ADDRESS"].rpartition(":")[2]}


def test_the_head_inherits_nothing_of_another_ray(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    monkeypatch.setenv("RAY_TMPDIR", "/somewhere")
    monkeypatch.setenv("AIDOCKS_PORT", "1")
    environment = head.head_environment(settings, head.Ports.choose())
    assert environment["RAY_ADDRESS"].startswith("127.0.0.1:")
    assert "RAY_TMPDIR" not in environment
    assert environment["AIDOCKS_PORT"] == str(settings.port)


def test_a_half_started_service_is_cleared_away(tmp_path: Path, trivial_settings: Settings) -> None:
    settings = Settings(home=tmp_path / "home", port=free_port(), workers=1)
    try:
        first = start_service(settings, wait=False, application=TRIVIAL_APPLICATION)
        assert first.running
        assert not first.healthy
        os.kill(first.pid or 0, signal.SIGKILL)
        second = start_service(settings, application=TRIVIAL_APPLICATION)
        assert second.healthy
        assert second.pid != first.pid
        assert session_processes(first.pid or 0) == []
    finally:
        assert stop_service(settings)
    assert not stop_service(settings)
    assert session_processes(second.pid or 0) == []
    assert not temp_dir(settings).exists()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", settings.port)).close()
    assert service_status(trivial_settings).healthy, "another Ray of the same machine is not touched"
