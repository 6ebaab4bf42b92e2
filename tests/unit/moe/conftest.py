"""A way to build MoEs that drives the plan by hand: no job store, units in any order, empty caches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from aidocks.models.registry import Registry
from aidocks.models.resolve import ModelResolver
from aidocks.moe.operation import BuildMoE
from aidocks.plan import PlanContext, Unit, UnitContext, WorkerCache
from aidocks.specs.moe import MoEResult, MoESpec
from aidocks.specs.read import build_spec


@dataclass
class Built:
    """A finished build.

    Attributes:
        path: Directory of the model in the registry.
        units: Every unit that ran, in order.
        said: Messages.
    """

    result: MoEResult
    path: Path
    units: list[Unit[Any]]
    said: list[str] = field(default_factory=list)


Build = Callable[..., Built]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """``build(base, experts, order=..., **fields)``; paths below the test's directory are allowed."""
    count = 0

    def run(
        base: Path,
        experts: Iterable[dict[str, Any]],
        order: Callable[[list[Unit[Any]]], list[Unit[Any]]] = list,
        **fields: Any,
    ) -> Built:
        nonlocal count
        count += 1
        defaults = {"evaluate": False, "chunks": 4, "seqlen": 32, "name": f"moe-{count}"}
        body = {"base_model": str(base), "experts": list(experts), **defaults, **fields}
        spec = build_spec(MoESpec, body)
        said: list[str] = []
        context = make_context(tmp_path / f"run-{count}", [tmp_path, base.parent], said.append)
        operation = BuildMoE()
        operation.preflight(spec, context)
        units: list[Unit[Any]] = []
        plan = operation.plan(spec, context)
        results = None
        try:
            while True:
                stage = plan.send(results)
                done = {
                    unit.unit_id: unit.run(UnitContext(context.workspace, cache=WorkerCache()))
                    for unit in order(list(stage.units))
                }
                units += stage.units
                results = [done[unit.unit_id] for unit in stage.units]
        except StopIteration as stop:
            result: MoEResult = stop.value
        assert result.path is not None
        return Built(result, Path(result.path), units, said)

    return run


def make_context(home: Path, roots: list[Path], say: Callable[[str], None]) -> PlanContext:
    models = home / "models"
    workspace = home / "workspaces" / "job"
    workspace.mkdir(parents=True)
    return PlanContext(
        job_id="job-00000000000-c0ffee00",
        workspace=workspace,
        registry=Registry(models),
        resolver=ModelResolver(models, roots),
        cache_dir=home / "cache",
        say=say,
    )


@pytest.fixture
def experts_of() -> Callable[..., list[dict[str, Any]]]:
    """``experts_of(path, ...)``: one expert a path, with prompts of its own."""
    return lambda *paths: [
        {"source_model": str(path), "positive_prompts": PROMPTS[number], "negative_prompts": []}
        for number, path in enumerate(paths)
    ]


PROMPTS = [
    ["def f(x):", "import os", "class Reader:"],
    ["How many apples are left?", "x = 3 + 4", "percent"],
    ["Once upon a time", "the king and the queen"],
    ["Sehr geehrte Damen und Herren", "Grüße"],
]
