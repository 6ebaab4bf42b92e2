"""The units that write the MoE: one per weight file, and one for everything beside the weights.

Where the stored type is the planned one, a tensor is a byte range that the kernel copies: no decoding, no
torch, and memory that does not grow with the model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from aidocks.checkpoints.files import OutputFile, copy_file, write_text
from aidocks.checkpoints.writer import ShardPlan, ShardWriter, write_index
from aidocks.moe.mixtral import TensorSource, find_source
from aidocks.plan import UnitContext, WritingUnit, WrittenFiles

if TYPE_CHECKING:
    from aidocks.checkpoints.reader import Checkpoint


class AssembleShard(WritingUnit):
    """One weight file of the MoE."""

    base: Path = Field(description="Checkpoint directory that gives everything but MLPs and router.")
    experts: tuple[Path, ...] = Field(description="Checkpoint directories that give the MLPs.")
    router: OutputFile = Field(description="The safetensors file with the router rows, in the result's type.")
    directory: Path = Field(description="Directory in which the result is staged.")
    shard: ShardPlan

    @property
    def label(self) -> str:
        return self.shard.file_name

    @property
    def weight(self) -> float:
        return float(self.shard.nbytes)

    def run(self, context: UnitContext) -> WrittenFiles:
        from aidocks.checkpoints.header import read_header
        from aidocks.checkpoints.reader import Checkpoint

        router, _ = read_header(self.router.path)
        opened = {path: Checkpoint(path) for path in {self.base, *self.experts}}
        with ShardWriter(self.directory, self.shard) as writer:
            for tensor in self.shard.tensors:
                source = find_source(tensor.name)
                if source.model == "router":
                    writer.copy(tensor.name, router[source.name])
                    continue
                checkpoint = opened[self._directory(source)]
                entry = checkpoint.entries[source.name]
                if entry.dtype == tensor.dtype:
                    writer.copy(tensor.name, entry)
                else:
                    writer.write(tensor.name, _cast(checkpoint, source.name, tensor.dtype))
        return WrittenFiles(files=(writer.output,))

    def _directory(self, source: TensorSource) -> Path:
        return self.experts[source.model] if isinstance(source.model, int) else self.base


def _cast(checkpoint: Checkpoint, name: str, dtype: str) -> Any:
    from aidocks.checkpoints.dtypes import to_torch
    from aidocks.errors import IncompatibleModels

    stored = checkpoint.tensor(name)
    cast = stored.to(to_torch(dtype))
    if not bool(cast.isfinite().all()) and bool(stored.isfinite().all()):
        raise IncompatibleModels(
            f"The tensor {name} of {checkpoint.path.name} has values that are too large for {dtype}.",
            field="dtype",
            value=dtype,
            hint="Use bfloat16 or float32.",
        )
    return cast


class WriteBesideWeights(WritingUnit):
    """Configuration, the index of the weight files, and the base's tokenizer files, byte for byte."""

    base: Path = Field(description="Checkpoint directory of the base.")
    directory: Path = Field(description="Directory in which the result is staged.")
    config: dict[str, Any] = Field(description="Content of config.json.")
    shards: tuple[ShardPlan, ...]

    @property
    def label(self) -> str:
        return "configuration and tokenizer"

    def run(self, context: UnitContext) -> WrittenFiles:
        from aidocks.checkpoints.reader import Checkpoint

        files = [
            copy_file(source, self.directory / source.name)
            for source in Checkpoint(self.base).metadata_files()
        ]
        config = json.dumps(self.config, indent=2, sort_keys=True) + "\n"
        files.append(write_text(self.directory / "config.json", config))
        return WrittenFiles(files=(*files, *write_index(self.directory, self.shards)))
