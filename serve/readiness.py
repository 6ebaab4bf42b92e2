"""How the service is, found out in the background, so that asking costs nothing."""

from __future__ import annotations

import asyncio
import logging
from typing import Literal

from fastapi import Response
from pydantic import BaseModel, ConfigDict, Field

from aidocks._version import __version__
from aidocks.jobs.store import JobStore
from serve.supervision import SupervisorLink, SupervisorState

PERIOD_S = 2.0
STORE_TIMEOUT_S = 5.0

log = logging.getLogger("serve.readiness")


class Health(BaseModel):
    """How the service is."""

    model_config = ConfigDict(frozen=True)

    status: Literal["ok", "unavailable"] = Field(
        "ok", description="`ok` (200), or `unavailable` (503): the job store does not answer."
    )
    version: str = Field(__version__, description="Version of AIDocks.")
    supervisor: SupervisorState = Field(
        "unknown",
        description="Who runs the jobs: `running`; `restarting` (jobs are accepted and wait); `superseded` "
        "(another supervisor has taken over this job store); `absent` (the application runs without Ray); "
        "`unknown` (not yet looked at).",
    )


class Readiness:
    """Keeps the answer to ``GET /health`` up to date.

    Args:
        store: Must answer for the service to be of use. The caller has just opened it, so it does at first.
        supervisor: Looked at every time; found again when it is gone.
    """

    def __init__(self, store: JobStore, supervisor: SupervisorLink) -> None:
        self._store = store
        self._supervisor = supervisor
        self._look: asyncio.Task[object] | None = None
        self._publish(Health())

    def _publish(self, health: Health) -> None:
        self.health = health
        self._body = health.model_dump_json().encode()

    def answer(self) -> Response:
        """Return the answer to ``GET /health``."""
        status = 200 if self.health.status == "ok" else 503
        return Response(
            self._body, status, media_type="application/json", headers={"Cache-Control": "no-store"}
        )

    async def watch(self, period_s: float = PERIOD_S) -> None:
        """Look every ``period_s`` seconds, until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(period_s)

    async def look(self) -> None:
        """Look once at the store and the supervisor."""
        store_answers = await self._answers()
        try:
            supervisor = await self._supervisor.state()
        except Exception:
            log.exception("the supervisor could not be looked at")
            supervisor = "unknown"
        self._publish(Health(status="ok" if store_answers else "unavailable", supervisor=supervisor))

    async def _answers(self) -> bool:
        # A look that hangs keeps its thread; the next one waits for the same rather than losing another.
        if self._look is None:
            self._look = asyncio.create_task(asyncio.to_thread(self._store.list, limit=1))
        try:
            await asyncio.wait_for(asyncio.shield(self._look), STORE_TIMEOUT_S)
        except TimeoutError:
            return False
        except Exception:
            log.exception("the job store does not answer")
            self._look = None
            return False
        self._look = None
        return True
