"""A pool that runs units at once and does as a test says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from aidocks.executor import Claim, Outcome
from aidocks.plan import Unit, UnitContext


class FakePool:
    """Runs units at once, several at a time, and does as ``before`` says."""

    def __init__(self, before: Callable[[Unit[Any]], None] = lambda _: None, parallelism: int = 2) -> None:
        self.parallelism = parallelism
        self.before = before
        self.active = self.most_active = 0
        self.claims: list[Claim] = []
        self.never = asyncio.Event()

    async def run(
        self, unit: Unit[Any], workspace: Path, started: Callable[[str], None], claim: Claim
    ) -> Outcome:
        started("worker-1")
        self.claims.append(claim)
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        try:
            self.before(unit)
            if getattr(unit, "seconds", 0) > 1000:
                await self.never.wait()
            await asyncio.sleep(0)
            result: BaseModel = unit.run(UnitContext(workspace))
            return Outcome(result, 0.01, "worker-1")
        finally:
            self.active -= 1

    async def close(self) -> None:
        return
