"""Ports of this machine: free ones, and who listens on one that is not."""

from __future__ import annotations

import errno
import socket
from contextlib import ExitStack

from aidocks.errors import PortTaken

LOOPBACK = "127.0.0.1"


def free_ports(count: int) -> list[int]:
    """Return different ports on which nothing listens now, neither on loopback nor on any other address."""
    with ExitStack() as held:
        ports = []
        for _ in range(count):
            probe = held.enter_context(socket.socket())
            probe.bind(("", 0))
            ports.append(int(probe.getsockname()[1]))
        return ports


def require_free(host: str, port: int) -> None:
    """Check that the service could listen.

    Raises:
        PortTaken: Naming who listens there, as far as this user may see it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise _refusal(host, port, error) from None


def _refusal(host: str, port: int, error: OSError) -> PortTaken:
    if error.errno == errno.EADDRINUSE:
        return PortTaken(
            f"Port {port} is taken{_by_whom(port)}.",
            field="port",
            value=port,
            hint=f"Stop that program, or choose another port: AIDOCKS_PORT={port + 1} aidocks up.",
        )
    return PortTaken(
        f"The service cannot listen on {host}:{port}: {error.strerror}.",
        field="host" if error.errno == errno.EADDRNOTAVAIL else "port",
        value=host if error.errno == errno.EADDRNOTAVAIL else port,
        hint="Set AIDOCKS_HOST to an address of this machine and AIDOCKS_PORT to a port from 1024 on.",
    )


def _by_whom(port: int) -> str:
    import psutil

    try:
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                process = psutil.Process(connection.pid)
                command = " ".join(process.cmdline())[:120] or process.name()
                return f" by process {connection.pid} ({command})"
    except psutil.Error:
        pass
    return " by another program"
