"""A supervisor that is stopped is ended by those who wait for it, and Ray makes it anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from aidocks.settings import Settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

PROGRAM = """
import asyncio, os, signal, time
from aidocks.settings import Settings
from serve.supervision import RaySupervisor

async def main():
    supervisor = RaySupervisor(Settings(home=sys.argv[1]))
    async def running():
        while await supervisor.state() != "running":
            await asyncio.sleep(0.2)
        return ray.get(remote.supervisor().ping.remote())
    before = await running()
    os.kill(before["pid"], signal.SIGSTOP)
    begin = time.monotonic()
    after = await running()
    return before, after, time.monotonic() - begin
answer = asyncio.run(main())
"""


def test_a_supervisor_that_is_stopped_is_replaced(
    drive: Callable[..., Any], trivial_settings: Settings
) -> None:
    before, after, seconds = drive(PROGRAM, trivial_settings.home)
    assert after["token"] > before["token"]
    assert after["pid"] != before["pid"]
    print(f"replaced after {seconds:.1f} s")
