"""Runs the units of one stage: journal first, then the pool; retries, events and progress on the way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from aidocks.checkpoints.files import OutputFile, hash_file
from aidocks.errors import NotFound, WorkerLost
from aidocks.jobs.model import EventType, Job, Progress
from aidocks.jobs.pace import Pace
from aidocks.jobs.retries import Hopeless
from aidocks.plan import GangUnit, PlanContext, Stage, Unit
from aidocks.storage import bring_back, bring_file, is_kept
from aidocks.telling import StoryReader, Told

if TYPE_CHECKING:
    from aidocks.executor import Claim, Outcome, UnitPool
    from aidocks.jobs.observer import Observer
    from aidocks.jobs.rows import UnitRecord
    from aidocks.jobs.store import JobStore

PROGRESS_INTERVAL_S = 0.25
#: How often the story of a running unit is read.
STORY_INTERVAL_S = 0.5
#: How often a unit may lose its worker before it is taken to be the cause.
WORKER_LOSSES = 3


class UnitLog:
    """What one attempt at a job reads from and writes to the store about units, and tells its observer."""

    def __init__(
        self, store: JobStore, job: Job, token: int, journal: dict[str, UnitRecord], observer: Observer
    ) -> None:
        self._store = store
        self._job = job
        self._token = token
        self._journal = journal
        self._observer = observer
        self._unsaid: Progress | None = None
        self._said_at = 0.0

    async def append(self, type: EventType, **data: Any) -> None:
        await asyncio.to_thread(self._store.append, self._job.id, type, data, token=self._token)

    async def progress(self, progress: Progress) -> None:
        """Write the present progress, unless that was done a moment ago."""
        self._unsaid = progress
        if time.monotonic() - self._said_at >= PROGRESS_INTERVAL_S:
            await self.flush()

    async def flush(self) -> None:
        """Write the progress that was held back."""
        progress, self._unsaid = self._unsaid, None
        if progress is not None:
            self._said_at = time.monotonic()
            await asyncio.to_thread(self._store.save_progress, self._job.id, progress, self._token)

    async def record(self, stage: str, unit: Unit[Any], unit_id: str, outcome: Outcome) -> None:
        result = outcome.result.model_dump(mode="json")
        seconds = round(outcome.seconds, 4)
        await asyncio.to_thread(
            self._store.record_unit,
            self._job.id,
            unit_id,
            stage,
            unit.label,
            result,
            seconds,
            outcome.worker,
            token=self._token,
        )
        self._observer.unit_ended(self._job, stage, unit, outcome)

    async def lost(self, unit: Unit[Any], unit_id: str, error: WorkerLost) -> None:
        """Tell that a worker died while it ran a unit."""
        self._observer.worker_lost(self._job, unit, error.message)
        await self.append(
            EventType.WORKER_LOST,
            worker=error.value,
            unit_id=unit_id,
            label=unit.label,
            reason=error.message,
        )

    async def figures(self, unit: Unit[Any], unit_id: str, figures: dict[str, Any]) -> None:
        """Tell figures of a unit under way."""
        self._observer.told(self._job, unit, figures)
        await self.append(EventType.METRICS, **{"unit_id": unit_id, **figures})

    def recall(self, unit: Unit[Any], unit_id: str, context: PlanContext) -> BaseModel | None:
        """Return the journalled result of a unit, if its files are still what it wrote."""
        record = self._journal.get(unit_id)
        if record is None:
            return None
        try:
            result = type(unit).result_type.model_validate(record.result)
        except ValidationError:
            return None  # written by another version
        published = self._published(context)
        outputs = unit.outputs(result)
        return result if all(_is_intact(output, context.workspace, published) for output in outputs) else None

    def _published(self, context: PlanContext) -> Path | None:
        """Return where the job's own model is in the registry, if an earlier attempt got that far."""
        name = self._job.output_name
        try:
            if name is None or context.registry.manifest(name).job_id != self._job.id:
                return None
        except NotFound:
            return None
        return context.registry.path(name)


