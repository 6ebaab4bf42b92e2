"""An operation whose one unit is a gang: its members add up numbers, step by step, and leave traces."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel

from aidocks.checkpoints.files import OutputFile
from aidocks.errors import InvalidSpec, WorkerLost
from aidocks.operations import Registration
from aidocks.plan import Gang, GangUnit, Operation, Plan, PlanContext, Stage, UnitContext
from aidocks.specs.base import OperationResult, Spec
from aidocks.telling import Told
from aidocks.training.run import AdapterSettings, LLMHyperparameters, LLMTraining, Rows

REGISTRATION = Registration(
    "gang",
    "tests.support.gang_operation:GangSpec",
    "tests.support.gang_operation:GangOperation",
    "Add up numbers, together.",
)


class GangSpec(Spec):
    """Add the numbers from 1 to ``members``, ``steps`` times."""

    traces: Path
    members: int = 2
    fewer: tuple[int, ...] = ()
    cpus: float = 1.0
    spread: bool = False
    steps: int = 4
    save_steps: int = 2
    fails_at: int | None = None
    #: Step after which the members wait until there is a file ``go`` in ``traces``.
    waits_after: int | None = None
    #: Step after which members that are too few wait until others begin in their place.
    until_more: int | None = None
    max_failures: int = 2
    patience_s: float = 300.0
    resume: Path | None = None


class Total(BaseModel):
    value: int
    begun_at: list[int]


class GangResult(OperationResult):
    """What they have made of it."""

    total: int
    begun_at: list[int]


class AddUp(GangUnit[Total]):
    """Add up, in processes that all-reduce each step."""

    result_type = Total
    entry: ClassVar[str] = "tests.support.gang_operation:add_up"
    training: LLMTraining
    spec: GangSpec

    @property
    def label(self) -> str:
        return "adding up"

    @property
    def gang(self) -> Gang:
        return Gang(
            members=self.spec.members,
            checkpoints=self.training.checkpoints,
            cpus=self.spec.cpus,
            spread=self.spec.spread,
            max_failures=self.spec.max_failures,
            patience_s=self.spec.patience_s,
            fewer=self.spec.fewer,
        )

    @property
    def story(self) -> Path:
        return self.training.story

    def run(self, context: UnitContext) -> Total:
        raise NotImplementedError

    def collect(self, workspace: Path) -> Total:
        if self.failure(workspace).exists():
            raise InvalidSpec(json.loads(self.failure(workspace).read_text())["detail"], field="fails_at")
        if not self.outcome(workspace).exists():
            raise WorkerLost("the members died", value="gang")
        return Total.model_validate_json(self.outcome(workspace).read_bytes())

    def outputs(self, result: Total) -> tuple[OutputFile, ...]:
        return ()


class GangOperation(Operation[GangSpec, GangResult]):
    """One stage of one gang."""

    spec_type = GangSpec
    result_type = GangResult

    def plan(self, spec: GangSpec, context: PlanContext) -> Plan[GangResult]:
        (total,) = yield Stage("adding", (AddUp(training=make_training(spec, context), spec=spec),))
        return GangResult(total=total.value, begun_at=total.begun_at)


def make_training(spec: GangSpec, context: PlanContext) -> LLMTraining:
    directory = context.workspace / "training"
    return LLMTraining(
        job_id=context.job_id,
        method="sft",
        base=Path("/none"),
        base_name="none",
        tokenizer=Path("/none"),
        train=Rows(path=Path("/none"), sha256="", count=1),
        adapter=AdapterSettings(),
        hyper=LLMHyperparameters(learning_rate=1.0, save_total_limit=2),
        checkpoints=context.checkpoints_dir,
        output=directory / "output",
        tensorboard=directory / "tensorboard",
        story=directory / "story.jsonl",
        history=directory / "history.json",
        resume=spec.resume,
    )


def add_up(unit: AddUp) -> None:
    """What each member does."""
    import tempfile

    import ray.util
    import torch
    import torch.distributed

    from train.ray_reporter import RayReporter

    spec = unit.spec
    reporter = RayReporter(unit.training)
    directory = unit.training.story.parent
    begin, total = 0, 0
    last = reporter.last_checkpoint()
    if last is not None:
        # Every member finds its own part, and that of the others; one that was not there takes the first one's.
        parts = [json.loads(path.read_text()) for path in sorted(last.glob("part-*.json"))]
        part = parts[reporter.rank if reporter.rank < len(parts) else 0]
        begin, total = part["step"], part["total"]
    trace: dict[str, Any] = {
        "rank": reporter.rank,
        "pid": os.getpid(),
        "begin": begin,
        "threads": torch.get_num_threads(),
    }
    trace["node"] = ray.util.get_node_ip_address()
    with (spec.traces / "members.jsonl").open("a") as stream:
        stream.write(json.dumps(trace) + "\n")
    print(f"member {reporter.rank} begins at {begin}", flush=True)
    for step in range(begin + 1, spec.steps + 1):
        number = torch.tensor(float(reporter.rank + 1))
        torch.distributed.all_reduce(number)
        total += int(number)
        if step == spec.fails_at:
            error = InvalidSpec(f"Step {step} cannot be.")
            unit.failure(directory.parent).write_text(json.dumps(error.problem()))
            raise error
        reporter.tell(Told(kind="progress", fraction=step / spec.steps, label=f"step {step}/{spec.steps}"))
        reporter.tell(Told(kind="metrics", data={"step": step, "loss": 1 / step}))
        if step % spec.save_steps == 0:
            part = Path(tempfile.mkdtemp())
            (part / f"part-{reporter.rank}.json").write_text(json.dumps({"step": step, "total": total}))
            reporter.checkpoint(part, step, {"loss": 1 / step})
        if step == spec.waits_after:
            if reporter.rank == 0:
                (spec.traces / "waiting").touch()
            _until((spec.traces / "go").exists)
        if step == spec.until_more and reporter.world_size < spec.members:
            _until(lambda: False)
    if reporter.rank == 0:
        reporter.tell(Told(kind="message", text="added up"))
        begun_at = [member["begin"] for member in members(spec.traces) if member["rank"] == 0]
        unit.outcome(directory.parent).write_text(Total(value=total, begun_at=begun_at).model_dump_json())


def members(traces: Path) -> list[dict[str, Any]]:
    """Return what the members that have begun so far left, in order."""
    try:
        lines = (traces / "members.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]


def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.02)
