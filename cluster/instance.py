"""What is known of the running embedded service, and how all of it is ended."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from pydantic import BaseModel, ValidationError

from aidocks.errors import Conflict
from aidocks.settings import Settings
from cluster.front import GUARD
from cluster.head import marker as head_marker
from cluster.head import ray_dir, temp_dir

TERMINATE_S = 1.0
KILL_S = 5.0
#: What a head starts under its own command line; named with the temporary directory in an argument.
DAEMONS = ("gcs_server", "raylet", "haproxy")


class Instance(BaseModel):
    """The state file: written before anything is started, so that whatever is half-started can be found."""

    pid: int | None = None
    started: float = 0.0
    ready: bool = False
    url: str
    ray_address: str
    dashboard: str
    environment: dict[str, str]
    #: On a cluster that others have started: none of its processes is ours.
    existing: bool = False

    def head(self) -> psutil.Process | None:
        """Return the head's process, if that is what now has its process id."""
        if self.pid is None:
            return None
        try:
            process = psutil.Process(self.pid)
            same = process.create_time() == self.started and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return None
        return process if same else None


def read_instance(settings: Settings) -> Instance | None:
    """Return what the state file says, or None when there is none (or none that can be read)."""
    try:
        return Instance.model_validate_json(settings.state_file.read_text())
    except (OSError, ValidationError):
        return None


def write_instance(settings: Settings, instance: Instance) -> None:
    """Replace the state file."""
    aside = settings.state_file.with_name(f".{settings.state_file.name}.{os.getpid()}")
    with aside.open("w") as file:
        json.dump(instance.model_dump(mode="json"), file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(settings.state_file)


@contextmanager
def only_one(settings: Settings) -> Iterator[None]:
    """Hold the right to start and stop this installation's service.

    Raises:
        Conflict: Another process is doing that now.
    """
    settings.home.mkdir(parents=True, exist_ok=True)
    with (settings.home / "service.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(
                f"Another process is starting or stopping the service of {settings.home}.",
                hint="Wait for it, then look: aidocks status.",
            ) from None
        yield


def end_instance(settings: Settings) -> bool:
    """End every process of this installation's service, and remove its files; says whether there was any.

    Works from the state file, and from the temporary directory that the processes of this Ray alone name in
    their command lines; so it also ends what was only half started, or has lost its head.
    """
    instance = read_instance(settings)
    directory = temp_dir(settings)
    head = instance.head() if instance else None
    found = _processes(head, settings)
    _signal(found, signal.SIGTERM)
    _, remaining = psutil.wait_procs(found, timeout=TERMINATE_S)
    # Some may have been started meanwhile.
    remaining = [*remaining, *_processes(head, settings)]
    _signal(remaining, signal.SIGKILL)
    psutil.wait_procs(remaining, timeout=KILL_S)
    _keep_logs(settings)
    shutil.rmtree(directory, ignore_errors=True)
    settings.state_file.unlink(missing_ok=True)
    return bool(found)


def _processes(head: psutil.Process | None, settings: Settings) -> list[psutil.Process]:
    """Return the processes of the head's session, and of the sessions of all that are known to be ours.

    A worker shows no command line of its own, but it is of the same session as the daemons that started it.
    """
    sessions = {head.pid} if head is not None else set()
    present: list[tuple[psutil.Process, int]] = []
    for process in psutil.process_iter():
        try:
            session = os.getsid(process.pid)
            command = process.cmdline()
        except (psutil.Error, OSError):
            continue
        present.append((process, session))
        if session != os.getsid(0) and is_ours(command, settings):
            sessions.add(session)
    return [process for process, session in present if session in sessions]


def is_ours(command: list[str], settings: Settings) -> bool:
    """Say whether a command line is that of a process of this installation's service."""
    if head_marker(settings) in command:
        return not {"--head", "cluster.deploy", GUARD}.isdisjoint(command)
    prefix = f"{temp_dir(settings)}/"
    daemon = bool(command) and Path(command[0]).name in DAEMONS
    return daemon and any(prefix in argument for argument in command[1:])


def _signal(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


def _keep_logs(settings: Settings) -> None:
    """Keep Ray's own logs of the last run where people look for logs."""
    source = ray_dir(settings) / "session_latest" / "logs"
    target = settings.log_dir / "ray"
    if source.is_dir():
        settings.log_dir.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        with contextlib.suppress(OSError):
            shutil.copytree(source.resolve(), target, ignore_dangling_symlinks=True)
