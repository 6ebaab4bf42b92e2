"""The units that write the result: one per weight file, and one for everything beside the weights.

A reduced matrix is computed again from the stored one and the directions that the search measured it with, so a dense
result is what was measured; the two factors of a factored one are rounded each. Everything else is copied as bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from aidocks.checkpoints.files import copy_file, hash_file
from aidocks.checkpoints.reader import Checkpoint
from aidocks.checkpoints.writer import ShardPlan, ShardWriter, plan_shards, write_index
from aidocks.errors import CorruptCheckpoint
from aidocks.laser.factors import (
    choose_factored,
    factor_names,
    factored_config,
    matrix_name,
    plan_tensors,
    write_config,
)
from aidocks.laser.matrices import Reduction, parse_address
from aidocks.plan import Unit, UnitContext, WritingUnit, WrittenFiles

if TYPE_CHECKING:
    import torch

    from aidocks.laser.truncation import Basis


class FactorRanks(BaseModel):
    """Which matrices are stored as factors: full name -> rank."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ranks: dict[str, int]


class ChooseFactors(Unit[FactorRanks]):
    """Of the reduced matrices, those that two factors store in less room and that transformers can load so.

    Only transformers knows which weights are linear layers of its network (a router's is none, for instance), so the
    network is built, without its weights.
    """

    result_type: ClassVar[type[BaseModel]] = FactorRanks

    checkpoint: Path = Field(description="Checkpoint directory of the base.")
    reductions: tuple[Reduction, ...]

    @property
    def label(self) -> str:
        return "which matrices are stored as factors"

    def run(self, context: UnitContext) -> FactorRanks:
        from aidocks.laser.factored import linear_weights
        from aidocks.laser.scan import open_checkpoint

        checkpoint = open_checkpoint(self.checkpoint, context)
        wanted = {reduction.address: reduction.rank for reduction in self.reductions}
        linear = linear_weights(checkpoint.config, set(wanted))
        return FactorRanks(ranks=choose_factored(checkpoint.entries, wanted, linear))


class WriteShard(WritingUnit):
    """One weight file: reduced matrices are computed again in their type, all else is copied as bytes."""

    checkpoint: Path = Field(description="Checkpoint directory of the base.")
    directory: Path = Field(description="Directory in which the result is staged.")
    shard: ShardPlan
    reductions: tuple[Reduction, ...] = Field(description="Those of matrices in this file.")

    @property
    def label(self) -> str:
        return self.shard.file_name

    @property
    def weight(self) -> float:
        return float(self.shard.nbytes)

    @property
    def computes(self) -> bool:
        return bool(self.reductions)

    def run(self, context: UnitContext) -> WrittenFiles:
        from aidocks.laser.scan import open_checkpoint

        checkpoint = open_checkpoint(self.checkpoint, context)
        made = _Reduced(checkpoint, self.reductions, context.device)
        with ShardWriter(self.directory, self.shard) as writer:
            for tensor in self.shard.tensors:
                if tensor.name not in checkpoint.entries:
                    writer.write(tensor.name, made.factor(tensor.name))
                elif tensor.name in made.names:
                    writer.write(tensor.name, made.dense(tensor.name))
                else:
                    writer.copy(tensor.name, checkpoint.entries[tensor.name])
        return WrittenFiles(files=(writer.output,))


class CopyBesideWeights(WritingUnit):
    """Configuration, tokenizer, chat template and the index of the weight files."""

    checkpoint: Path = Field(description="Checkpoint directory of the base.")
    directory: Path = Field(description="Directory in which the result is staged.")
    shards: tuple[ShardPlan, ...]
    factored: dict[str, int] = Field(
        default_factory=dict, description="Matrices stored as factors: full name -> rank."
    )

    @property
    def label(self) -> str:
        return "configuration and tokenizer"

    @property
    def computes(self) -> bool:
        return False

    def run(self, context: UnitContext) -> WrittenFiles:
        from aidocks.laser.scan import open_checkpoint

        checkpoint = open_checkpoint(self.checkpoint, context)
        if self.factored:
            config = write_config(self.directory, factored_config(checkpoint.config, self.factored))
        else:
            config = copy_file(checkpoint.path / "config.json", self.directory / "config.json")
        beside = [copy_file(source, self.directory / source.name) for source in checkpoint.metadata_files()]
        return WrittenFiles(files=(config, *beside, *write_index(self.directory, self.shards)))


