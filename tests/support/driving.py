"""Driving a plan in this process: its units run where they stand, one after another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

from aidocks.models.registry import Registry
from aidocks.models.resolve import ModelResolver
from aidocks.plan import PlanContext, Stage, UnitContext
from aidocks.training.run import Rows


def drive(plan: Generator[Stage, list[Any], Any], workspace: Path) -> Any:
    """Run a plan and return its result; those of its units go through JSON, as they do in a journal."""
    context = UnitContext(workspace=workspace)
    answer: Any = None
    while True:
        try:
            stage = plan.send(answer)
        except StopIteration as stop:
            return stop.value
        answer = [
            unit.result_type.model_validate_json(unit.run(context).model_dump_json()) for unit in stage.units
        ]


def plan_context(home: Path, say: Any = lambda _: None) -> PlanContext:
    """Return what a plan may use, of an installation in ``home``."""
    workspace = home / "workspaces" / "job"
    workspace.mkdir(parents=True, exist_ok=True)
    return PlanContext(
        job_id="job-00000000000-c0ffee00",
        workspace=workspace,
        registry=Registry(home / "models"),
        resolver=ModelResolver(home / "models", [home]),
        cache_dir=home / "cache",
        checkpoints_dir=home / "checkpoints",
        datasets_dir=home / "datasets",
        say=say,
    )


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Rows:
    """Write rows as JSONL."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    content = "".join(f"{line}\n" for line in lines).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return Rows(path=path, sha256=hashlib.sha256(content).hexdigest(), count=len(lines))
