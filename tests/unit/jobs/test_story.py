"""What a running unit tells becomes events of its job: all of it, in order, before the unit is said to be finished."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from aidocks.checkpoints.files import OutputFile
from aidocks.errors import InvalidSpec, WorkerLost
from aidocks.executor import NOBODY, Claim, Outcome
from aidocks.jobs import stages
from aidocks.jobs.model import EventType, Progress
from aidocks.jobs.retries import Hopeless
from aidocks.jobs.stages import StageRun
from aidocks.jobs.submit import plan_context
from aidocks.plan import Gang, GangUnit, Stage, Unit, UnitContext
from aidocks.settings import Settings
from aidocks.telling import StoryReader, Told, last_words, tell

Line = tuple[str, Any]


class Nothing(BaseModel):
    pass


class Tale(Unit[Nothing]):
    """A unit that tells."""

    result_type = Nothing
    path: Path
    name: str = "tale"

    @property
    def label(self) -> str:
        return self.name

    @property
    def weight(self) -> float:
        return 3.0

    @property
    def story(self) -> Path:
        return self.path

    def run(self, context: UnitContext) -> Nothing:
        return Nothing()


class Plain(Tale):
    """A unit that tells nothing."""

    @property
    def weight(self) -> float:
        return 1.0

    @property
    def story(self) -> None:  # type: ignore[override]
        return None


class TaleOfMany(GangUnit[Nothing]):
    """A gang, as far as a stage sees it."""

    result_type = Nothing
    entry = "none:none"

    @property
    def label(self) -> str:
        return "many"

    @property
    def gang(self) -> Gang:
        return Gang(members=2, checkpoints=Path("none"))

    def run(self, context: UnitContext) -> Nothing:
        return Nothing()

    def collect(self, workspace: Path) -> Nothing:
        return Nothing()

    def outputs(self, result: Nothing) -> tuple[OutputFile, ...]:
        return ()


class Notes:
    """Stands for the log of a job: keeps what would be events."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.progresses: list[Progress] = []

    async def append(self, type: EventType, **data: Any) -> None:
        self.lines.append((type.value, data))

    async def progress(self, progress: Progress) -> None:
        self.lines.append(("progress", round(progress.fraction, 4)))
        self.progresses.append(progress)

    async def record(self, stage: str, unit: Unit[Any], unit_id: str, outcome: Outcome) -> None:
        self.lines.append(("unit_finished", unit.label))

    async def figures(self, unit: Unit[Any], unit_id: str, figures: dict[str, Any]) -> None:
        await self.append(EventType.METRICS, **{"unit_id": unit_id, **figures})

    async def lost(self, unit: Unit[Any], unit_id: str, error: WorkerLost) -> None:
        await self.append(EventType.WORKER_LOST, reason=error.message)

    def recall(self, *_: Any) -> None:
        return None

    def of(self, *kinds: str) -> list[Line]:
        return [line for line in self.lines if line[0] in kinds]


class Pool:
    """Runs each unit by calling ``play``, which tells."""

    parallelism = 1

    def __init__(self, play: Callable[[Unit[Any], Notes], Any]) -> None:
        self.play = play
        self.notes = Notes()

    async def run(
        self, unit: Unit[Any], workspace: Path, started: Callable[[str], None], claim: Claim
    ) -> Outcome:
        started("w")
        await self.play(unit, self.notes)
        return Outcome(Nothing(), 0.0, "w")

    async def close(self) -> None:
        return


def run(settings: Settings, play: Callable[[Unit[Any], Notes], Any], *units: Unit[Any]) -> Notes:
    pool = Pool(play)
    stage = Stage("s", units)
    work = StageRun(stage, 1, plan_context(settings, "job-1"), pool, pool.notes, NOBODY)  # type: ignore[arg-type]
    asyncio.run(work.to_results())
    return pool.notes


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "STORY_INTERVAL_S", 0.002)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


