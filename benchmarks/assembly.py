"""Writing the weights of an MoE of two experts beside the bare copy (with sync) of as many bytes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from benchmarks.comparison import Comparison, in_turns
from benchmarks.small_model import smollm2


def run() -> list[Comparison]:
    with smollm2() as (scratch, model):
        reference = scratch / "reference.bin"
        size = _assemble(scratch, model)
        with reference.open("wb") as file:
            file.write(os.urandom(1 << 20) * (size >> 20))
        ours, other = in_turns(
            lambda: _ignore(_assemble(scratch, model)), lambda: _copy(reference, scratch / "copy.bin"), runs=7
        )
    facts = {"MB": round(size / 1e6), "sha256 of the output": "included in ours"}
    return [Comparison("MoE assembly, 2 experts", ours, other, "copy + fsync of the bytes", facts=facts)]


def _assemble(scratch: Path, model: Path) -> int:
    from safetensors.torch import save_file

    from aidocks.checkpoints.files import OutputFile
    from aidocks.checkpoints.reader import Checkpoint
    from aidocks.checkpoints.writer import plan_shards
    from aidocks.moe.assemble import AssembleShard
    from aidocks.moe.dense import Member, read_dense
    from aidocks.moe.mixtral import plan_tensors, router_name
    from aidocks.plan import UnitContext

    config = read_dense(Member("base_model", "smollm2", Checkpoint(model)))
    router = scratch / "router.safetensors"
    if not router.exists():
        import torch

        rows = torch.zeros(2, config.hidden_size, dtype=torch.bfloat16)
        save_file({router_name(layer): rows.clone() for layer in range(config.num_hidden_layers)}, router)
    (shard,) = plan_shards(plan_tensors(config, 2, "bfloat16"), 5_000_000_000)
    staged = scratch / "staged"
    shutil.rmtree(staged, ignore_errors=True)
    unit = AssembleShard(
        base=model,
        experts=(model, model),
        router=OutputFile(path=router, bytes=0, sha256=""),
        directory=staged,
        shard=shard,
    )
    unit.run(UnitContext(scratch))
    return shard.nbytes


def _copy(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())


def _ignore(_: object) -> None:
    return None