def writing_units(
    checkpoint: Checkpoint,
    directory: Path,
    reductions: Sequence[Reduction],
    factored: Mapping[str, int],
    max_shard_bytes: int,
) -> tuple[WritingUnit, ...]:
    """Return the units that write a result, the one for what is beside the weights last.

    Args:
        checkpoint: Of the base.
        directory: In which the result is staged.
        reductions: Those that are kept; one of a matrix at most.
        factored: Matrices to store as factors, as :class:`ChooseFactors` finds them; empty for a dense result.
        max_shard_bytes: Largest weight file.
    """
    shards = plan_shards(plan_tensors(checkpoint.entries, factored), max_shard_bytes)
    writers = []
    for shard in shards:
        names = {t.name if t.name in checkpoint.entries else matrix_name(t.name) for t in shard.tensors}
        inside = tuple(r for r in reductions if parse_address(r.address)[0] in names)
        writers.append(
            WriteShard(checkpoint=checkpoint.path, directory=directory, shard=shard, reductions=inside)
        )
    beside = CopyBesideWeights(
        checkpoint=checkpoint.path, directory=directory, shards=shards, factored=dict(factored)
    )
    return (*writers, beside)


class _Reduced:
    """Reduced matrices of a checkpoint, computed when they are asked for.

    Attributes:
        names: Tensors that hold one.
    """

    def __init__(self, checkpoint: Checkpoint, reductions: Sequence[Reduction], device: str) -> None:
        self.names: dict[str, dict[int | None, Reduction]] = {}
        for reduction in reductions:
            name, expert = parse_address(reduction.address)
            slices = self.names.setdefault(name, {})
            assert expert not in slices, f"{reduction.address} is reduced twice"
            slices[expert] = reduction
        self._checkpoint = checkpoint
        self._device = device
        self._factors: dict[str, torch.Tensor] = {}

    def dense(self, name: str) -> torch.Tensor:
        """Return a tensor with its reduced matrix, or with those of its experts that are reduced."""
        from aidocks.laser.truncation import reduce

        stored = self._checkpoint.tensor(name)
        slices = self.names[name]
        if None in slices:
            whole = slices[None]
            return reduce(stored.to(self._device), self._basis(whole), whole.rank, shrink=whole.shrink).cpu()
        tensor = stored.clone()
        for expert, reduction in slices.items():
            w_OI = stored[expert].to(self._device)
            tensor[expert] = reduce(w_OI, self._basis(reduction), reduction.rank, shrink=reduction.shrink)
        return tensor

    def factor(self, name: str) -> torch.Tensor:
        """Return one of the two factors of a matrix."""
        from aidocks.laser.truncation import factors

        if name not in self._factors:
            matrix = matrix_name(name)
            reduction = self.names[matrix][None]
            w_OI = self._checkpoint.tensor(matrix).to(self._device)
            pair = factors(w_OI, self._basis(reduction), reduction.rank, shrink=reduction.shrink)
            # The two are written one after the other: nothing older is asked for again.
            self._factors = dict(zip(factor_names(matrix), (part.cpu() for part in pair), strict=True))
        return self._factors[name]

    def _basis(self, reduction: Reduction) -> Basis:
        from aidocks.laser.truncation import load_basis

        if hash_file(reduction.basis) != reduction.sha256:
            raise CorruptCheckpoint(
                f"The directions of {reduction.address} are not those that were measured.",
                value=reduction.basis.name,
                hint="Something changed a file in the job's workspace; start the job again.",
            )
        return load_basis(reduction.basis, self._device)
