"""How often the front was asked for what, and how long it took: metrics, where its process is one of a Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.metrics import Instruments

#: Requests that nothing answers to, and methods that nobody knows: clients can invent any number.
_OTHER = "other"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
#: Answers that last for as long as their reader likes.
_STREAMS = frozenset({"/jobs/{job_id}/events"})

_instruments: Instruments | None = None


def measure_requests(instruments: Instruments | None = None) -> None:
    """Begin to count what :func:`observe_request` is told.

    Args:
        instruments: Where the values go. Default: to Ray, of whose cluster this process must be one.
    """
    from cluster.metrics import ray_instruments

    global _instruments
    _instruments = instruments or ray_instruments()


def route_of(scope: Mapping[str, Any]) -> str:
    """Return the template of the route that has answered a request, such as ``/jobs/{job_id}``."""
    return str(getattr(scope.get("route"), "path", _OTHER))


def observe_request(route: str, method: str, status: int, seconds: float) -> None:
    """Count a request that was answered; does nothing before :func:`measure_requests`.

    Args:
        route: The route's template.
        method: Of the request.
        status: Of the answer; 0: the connection broke before.
        seconds: From the request to the end of the answer.
    """
    if _instruments is None:
        return
    method = method if method in _METHODS else _OTHER
    _instruments.record("aidocks_http_requests", 1, route=route, method=method, status=str(status))
    if route not in _STREAMS:
        _instruments.record("aidocks_http_request_seconds", seconds, route=route, method=method)
