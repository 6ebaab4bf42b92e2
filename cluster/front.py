"""What Serve starts as HAProxy: corrects the configuration, leaves a guard behind, and becomes HAProxy.

Serve takes only a child of its own for HAProxy, hence the last. It notices the death of HAProxy, or of the actor that
minds it, within 3 to 5 s, and the next HAProxy knows no routes at first. So that somebody answers on the service's port
all the time, one process *holds* the port:

- when the holder dies, its guard starts a stand-in of the same configuration at once;
- a HAProxy without routes stays aside, on sockets that nobody asks, while there is a holder;
- one with routes becomes the holder: it gets the listening socket from the one before, which then ends.

The guard ends all this when Ray's head is gone. Needs nothing but the standard library: it is started anew for every
change of the configuration.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

GUARD = "--guard"
#: Seconds between two looks at whether another process holds the port now.
LOOK_S = 2.0
#: Within which a stand-in listens, or does not.
LISTEN_S = 3.0
_LONGEST_PAUSE_S = 5.0
_BODY = (
    '{"type":"urn:aidocks:error:service_unreachable","title":"The service does not answer","status":503,'
    '"code":"service_unreachable","detail":"The process that answers is being replaced.",'
    '"hint":"Ask again in a moment."}'
)
#: What is answered when there is nobody who could. Serve's own page says 500, which no client repeats.
ERROR_PAGE = (
    "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/problem+json\r\nRetry-After: 1\r\n"
    f"Content-Length: {len(_BODY)}\r\nCache-Control: no-store\r\n\r\n{_BODY}"
)
# Else callers could say where they come from.
_TRUE_ADDRESS = "http-request set-header X-Forwarded-For %[src]"


def correct(configuration: str, port: int) -> str:
    """Return a configuration of Serve's as it should be.

    Statistics keep to loopback, for which Serve has no option. Without routes the answer is to come again, not that
    there is no such thing. The address of callers is what it is.

    Args:
        configuration: As Serve writes it.
        port: On which the service listens.
    """
    lines = []
    for line in configuration.splitlines():
        bind = re.fullmatch(r"( *)bind (\S+):([0-9]+)", line)
        if bind and int(bind[3]) == port:
            lines += [line, f"{bind[1]}{_TRUE_ADDRESS}"]
        elif bind and bind[2] == "*":
            lines.append(f"{bind[1]}bind 127.0.0.1:{bind[3]}")
        elif line.strip() != _TRUE_ADDRESS:
            line = re.sub(r"^( *bind) :", r"\1 127.0.0.1:", line)
            lines.append(re.sub(r"return status 404 .*", "return status 503 default-errorfiles", line))
    return "\n".join(lines) + "\n"


def aside(configuration: str, prefix: str, port: int | None = None) -> str:
    """Return a configuration whose ports, but for ``port``, are files, named so and numbered, that nobody asks."""
    numbers = iter(range(100))

    def away(bind: re.Match[str]) -> str:
        kept = port is not None and bind[2].endswith(f":{port}")
        return bind[0] if kept else f"{bind[1]}bind unix@{prefix}{next(numbers)}"

    return re.sub(r"(?m)^( *)bind ((?!unix@)\S+)$", away, configuration)


class Places:
    """The files of one front, beside its configuration."""

    def __init__(self, configuration: str) -> None:
        self.configuration = configuration
        self.directory = os.path.dirname(configuration)
        self.standin_configuration = f"{self.directory}/standin.cfg"
        self.standin_socket = f"{self.directory}/s"
        self.error_page = f"{self.directory}/500.http"
        self._holder = f"{self.directory}/holder"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only one who changes who holds the port."""
        with open(f"{self.directory}/front.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def holder(self) -> tuple[int, str]:
        """Return the process that was last to take the port, 0 when there was none, and its socket."""
        try:
            pid, _, admin = read(self._holder).partition(" ")
            return int(pid), admin
        except (OSError, ValueError):
            return 0, ""

    def hold(self, pid: int, admin: str) -> None:
        write(self._holder, f"{pid} {admin}")

    def lives(self, pid: int) -> bool:
        """Say whether a process is a HAProxy of this front, and has not ended."""
        try:
            return f"{self.directory}/" in read(f"/proc/{pid}/cmdline") and pid > 0
        except OSError:
            return False


def read(path: str) -> str:
    with open(path) as file:
        return file.read()


def write(path: str, text: str) -> None:
    """Replace a file."""
    with open(f"{path}.new", "w", newline="") as file:
        file.write(text)
    os.replace(f"{path}.new", path)


def become_haproxy(binary: str, port: int, marker: str, arguments: list[str]) -> None:
    """Correct the configuration that the arguments name, and go on as HAProxy. Does not return.

    Args:
        binary: HAProxy's own.
        port: On which the service listens.
        marker: Argument by which processes of this installation are known.
        arguments: Of Serve, for HAProxy.
    """
    path = next((argument for argument in arguments if argument.endswith(".cfg")), None)
    if path is not None:
        places = Places(os.path.abspath(path))
        configuration = correct(read(path), port)
        write(path, configuration)
        if "-db" in arguments:  # it is to run, not only to look at the configuration
            write(places.error_page, ERROR_PAGE)
            with places.alone():
                arguments = _take_place(places, configuration, port, binary, marker, arguments)
                os.execv(binary, [binary, *arguments])  # noqa: S606 - the lock goes with the file that exec closes
    os.execv(binary, [binary, *arguments])  # noqa: S606 - the program that the installation has


def _take_place(
    places: Places, configuration: str, port: int, binary: str, marker: str, arguments: list[str]
) -> list[str]:
    """Take the port over from its holder, or stay aside; returns what HAProxy is to be started with."""
    holder, admin = places.holder()
    lives = places.lives(holder)
    if lives and not re.search(r"(?m)^ *use_backend ", configuration):
        write(places.configuration, aside(configuration, f"{places.directory}/a"))
        return arguments
    if lives and str(holder) not in arguments:
        arguments = [*_without_transfer(arguments), "-sf", str(holder)]
        arguments += ["-x", admin] if os.path.exists(admin) else []
    places.hold(os.getpid(), admin_socket(configuration))
    _leave_guard(marker, binary, str(port), places.configuration, str(os.getpid()))
    return arguments


def _leave_guard(*arguments: str) -> None:
    """Start the guard as a grandchild in a group of its own: Ray ends what an actor leaves behind."""
    command = [sys.executable, "-I", "-S", __file__, GUARD, *arguments]
    child = os.fork()
    if child == 0:
        if os.fork() == 0:
            os.setpgid(0, 0)
            nothing = os.open(os.devnull, os.O_RDWR)
            for descriptor in range(3):
                os.dup2(nothing, descriptor)
            os.execv(sys.executable, command)  # noqa: S606 - this module
        os._exit(0)
    os.waitpid(child, 0)


def _without_transfer(arguments: list[str]) -> list[str]:
    """Leave out from which socket HAProxy was to get the listening ones."""
    if "-x" not in arguments:
        return arguments
    at = arguments.index("-x")
    return arguments[:at] + arguments[at + 2 :]


def admin_socket(configuration: str) -> str:
    found = re.search(r"(?m)^ *stats socket (\S+)", configuration)
    return found[1] if found else ""


def guard(binary: str, port: int, configuration: str, pid: int) -> None:
    """Start a stand-in when the holder of the port dies; end when another holds it.

    Args:
        binary: HAProxy's own.
        port: On which the service listens.
        configuration: Of the HAProxy that is guarded.
        pid: Of that HAProxy.
    """
    places = Places(configuration)
    head = os.getsid(0)
    pause_s = 0.05
    while True:
        if not _wait_for_end(pid, head, places):
            return
        with places.alone():
            holder, _ = places.holder()
            if holder != pid:
                return
            standin = _start_standin(binary, port, places)
            if _listens(standin, places):
                places.hold(standin, places.standin_socket)
                pid, pause_s = standin, 0.05
                continue
        # Perhaps an older one serves on, and the one that was to follow could not be started.
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _wait_for_end(pid: int, head: int, places: Places) -> bool:
    """Wait until a process has ended; say no when there is nothing to guard any more."""
    watched = select.poll()
    descriptors = []
    for one in (pid, head):
        with suppress(OSError):
            descriptors.append(os.pidfd_open(one))
            watched.register(descriptors[-1], select.POLLIN)
    try:
        while True:
            if not _runs(head):
                if places.lives(places.holder()[0]):
                    os.kill(places.holder()[0], signal.SIGTERM)
                return False
            if places.holder()[0] != pid:
                return False
            if not places.lives(pid):
                return True
            watched.poll(LOOK_S * 1000)
            with suppress(ChildProcessError):
                os.waitpid(-1, os.WNOHANG)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _runs(pid: int) -> bool:
    try:
        return read(f"/proc/{pid}/stat").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _start_standin(binary: str, port: int, places: Places) -> int:
    """Start HAProxy with the configuration of the one that has died, on the service's port alone."""
    configuration = correct(read(places.configuration), port)
    configuration = configuration.replace(
        f"stats socket {admin_socket(configuration)} ", f"stats socket {places.standin_socket} "
    )
    write(places.standin_configuration, aside(configuration, f"{places.directory}/t", port))
    with suppress(FileNotFoundError):
        os.unlink(places.standin_socket)
    log = os.open(f"{places.directory}/standin.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    command = [binary, "-db", "-dR", "-f", places.standin_configuration]
    into_log = [(os.POSIX_SPAWN_DUP2, log, descriptor) for descriptor in (1, 2)]
    try:
        return os.posix_spawn(binary, command, os.environ, file_actions=into_log)
    finally:
        os.close(log)


def _listens(pid: int, places: Places) -> bool:
    """Wait until a stand-in listens; say no when it has ended instead."""
    deadline = time.monotonic() + LISTEN_S
    while time.monotonic() < deadline:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        with socket.socket(socket.AF_UNIX) as admin, suppress(OSError):
            admin.settimeout(LISTEN_S)
            admin.connect(places.standin_socket)
            # It listens there before it knows whether it gets the port; it answers afterwards.
            admin.sendall(b"show info\n")
            if admin.recv(1):
                return True
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def main(arguments: list[str]) -> None:
    """Do what the first argument says: guard, or (it is the marker) become HAProxy."""
    if arguments[0] == GUARD:
        _, _, binary, port, configuration, pid = arguments
        guard(binary, int(port), configuration, int(pid))
    else:
        marker, binary, port, *rest = arguments
        become_haproxy(binary, int(port), marker, rest)


if __name__ == "__main__":
    main(sys.argv[1:])
