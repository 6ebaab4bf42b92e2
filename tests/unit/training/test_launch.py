"""Processes of a training on this machine: they come to an end, whichever of them, or whoever started them, dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

pytest.importorskip("trl")

from aidocks._root import service_root
from aidocks.errors import InvalidSpec, JobCancelled, WorkerLost
from aidocks.telling import StoryReader
from aidocks.training.launch import FAILURE_FILE, launch, read_outcome
from aidocks.training.run import LLMTraining
from tests.support.small_training import curve, points, small_training

_TICK = 0.02


def _when(condition: Callable[[], object], act: Callable[[], object]) -> threading.Thread:
    """Do something as soon as something is so."""

    def watch() -> None:
        waiting = threading.Event()
        while not condition():
            waiting.wait(_TICK)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def _members(of: int, workspace: Path) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(of).children():
        try:
            if str(workspace / "training.json") in child.cmdline():
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def test_a_member_that_is_killed_costs_one_interval(tmp_path: Path, stories260k: Path) -> None:
    """The curve is that of an undisturbed run in one process with the same batch."""
    training = small_training(
        tmp_path / "killed", stories260k, max_steps=40, save_steps=5, per_device_train_batch_size=2
    )
    workspace = training.story.parent
    killed = _when(
        lambda: (training.checkpoints / "checkpoint-00000005").exists(),
        lambda: max(_members(os.getpid(), workspace), key=lambda each: each.pid).kill(),
    )
    launch(training, workspace, members=2, threads=2)
    killed.join()
    trained = read_outcome(workspace)
    assert (trained.attempts, trained.steps) == (2, 40)
    assert trained.resumed_from >= 5
    steps = [point.step for point in points(training) if point.loss is not None]
    assert steps == list(range(1, 41))
    told = StoryReader(training.story).read()
    computed = [each.data["step"] for each in told if each.kind == "metrics" and "loss" in each.data]
    assert len(computed) - 40 <= training.hyper.save_steps
    assert any("was killed (SIGKILL)" in (each.text or "") for each in told)

    undisturbed = small_training(tmp_path / "undisturbed", stories260k, max_steps=40, save_steps=40)
    launch(undisturbed, undisturbed.story.parent, members=1, threads=1)
    assert curve(training) == pytest.approx(curve(undisturbed), abs=1e-5)


def test_cancelled_processes_end_at_once(tmp_path: Path, stories260k: Path) -> None:
    training = small_training(tmp_path / "cancelled", stories260k)
    stopping = threading.Event()
    members: list[psutil.Process] = []

    def cancel() -> None:
        members.extend(_members(os.getpid(), training.story.parent))
        stopping.set()

    _when(lambda: _members(os.getpid(), training.story.parent), cancel)
    with pytest.raises(JobCancelled):
        launch(training, training.story.parent, members=1, threads=1, stopping=stopping)
    assert members
    assert not any(member.is_running() for member in members)


def test_members_end_with_the_process_that_started_them(tmp_path: Path, stories260k: Path) -> None:
    training = small_training(tmp_path / "orphans", stories260k)
    workspace = training.story.parent
    (tmp_path / "given.json").write_text(training.model_dump_json())
    code = (
        "import sys; from pathlib import Path; from aidocks.training.launch import launch;"
        "from aidocks.training.kinds import TRAINING; t = TRAINING.validate_json(Path(sys.argv[1]).read_text());"
        "launch(t, t.story.parent, members=1, threads=1)"
    )
    starter = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "given.json")],
        env=os.environ | {"PYTHONPATH": str(service_root())},
    )
    _when(lambda: starter.poll() is not None or _members(starter.pid, workspace), lambda: None).join()
    members = _members(starter.pid, workspace)
    starter.kill()
    assert starter.wait() == -signal.SIGKILL
    assert members
    gone, alive = psutil.wait_procs(members, timeout=20)
    assert gone
    assert not alive


def test_what_fails_by_itself_without_coming_further_is_tried_twice(
    tmp_path: Path, stories260k: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without libraries that take seconds to import: Python itself does not start.
    monkeypatch.setenv("PYTHONHOME", str(tmp_path / "nowhere"))
    training = small_training(tmp_path / "wrong", stories260k, max_failures=9)
    with pytest.raises(WorkerLost, match="It was tried 2 times"):
        launch(training, training.story.parent, members=1, threads=1)


def test_a_failure_is_raised_as_what_it_was(tmp_path: Path) -> None:
    error = InvalidSpec("The loss of step 3 is nan.", field="learning_rate", value=3.0, hint="Lower it.")
    (tmp_path / FAILURE_FILE).write_text(json.dumps(error.problem()))
    with pytest.raises(InvalidSpec, match="step 3") as caught:
        read_outcome(tmp_path)
    assert (caught.value.field, caught.value.value, caught.value.hint) == ("learning_rate", 3.0, "Lower it.")


def test_processes_that_end_without_a_word_are_lost_with_their_last_words(tmp_path: Path) -> None:
    (tmp_path / "log-0.txt").write_text("something\nValueError: seven is too many\n")
    with pytest.raises(WorkerLost, match="seven is too many"):
        read_outcome(tmp_path)


def test_a_training_survives_its_file(tmp_path: Path, stories260k: Path) -> None:
    training = small_training(tmp_path / "file", stories260k)
    assert LLMTraining.model_validate_json(training.model_dump_json()) == training
