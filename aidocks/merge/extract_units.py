"""The units of an extraction: the factors of one matrix, a look at everything else, and the adapter's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from aidocks.checkpoints.files import OutputFile, write_text
from aidocks.checkpoints.layout import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from aidocks.checkpoints.reader import Checkpoint
from aidocks.checkpoints.writer import ShardPlan, ShardWriter, TensorPlan
from aidocks.errors import CorruptCheckpoint
from aidocks.models.tokenizer_files import TokenizerFiles, write_tokenizer
from aidocks.plan import Unit, UnitContext, WritingUnit, WrittenFiles
from aidocks.specs.extract_lora import Decomposition, ExtractedMatrix

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from aidocks.merge.low_rank import LowRank

_BLOCK_ROWS = 4096


class MatrixFactors(BaseModel):
    """The factors of one matrix, and how close they come.

    Attributes:
        row: For the result.
        file: With the factors ``a`` [K, inputs] and ``b`` [outputs, K]; None where the rank is 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    row: ExtractedMatrix
    file: OutputFile | None = None


class ExtractMatrix(Unit[MatrixFactors]):
    """The factors of one matrix."""

    result_type: ClassVar[type[BaseModel]] = MatrixFactors

    base: Path = Field(description="Checkpoint directory of the base.")
    model: Path = Field(description="Checkpoint directory of the model.")
    tensor: str
    shape: tuple[int, int]
    is_transposed: bool = Field(False, description="Stored as inputs x outputs.")
    rank: int
    energy: float | None
    method: Decomposition
    seed: int
    scale: float = Field(description="What PEFT multiplies the product of the factors by.")
    dtype: str = Field(description="Of the factors, in safetensors' spelling.")
    directory: Path = Field(description="Where they are written.")

    @property
    def label(self) -> str:
        return self.tensor

    @property
    def weight(self) -> float:
        small, large = sorted(self.shape)
        return float(small * small * large if self.method == "exact" else self.rank * small * large)

    def outputs(self, result: MatrixFactors) -> Sequence[OutputFile]:
        return () if result.file is None else (result.file,)

    def run(self, context: UnitContext) -> MatrixFactors:
        from aidocks.checkpoints.dtypes import to_torch
        from aidocks.laser.spectrum import one_thread
        from aidocks.merge.low_rank import decompose

        base, model = (self._read(path, context) for path in (self.base, self.model))
        size = float(base.norm())
        d_OI = model.sub_(base)
        if self.is_transposed:
            d_OI = d_OI.mT
        with one_thread(context.device):
            found = decompose(
                d_OI, self.rank, energy=self.energy, method=self.method, seed=self.seed, name=self.tensor
            )
        root = self.scale**-0.5
        dtype = to_torch(self.dtype)
        b_OK, a_KI = ((factor * root).to(dtype) for factor in (found.b_OK, found.a_KI))
        product = (b_OK.to(d_OI.dtype) @ a_KI.to(d_OI.dtype)) * self.scale
        difference, left = float(d_OI.norm()), float((d_OI - product).norm())
        row = ExtractedMatrix(
            tensor=self.tensor,
            rank=found.rank,
            full_rank=min(self.shape),
            difference=difference,
            relative_difference=difference / size if size else 0.0,
            error=left / difference if difference else 0.0,
            energy=found.energy,
        )
        return MatrixFactors(row=row, file=self._write(found, a_KI, b_OK))

    def _read(self, directory: Path, context: UnitContext) -> torch.Tensor:
        """Return the matrix in float64, a copy."""
        import torch

        checkpoint = context.keep("checkpoint", directory, lambda: Checkpoint(directory))
        value: torch.Tensor = checkpoint.tensor(self.tensor).to(context.device, torch.float64, copy=True)
        if not bool(value.isfinite().all()):
            raise CorruptCheckpoint(
                f"{self.tensor} of {directory.name} contains values that are not finite (NaN or infinite).",
                value=self.tensor,
            )
        return value

    def _write(self, found: LowRank, a_KI: torch.Tensor, b_OK: torch.Tensor) -> OutputFile | None:
        if found.rank == 0:
            return None
        plans = tuple(
            TensorPlan(name=name, dtype=self.dtype, shape=tuple(factor.shape))
            for name, factor in (("a", a_KI), ("b", b_OK))
        )
        plan = ShardPlan(file_name=f"{self.unit_id}.safetensors", tensors=plans)
        with ShardWriter(self.directory, plan) as writer:
            writer.write("a", a_KI)
            writer.write("b", b_OK)
        return writer.output


