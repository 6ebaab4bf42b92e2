"""Writing the weights of an MoE of two experts, hashed and durable, beside `cp` of the bytes, with sync and without."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from aidocks.checkpoints.reader import Checkpoint
from aidocks.moe.assemble import AssembleShard, assembly_units
from aidocks.moe.dense import Member
from aidocks.moe.target import plan_target
from aidocks.plan import UnitContext
from aidocks.specs.moe import MoESpec
from benchmarks.comparison import Comparison, in_turns
from benchmarks.small_model import smollm2


def run() -> list[Comparison]:
    with smollm2() as (scratch, model):
        staged, reference = scratch / "staged", scratch / "reference"
        assemble(staged, model)
        size = sum(path.stat().st_size for path in staged.iterdir())
        staged.rename(reference)
        results = []
        for other, is_synced in (("cp", False), ("cp and sync", True)):
            ours, theirs = in_turns(
                lambda: assemble(staged, model),
                lambda sync=is_synced: copy(reference, scratch / "copy", sync=sync),
                runs=7,
            )
            facts = {"MB": round(size / 1e6), "ours": "with SHA-256 of the output, durable"}
            results.append(Comparison("MoE assembly, 2 experts", ours, theirs, other, facts=facts))
    return results


def assemble(staged: Path, *models: Path) -> None:
    """Write the weight files of a Mixtral, without routers."""
    shutil.rmtree(staged, ignore_errors=True)
    for unit in assembly_of(staged, *models):
        unit.run(UnitContext(staged))


def assembly_of(staged: Path, *models: Path, shard_bytes: int = 5_000_000_000) -> list[AssembleShard]:
    """Return the units that write the weight files of a Mixtral of some models; one model is taken twice."""
    experts = models * 2 if len(models) == 1 else models
    sources = [{"source_model": str(path)} for path in experts]
    spec = MoESpec.model_validate({"base_model": str(models[0]), "gate_mode": "random", "experts": sources})
    opened = {path: Checkpoint(path) for path in models}
    base, *members = [
        Member(f"member {number}", path.name, opened[path])
        for number, path in enumerate((models[0], *experts))
    ]
    target = plan_target(spec, base, members)
    units = assembly_units(target, target.plan_files(shard_bytes), staged)
    return [unit for unit in units if isinstance(unit, AssembleShard)]


def copy(source: Path, target: Path, *, sync: bool) -> None:
    """Copy a directory of files with ``cp``, and bring the copies to the disk if asked to."""
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["cp", "-r", source, target], check=True)
    if sync:
        for path in target.iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