class StageRun:
    """The units of one stage on their way through a pool."""

    def __init__(
        self, stage: Stage, number: int, context: PlanContext, pool: UnitPool, log: UnitLog, claim: Claim
    ) -> None:
        self._claim = claim
        self._stage = stage
        self._number = number
        self._context = context
        self._pool = pool
        self._log = log
        # Equal units are one unit.
        self._ids = [unit.unit_id for unit in stage.units]
        self._units = dict(zip(self._ids, stage.units, strict=True))
        self._pace = Pace({unit_id: unit.weight for unit_id, unit in self._units.items()})
        self._results: dict[str, BaseModel] = {}
        self._broken = False
        self._recalled = 0

    async def to_results(self) -> list[BaseModel]:
        """Run what is not in the journal and return all results in the order of the stage's units.

        Raises:
            Exception: What the first failing unit raised, after the others were stopped.
        """
        await asyncio.to_thread(self._recall_all)
        await self._log.append(
            EventType.STAGE_STARTED,
            stage=self._stage.name,
            stage_number=self._number,
            total=len(self._units),
            already_done=self._recalled,
        )
        open_ids = [unit_id for unit_id in self._units if unit_id not in self._results]
        await self._run_all(open_ids)
        # Plans look at what units have written; where nodes share no file system, that is elsewhere.
        await asyncio.to_thread(bring_back, self._context.workspace)
        await self._log.progress(self._progress(None))
        return [self._results[unit_id] for unit_id in self._ids]

    def _recall_all(self) -> None:
        for unit_id, unit in self._units.items():
            result = self._log.recall(unit, unit_id, self._context)
            if result is not None:
                self._results[unit_id] = result
                self._pace.recall(unit_id)
        self._recalled = len(self._results)
        self._pace.begin()

    async def _run_all(self, unit_ids: Iterable[str]) -> None:
        ids = list(unit_ids)
        waiting = iter(ids)
        lanes = 0

        def open_lanes() -> None:
            # Twice as many as can run: a worker finds its next unit waiting. The pool may grow while the stage runs.
            nonlocal lanes
            while lanes < min(len(ids), 2 * self._pool.parallelism):
                lanes += 1
                group.create_task(work())

        async def work() -> None:
            for unit_id in waiting:
                if self._broken:
                    return
                await self._run_unit(self._units[unit_id], unit_id)
                open_lanes()

        try:
            async with asyncio.TaskGroup() as group:
                open_lanes()
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from failed.exceptions[0].__cause__

    async def _run_unit(self, unit: Unit[Any], unit_id: str) -> None:
        for losses in range(1, WORKER_LOSSES + 2):
            try:
                outcome = await self._run_once(unit, unit_id)
                break
            except WorkerLost as error:
                if isinstance(unit, GangUnit):
                    # It has told of each death, and was begun anew as often as the request allows.
                    raise Hopeless(error) from error
                await self._log.lost(unit, unit_id, error)
                if losses > WORKER_LOSSES:
                    raise WorkerLost(
                        f"{unit.label}: {losses} workers died while they ran this unit. {error.message}",
                        hint="It may need more memory than a worker has; see the service's logs.",
                    ) from error
        await self._log.record(self._stage.name, unit, unit_id, outcome)
        self._results[unit_id] = outcome.result
        self._pace.finish(unit_id)
        await self._log.progress(self._progress(unit.label))

    async def _run_once(self, unit: Unit[Any], unit_id: str) -> Outcome:
        announcements: list[asyncio.Task[None]] = []

        def started(worker: str) -> None:
            said = self._log.append(
                EventType.UNIT_STARTED,
                stage=self._stage.name,
                unit_id=unit_id,
                label=unit.label,
                worker=worker,
            )
            announcements.append(asyncio.create_task(said))

        try:
            async with self._told(unit, unit_id):
                return await self._pool.run(unit, self._context.workspace, started, self._claim)
        except WorkerLost:
            raise
        except Exception:
            # At once: on a busy disk the others would begin many units while the line below waits its turn.
            self._broken = True
            raise
        finally:
            # So that "started" stands before "finished", and its failure (a lost lease) is not swallowed.
            await asyncio.gather(*announcements)

    @asynccontextmanager
    async def _told(self, unit: Unit[Any], unit_id: str) -> AsyncIterator[None]:
        """Make events of what a unit tells while the body runs it, down to its last line."""
        if unit.story is None:
            yield
            return
        self._pace.forget(unit_id)
        story = unit.story
        reader = await asyncio.to_thread(StoryReader, story, resume=True)
        ended = asyncio.Event()

        async def follow() -> None:
            while True:
                last = ended.is_set()
                await asyncio.to_thread(bring_file, story)
                lines = await asyncio.to_thread(reader.read)
                await self._retell(lines, unit, unit_id)
                if lines:
                    # Whoever takes the job over tells the rest: rather a line twice than never.
                    await asyncio.to_thread(reader.keep_place)
                if last:
                    return
                with suppress(TimeoutError):
                    await asyncio.wait_for(ended.wait(), STORY_INTERVAL_S)

        following = asyncio.create_task(follow())
        try:
            yield
        except asyncio.CancelledError:
            following.cancel()
            raise
        finally:
            ended.set()
            with suppress(asyncio.CancelledError):
                await following

    async def _retell(self, lines: list[Told], unit: Unit[Any], unit_id: str) -> None:
        for told in lines:
            if told.kind == "message" and told.text:
                await self._log.append(EventType.MESSAGE, **{"text": told.text, **told.data})
            elif told.kind == "metrics":
                await self._log.figures(unit, unit_id, told.data)
            elif told.fraction is not None:
                self._pace.tell(unit_id, told.fraction)
        steps = [told for told in lines if told.kind == "progress"]
        if steps:
            await self._log.progress(self._progress(steps[-1].label))

    def _progress(self, label: str | None) -> Progress:
        elapsed_s = self._pace.elapsed_s
        count = len(self._results) - self._recalled
        eta_s = self._pace.eta_s
        return Progress(
            stage=self._stage.name,
            stage_number=self._number,
            done=len(self._results),
            total=len(self._units),
            fraction=self._pace.fraction,
            unit=label,
            units_per_s=round(count / elapsed_s, 4) if count and elapsed_s > 0 else None,
            eta_s=None if eta_s is None else round(eta_s, 2),
            elapsed_s=round(elapsed_s, 3),
        )


def _is_intact(output: OutputFile, workspace: Path, published: Path | None) -> bool:
    """Say whether a file is byte for byte what its unit wrote, there or where publication has moved it."""
    path = output.path
    staged = workspace / "model"
    if not path.exists() and published is not None and path.is_relative_to(staged):
        path = published / path.relative_to(staged)
    try:
        return path.stat().st_size == output.bytes and hash_file(path) == output.sha256
    except FileNotFoundError:
        return is_kept(output.path, output.bytes, output.sha256)  # by the node that wrote it
    except OSError:
        return False
