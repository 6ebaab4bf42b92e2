"""The way from the HTTP front to the supervisor: wake it, ask how it is, bring it back when it is gone."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any, Protocol

from aidocks.overview import SupervisorState
from aidocks.remote import ensure_supervisor
from aidocks.settings import Settings
from serve.hung import HungProcess

PING_TIMEOUT_S = 2.0

log = logging.getLogger("serve.supervision")


class SupervisorLink(Protocol):
    """What the front needs of a supervisor."""

    def wake(self) -> None:
        """Say that there is a new job. Returns at once, never fails: the supervisor also looks by itself."""

    async def state(self) -> SupervisorState:
        """Return how the supervisor is; one that is gone is made again."""

    def answer(self) -> dict[str, Any]:
        """Return what the supervisor said of itself when it was last asked; empty when it did not answer."""


class NoSupervisor:
    """Stands in where nobody supervises: the application without Ray."""

    def wake(self) -> None:
        return

    async def state(self) -> SupervisorState:
        return "absent"

    def answer(self) -> dict[str, Any]:
        return {}


class RaySupervisor:
    """The supervisor actor of the cluster on which this process runs.

    Args:
        settings: Of the installation, for a supervisor that has to be made.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._handle: Any = None
        self._answer: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._hung = HungProcess(settings)

    def wake(self) -> None:
        asyncio.get_running_loop().run_in_executor(None, self._wake)

    async def state(self) -> SupervisorState:
        state = await asyncio.to_thread(self._state)
        if state == "restarting":
            await self._hung.end()
        return state

    def answer(self) -> dict[str, Any]:
        return self._answer

    def _wake(self) -> None:
        try:
            self._resolve().wake.remote()
        except Exception:
            log.exception("the supervisor could not be woken")
            self._handle = None

    def _state(self) -> SupervisorState:
        import ray

        answer: dict[str, Any] = {}
        try:
            answer = ray.get(self._resolve().ping.remote(), timeout=PING_TIMEOUT_S)
        except (ray.exceptions.GetTimeoutError, ray.exceptions.ActorUnavailableError):
            return "restarting"  # Ray is bringing it back under the same handle
        except Exception:
            log.exception("the supervisor does not answer; looking for another")
            self._handle = None
            return "restarting"
        finally:
            self._answer = answer
        return "superseded" if answer.get("superseded") else "running"

    def _resolve(self) -> Any:
        """Return the actor's handle; finds the actor, or makes it, when there is none yet."""
        with self._lock:
            if self._handle is None:
                self._handle = ensure_supervisor(self._settings)
            return self._handle
