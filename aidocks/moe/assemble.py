"""The units that write the MoE: one per weight file, one for the routers, one for everything beside the weights.

Where the stored type is the planned one, a tensor is made of byte ranges of files: no decoding, no
torch, and memory that does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from aidocks.checkpoints.files import OutputFile
from aidocks.checkpoints.writer import ShardPlan, ShardWriter, TensorPlan
from aidocks.errors import CorruptCheckpoint
from aidocks.models.beside_weights import WriteBesideWeights
from aidocks.models.tokenizer_files import TokenizerFiles
from aidocks.moe.recipes import Recipe, compute
from aidocks.plan import UnitContext, WritingUnit, WrittenFiles

if TYPE_CHECKING:
    import numpy as np

    from aidocks.moe.target import Target

# What a shared expert's gate is where nobody computed one. Not zero: llama.cpp computes a sigmoid as silu(x)/x,
# which is no number at 0, not even as the factor of a shared expert that is zero itself.
_NEUTRAL_GATE = 2.0**-6


class _MovingUnit(WritingUnit):
    """A unit that puts files into the staged result, and moves bytes rather than computing."""

    directory: Path = Field(description="Directory in which the result is staged.")

    @property
    def computes(self) -> bool:
        return False


class _WeightFile(_MovingUnit):
    shard: ShardPlan

    @property
    def weight(self) -> float:
        return float(self.shard.nbytes)


class AssembleShard(_WeightFile):
    """One weight file of the MoE."""

    sources: tuple[Path, ...] = Field(description="Checkpoint directories; the first is the base.")
    recipes: dict[str, Recipe] = Field(description="For every tensor of the shard.")
    seed: int = Field(0, description="Of the noise.")

    @property
    def label(self) -> str:
        return self.shard.file_name

    def run(self, context: UnitContext) -> WrittenFiles:
        from aidocks.checkpoints.reader import Checkpoint

        used = {piece.source for recipe in self.recipes.values() for piece in recipe.pieces}
        opened = {number: Checkpoint(self.sources[number]) for number in sorted(used)}
        with ShardWriter(self.directory, self.shard) as writer:
            for tensor in self.shard.tensors:
                recipe = self.recipes[tensor.name]
                stored = [piece.find(opened[piece.source]) for piece in recipe.pieces]
                if not stored:
                    writer.copy_ranges(tensor.name, [bytes(tensor.nbytes)])
                elif recipe.copies and all(entry.dtype == tensor.dtype for entry in stored):
                    writer.copy_ranges(tensor.name, stored)
                else:
                    writer.write(tensor.name, compute(tensor, recipe, stored, self.seed))
        return WrittenFiles(files=(writer.output,))


class WriteRouter(_WeightFile):
    """The routers' weight file: gates that were computed as float32, in the result's type."""

    gates: OutputFile = Field(description="Safetensors file of float32 gates, named as in the result.")

    @property
    def label(self) -> str:
        return f"{self.shard.file_name} (router)"

    def run(self, context: UnitContext) -> WrittenFiles:
        from aidocks.checkpoints.header import read_header

        gates, _ = read_header(self.gates.path)
        with ShardWriter(self.directory, self.shard) as writer:
            for tensor in self.shard.tensors:
                entry = gates.get(tensor.name)
                if entry is not None and (entry.dtype, entry.shape) != ("F32", tensor.shape):
                    raise CorruptCheckpoint(
                        f"The gates {tensor.name} are {entry.dtype} {list(entry.shape)}, not F32 "
                        f"{list(tensor.shape)}."
                    )
                rows = _read_float32(entry.file, entry.begin, tensor) if entry else _neutral(tensor)
                writer.copy_ranges(tensor.name, [_to_bytes(rows, tensor)])
        return WrittenFiles(files=(writer.output,))


def _read_float32(path: Path, begin: int, tensor: TensorPlan) -> np.ndarray[Any, Any]:
    import numpy as np

    return np.fromfile(path, dtype="<f4", count=tensor.shape[0] * tensor.shape[1], offset=begin)


def _neutral(tensor: TensorPlan) -> np.ndarray[Any, Any]:
    import numpy as np

    if not tensor.name.endswith(".shared_expert_gate.weight"):
        raise CorruptCheckpoint(f"The gates have no tensor {tensor.name}.")
    return np.full(tensor.shape[0] * tensor.shape[1], _NEUTRAL_GATE, dtype="<f4")


def _to_bytes(rows: np.ndarray[Any, Any], tensor: TensorPlan) -> bytes:
    """Return float32 values, rounded to the nearest of a tensor's type (ties to even), as bytes."""
    import numpy as np

    if tensor.dtype == "BF16":
        bits = rows.view("<u4").astype(np.uint64)
        kept = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
        is_finite = bool(np.isfinite(rows).all()) and not bool((kept & 0x7F80 == 0x7F80).any())
    else:
        with np.errstate(over="ignore"):
            kept = rows.astype({"F32": "<f4", "F16": "<f2"}[tensor.dtype])
        is_finite = bool(np.isfinite(kept).all())
    if not is_finite:
        raise CorruptCheckpoint(f"The gates {tensor.name} are not finite in the type {tensor.dtype}.")
    return kept.tobytes()


def assembly_units(
    target: Target, files: Sequence[ShardPlan], directory: Path
) -> tuple[AssembleShard | WriteBesideWeights, ...]:
    """Return the units that write everything of a target but its routers.

    Args:
        target: The plan of the result.
        files: From :meth:`Target.plan_files`; the last is that of the routers.
        directory: Where the result is staged.
    """
    shards = [
        AssembleShard(
            sources=target.sources,
            directory=directory,
            shard=shard,
            recipes=recipes,
            # Where there is no noise, another seed is no other work.
            seed=target.seed if any(recipe.is_noisy for recipe in recipes.values()) else 0,
        )
        for shard in files[:-1]
        for recipes in ({tensor.name: target.recipes[tensor.name] for tensor in shard.tensors},)
    ]
    beside = WriteBesideWeights(
        base=target.sources[0],
        tokenizer=TokenizerFiles(source=target.tokenizer),
        directory=directory,
        config=target.config,
        shards=tuple(files),
        chat_template=target.chat_template,
    )
    return (*shards, beside)
