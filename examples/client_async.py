"""The async client: several jobs at once, and events as they come.

python examples/client_async.py MODEL [NAME]
"""

from __future__ import annotations

import asyncio
import sys

from aidocks import AsyncClient, AsyncJobHandle


async def main(model: str, name: str) -> None:
    async with AsyncClient() as client:
        # Small numbers, so that the example takes seconds; leave them out for real work.
        small = {"candidates": 2, "chunks": 8, "seqlen": 32}
        jobs = [
            await client.laser(base_model_name=model, laser_model_name=f"{name}-{rule}", rule=rule, **small)
            for rule in ("marchenko_pastur", "laserrmt")
        ]
        await asyncio.gather(*(follow(job) for job in jobs))
        for result in await asyncio.gather(*(job.wait() for job in jobs)):
            print(result.model, [matrix.name for matrix in result.accepted])


async def follow(job: AsyncJobHandle) -> None:
    async for event in job.events():
        if event.type in ("stage_started", "message"):
            print(job.id, event.sequence, event.data.get("stage") or event.data.get("text"))


if __name__ == "__main__":
    model = sys.argv[1]
    asyncio.run(main(model, sys.argv[2] if len(sys.argv) > 2 else f"{model}-async"))
