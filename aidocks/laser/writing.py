"""The units that write the result: one per weight file, and one for everything beside the weights."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from aidocks.checkpoints.files import copy_file
from aidocks.checkpoints.writer import ShardPlan, ShardWriter, write_index
from aidocks.laser.matrices import Reduction
from aidocks.plan import UnitContext, WritingUnit, WrittenFiles


class WriteShard(WritingUnit):
    """One weight file: reduced matrices are computed again in their type, all else copied as bytes."""

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

    def run(self, context: UnitContext) -> WrittenFiles:
        from aidocks.laser.scan import open_checkpoint
        from aidocks.laser.spectrum import reduce_rank

        checkpoint = open_checkpoint(self.checkpoint, context)
        ranks = {reduction.name: reduction.rank for reduction in self.reductions}
        with ShardWriter(self.directory, self.shard) as writer:
            for tensor in self.shard.tensors:
                if tensor.name in ranks:
                    stored = checkpoint.tensor(tensor.name).to(context.device)
                    writer.write(tensor.name, reduce_rank(stored, ranks[tensor.name]).cpu())
                else:
                    writer.copy(tensor.name, checkpoint.entries[tensor.name])
        return WrittenFiles(files=(writer.output,))


class CopyBesideWeights(WritingUnit):
    """Configuration, tokenizer, chat template and the index of the weight files."""

    checkpoint: Path = Field(description="Checkpoint directory of the base.")
    directory: Path = Field(description="Directory in which the result is staged.")
    shards: tuple[ShardPlan, ...]

    @property
    def label(self) -> str:
        return "configuration and tokenizer"

    def run(self, context: UnitContext) -> WrittenFiles:
        from aidocks.laser.scan import open_checkpoint

        checkpoint = open_checkpoint(self.checkpoint, context)
        sources = [checkpoint.path / "config.json", *checkpoint.metadata_files()]
        written = [copy_file(source, self.directory / source.name) for source in sources]
        return WrittenFiles(files=(*written, *write_index(self.directory, self.shards)))