class DifferentTensors(BaseModel):
    """Those of the tensors that were looked at which are not the same in both models."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    names: tuple[str, ...]


class CompareTensors(Unit[DifferentTensors]):
    """Which tensors have other values in one model than in the other."""

    result_type: ClassVar[type[BaseModel]] = DifferentTensors

    base: Path = Field(description="Checkpoint directory of the base.")
    model: Path = Field(description="Checkpoint directory of the model.")
    tensors: tuple[str, ...] = Field(description="All of the same shape in both.")

    @property
    def label(self) -> str:
        return "tensors that are no matrices of layers"

    @property
    def computes(self) -> bool:
        return False

    def run(self, context: UnitContext) -> DifferentTensors:
        checkpoints = Checkpoint(self.base), Checkpoint(self.model)
        return DifferentTensors(names=tuple(name for name in self.tensors if not _same(name, *checkpoints)))


def _same(name: str, base: Checkpoint, model: Checkpoint) -> bool:
    import torch

    from aidocks.merge.rows import StoredRows, as_matrix

    one, other = (StoredRows(name, checkpoint.entries[name]) for checkpoint in (base, model))
    height, _ = as_matrix(one.shape)
    return all(
        torch.equal(one.read(begin, end).double(), other.read(begin, end).double())
        for begin in range(0, height, _BLOCK_ROWS)
        for end in (min(begin + _BLOCK_ROWS, height),)
    )


class WriteAdapter(WritingUnit):
    """The files of the adapter."""

    model: Path = Field(description="Checkpoint directory of the model.")
    directory: Path = Field(description="Where the adapter is staged.")
    config: dict[str, Any] = Field(description="Content of adapter_config.json.")
    factors: dict[str, OutputFile] = Field(description="Module -> its factors.")
    saved: dict[str, str] = Field(
        description="Name in the adapter -> tensor of the model that is stored whole."
    )
    dtype: str = Field(description="Of the adapter's weights, in safetensors' spelling.")
    tokenizer: Path | None = Field(None, description="Directory whose tokenizer lies beside it.")

    @property
    def label(self) -> str:
        return ADAPTER_FILE

    @property
    def computes(self) -> bool:
        return False

    def run(self, context: UnitContext) -> WrittenFiles:
        from aidocks.checkpoints.dtypes import to_torch
        from aidocks.checkpoints.header import read_header

        model = Checkpoint(self.model)
        copied = {
            f"base_model.model.{module}.lora_{which.upper()}.weight": entry
            for module, file in self.factors.items()
            for which, entry in read_header(file.path)[0].items()
        }
        shapes = {name: entry.shape for name, entry in copied.items()}
        shapes |= {key: model.entries[tensor].shape for key, tensor in self.saved.items()}
        tensors = tuple(TensorPlan(name=n, dtype=self.dtype, shape=s) for n, s in sorted(shapes.items()))
        with ShardWriter(self.directory, ShardPlan(file_name=ADAPTER_FILE, tensors=tensors)) as writer:
            for plan in tensors:
                if plan.name in copied:
                    writer.copy(plan.name, copied[plan.name])
                else:
                    whole = model.tensor(self.saved[plan.name])
                    writer.write(plan.name, whole.to(to_torch(self.dtype)))
        config = write_text(self.directory / ADAPTER_CONFIG_FILE, json.dumps(self.config, indent=2) + "\n")
        beside: tuple[OutputFile, ...] = ()
        if self.tokenizer is not None:
            beside = write_tokenizer(TokenizerFiles(source=self.tokenizer), self.directory)
        return WrittenFiles(files=(writer.output, config, *beside))
