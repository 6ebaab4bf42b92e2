"""The units of an extraction: the factors of one matrix, a look at everything else, and the adapter's files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from aidocks.checkpoints.files import OutputFile, write_text
from aidocks.checkpoints.layout import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from aidocks.checkpoints.reader import Checkpoint
from aidocks.checkpoints.writer import ShardPlan, ShardWriter, TensorPlan
from aidocks.merge.inputs import Block, Inputs, finite_blocks
from aidocks.merge.names import own_tensor
from aidocks.merge.rows import StoredRows
from aidocks.models.tokenizer_files import TokenizerFiles, json_text, write_tokenizer
from aidocks.plan import Unit, UnitContext, WritingUnit, WrittenFiles
from aidocks.specs.extract_lora import Decomposition, ExtractedMatrix

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from aidocks.merge.extraction.low_rank import LowRank


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
        from aidocks.merge.extraction.low_rank import decompose
        from aidocks.threads import one_thread

        inputs = _both_models(self.tensor, self.base, self.model, context)
        d_OI, size, difference = self._difference(inputs)
        with one_thread(context.device):
            found = decompose(
                d_OI, self.rank, energy=self.energy, method=self.method, seed=self.seed, name=self.tensor
            )
        del d_OI  # before more is computed: matrices are large
        root = self.scale**-0.5
        dtype = to_torch(self.dtype)
        b_OK, a_KI = ((factor * root).to(dtype) for factor in (found.b_OK, found.a_KI))
        row = ExtractedMatrix(
            tensor=self.tensor,
            rank=found.rank,
            full_rank=min(self.shape),
            difference=difference,
            relative_difference=difference / size if size else 0.0,
            error=self._left(inputs, b_OK, a_KI) / difference if difference else 0.0,
            energy=found.energy,
        )
        return MatrixFactors(row=row, file=self._write(found, a_KI, b_OK))

    def _difference(self, inputs: Inputs) -> tuple[torch.Tensor, float, float]:
        """Return what the model differs from the base in: float32 [O, I]; and the norms of the base and of that."""
        import torch

        d = torch.empty(inputs.shape, dtype=torch.float32, device=inputs.device)

        def fill(block: Block) -> torch.Tensor:
            (delta,) = block.deltas
            d[block.begin : block.begin + len(delta)] = delta
            return torch.stack([block.base.square().sum(), delta.square().sum()])

        size, difference = inputs.sum(fill).sqrt().tolist()
        return (d.mT if self.is_transposed else d), size, difference

    def _left(self, inputs: Inputs, b_OK: torch.Tensor, a_KI: torch.Tensor) -> float:
        """Return the norm of the difference less the product of the factors as they are stored."""
        left, right = (a_KI.mT, b_OK.mT) if self.is_transposed else (b_OK, a_KI)
        right = right.double()

        def squares(block: Block) -> torch.Tensor:
            (delta,) = block.deltas
            product = left[block.begin : block.begin + len(delta)].double() @ right
            return delta.sub_(product, alpha=self.scale).square_().sum()

        return float(inputs.sum(squares).sqrt())

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
        return DifferentTensors(
            names=tuple(name for name in self.tensors if not self._is_same(name, context))
        )

    def _is_same(self, name: str, context: UnitContext) -> bool:
        import torch

        inputs = _both_models(name, self.base, self.model, context)
        return all(inputs.walk(lambda block: torch.equal(*block.values)))


def _both_models(name: str, base: Path, model: Path, context: UnitContext) -> Inputs:
    """Return a tensor of both models, to be walked through in float64; values that are not finite are refused."""

    def rows(directory: Path) -> StoredRows:
        checkpoint: Checkpoint = context.keep("checkpoint", directory, lambda: Checkpoint(directory))
        return StoredRows(f"{name} of {directory.name}", own_tensor(checkpoint.entries, name))

    return Inputs(name, (rows(base), rows(model)), 0, "float64", context.device, context.threads)


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
        shapes |= {key: own_tensor(model.entries, tensor).shape for key, tensor in self.saved.items()}
        tensors = tuple(TensorPlan(name=n, dtype=self.dtype, shape=s) for n, s in sorted(shapes.items()))
        with ShardWriter(self.directory, ShardPlan(file_name=ADAPTER_FILE, tensors=tensors)) as writer:
            for plan in tensors:
                if plan.name in copied:
                    writer.copy(plan.name, copied[plan.name])
                else:
                    entry = own_tensor(model.entries, self.saved[plan.name])
                    whole = StoredRows(f"{entry.name} of {self.model.name}", entry)
                    dtype = to_torch(self.dtype)
                    writer.write_blocks(plan.name, (block.to(dtype) for block in finite_blocks(whole)))
        config = write_text(self.directory / ADAPTER_CONFIG_FILE, json_text(self.config))
        beside: tuple[OutputFile, ...] = ()
        if self.tokenizer is not None:
            beside = write_tokenizer(TokenizerFiles(source=self.tokenizer), self.directory)
        return WrittenFiles(files=(writer.output, config, *beside))
