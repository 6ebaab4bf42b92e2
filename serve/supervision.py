"""The way from the HTTP front to the supervisor: wake it, ask how it is, bring it back when it is gone."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any, Literal, Protocol

from aidocks.remote import ensure_supervisor
from aidocks.settings import Settings

SupervisorState = Literal["running", "restarting", "superseded", "absent", "unknown"]

PING_TIMEOUT_S = 2.0

log = logging.getLogger("serve.supervision")


class SupervisorLink(Protocol):
    """What the front needs of a supervisor."""

    def wake(self) -> None:
        """Say that there is a new job. Returns at once, never fails: the supervisor also looks by itself."""

    async def state(self) -> SupervisorState:
        """Return how the supervisor is; one that is gone is made again."""


class NoSupervisor:
    """Stands in where nobody supervises: the application without Ray."""

    def wake(self) -> None:
        return

    async def state(self) -> SupervisorState:
        return "absent"


class RaySupervisor:
    """The supervisor actor of the cluster on which this process runs.

    Args:
        settings: Of the installation, for a supervisor that has to be made.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._handle: Any = None
        self._lock = threading.Lock()

    def wake(self) -> None:
        asyncio.get_running_loop().run_in_executor(None, self._wake)

    async def state(self) -> SupervisorState:
        return await asyncio.to_thread(self._state)

    def _wake(self) -> None:
        try:
            self._resolve().wake.remote()
        except Exception:
            log.exception("the supervisor could not be woken")
            self._handle = None

    def _state(self) -> SupervisorState:
        import ray

        try:
            answer = ray.get(self._resolve().ping.remote(), timeout=PING_TIMEOUT_S)
        except (ray.exceptions.GetTimeoutError, ray.exceptions.ActorUnavailableError):
            return "restarting"  # Ray is bringing it back under the same handle
        except Exception:
            log.exception("the supervisor does not answer; looking for another")
            self._handle = None
            return "restarting"
        return "superseded" if answer.get("superseded") else "running"

    def _resolve(self) -> Any:
        """Return the actor's handle; finds the actor, or makes it, when there is none yet."""
        with self._lock:
            if self._handle is None:
                self._handle = ensure_supervisor(self._settings)
            return self._handle