def test_all_lines_become_events_before_the_end(settings: Settings, tmp_path: Path) -> None:
    story = tmp_path / "story.jsonl"

    async def play(unit: Unit[Any], notes: Notes) -> None:
        tell(story, Told(kind="message", text="hello"))
        tell(story, Told(kind="progress", fraction=0.25, label="step 1"))
        await until(lambda: notes.of("progress"))
        tell(story, Told(kind="metrics", data={"step": 1, "loss": 2.5}))
        tell(story, Told(kind="progress", fraction=0.5, label="step 2"))
        await until(lambda: len(notes.of("progress")) == 2)
        with story.open("a") as stream:
            stream.write('not a line of a story\n{"kind": "mess')
        tell(story, Told(kind="message", text="lost with the broken line"))
        tell(story, Told(kind="message", text="the last words"))

    tale = Tale(path=story)
    notes = run(settings, play, tale)
    said = notes.of("message", "metrics", "unit_finished")
    assert said == [
        ("message", {"text": "hello"}),
        ("metrics", {"unit_id": tale.unit_id, "step": 1, "loss": 2.5}),
        ("message", {"text": "the last words"}),
        ("unit_finished", "tale"),
    ]
    assert notes.of("progress")[:2] == [("progress", 0.25), ("progress", 0.5)]
    assert [progress.unit for progress in notes.progresses[:3]] == ["step 1", "step 2", "tale"]
    assert notes.progresses[1].eta_s is not None


def test_what_a_unit_tells_counts_by_its_weight(settings: Settings, tmp_path: Path) -> None:
    story = tmp_path / "story.jsonl"

    async def play(unit: Unit[Any], notes: Notes) -> None:
        if unit.story is not None:
            tell(story, Told(kind="progress", fraction=0.5, label="half"))
            await until(lambda: any(progress.unit == "half" for progress in notes.progresses))

    notes = run(settings, play, Plain(path=story, name="plain"), Tale(path=story))
    fractions = [value for _, value in notes.of("progress")]
    assert fractions == [0.25, 0.25 + 0.5 * 0.75, 1.0, 1.0]


def test_a_new_attempt_does_not_repeat_what_the_last_one_told(settings: Settings, tmp_path: Path) -> None:
    story = tmp_path / "story.jsonl"
    tell(story, Told(kind="message", text="told by an earlier executor"))
    earlier = StoryReader(story)
    earlier.read()
    earlier.keep_place()
    tell(story, Told(kind="message", text="not told before it died"))
    attempts = []

    async def play(unit: Unit[Any], notes: Notes) -> None:
        attempts.append(1)
        tell(story, Told(kind="message", text=f"attempt {len(attempts)}"))
        if len(attempts) == 1:
            raise WorkerLost("killed", value="w")

    notes = run(settings, play, Tale(path=story))
    assert [data.get("text", data.get("reason")) for _, data in notes.of("message", "worker_lost")] == [
        "not told before it died",
        "attempt 1",
        "killed",
        "attempt 2",
    ]


def test_the_last_words_of_a_unit_that_fails_are_heard(settings: Settings, tmp_path: Path) -> None:
    story = tmp_path / "story.jsonl"

    async def play(unit: Unit[Any], notes: Notes) -> None:
        tell(story, Told(kind="message", text="the loss is no number"))
        raise InvalidSpec("it cannot be")

    pool = Pool(play)
    stage = StageRun(
        Stage("s", (Tale(path=story),)), 1, plan_context(settings, "job-1"), pool, pool.notes, NOBODY
    )  # type: ignore[arg-type]
    with pytest.raises(InvalidSpec):
        asyncio.run(stage.to_results())
    assert pool.notes.of("message") == [("message", {"text": "the loss is no number"})]


def test_a_gang_that_gave_up_is_not_begun_again(settings: Settings) -> None:
    runs = []

    async def play(unit: Unit[Any], notes: Notes) -> None:
        runs.append(1)
        raise WorkerLost("they died too often", value="gang-1")

    pool = Pool(play)
    stage = StageRun(
        Stage("s", (TaleOfMany(),)), 1, plan_context(settings, "job-1"), pool, pool.notes, NOBODY
    )  # type: ignore[arg-type]
    with pytest.raises(Hopeless, match="too often"):
        asyncio.run(stage.to_results())
    assert len(runs) == 1
    assert not pool.notes.of("worker_lost"), "nobody shall read that its work runs again elsewhere"


def test_of_a_log_only_the_end_is_kept(tmp_path: Path) -> None:
    log = tmp_path / "log-0.txt"
    assert last_words(log) == ""
    log.write_bytes(b"first\n" + "é".encode() * 3000 + b"\nthe end\n")
    words = last_words(log, most=1001)
    assert words.endswith("é\nthe end")
    assert len(words.encode()) <= 1003, "a letter that was cut is replaced by one of three bytes"
    assert "first" not in words
