"""The unit that decomposes one matrix into the directions of its outputs, in order of importance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from aidocks.checkpoints.files import OutputFile
from aidocks.errors import CorruptCheckpoint
from aidocks.laser.matrices import Matrix, stored_matrix
from aidocks.plan import Unit, UnitContext
from aidocks.specs.laser import Truncation

if TYPE_CHECKING:
    import torch


class Decomposition(BaseModel):
    """Where the directions of a matrix are, and what each rank keeps of it.

    Attributes:
        address: The matrix's.
        truncation: By which the directions were chosen: `weight` also where nothing is known of the inputs.
        file: Its basis; :func:`aidocks.laser.truncation.load_basis` reads it.
        ranks: As asked for.
        energies: Share of the squared values that each of those ranks keeps: of the matrix itself, or of its output.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str
    truncation: Truncation
    file: OutputFile
    ranks: tuple[int, ...]
    energies: tuple[float, ...]


class DecomposeMatrix(Unit[Decomposition]):
    """One basis of one matrix. Reads one tensor and, for `activation_aware`, the second moments of its input."""

    result_type: ClassVar[type[BaseModel]] = Decomposition
    version: ClassVar[int] = 2

    checkpoint: Path = Field(description="Checkpoint directory.")
    matrix: Matrix
    truncation: Truncation
    covariances: tuple[OutputFile, ...] = Field((), description="Of all shares, in order.")
    directory: Path = Field(description="Directory for the file.")
    ranks: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        return self.matrix.address

    @property
    def weight(self) -> float:
        return self.matrix.cost

    def run(self, context: UnitContext) -> Decomposition:
        import torch

        from aidocks.laser.scan import open_checkpoint
        from aidocks.laser.spectrum import one_thread
        from aidocks.laser.truncation import activation_basis, save_basis, weight_basis

        w_OI = stored_matrix(open_checkpoint(self.checkpoint, context), self.matrix).to(context.device)
        if not bool(torch.isfinite(w_OI).all()):
            raise CorruptCheckpoint(
                f"The matrix {self.matrix.address} contains values that are not finite.",
                value=self.matrix.address,
            )
        covariance_II = self._covariance()
        truncation: Truncation = "weight" if covariance_II is None else "activation_aware"
        with one_thread(context.device):
            basis = weight_basis(w_OI) if covariance_II is None else activation_basis(w_OI, covariance_II)
        squares_N = basis.values_N.square()
        kept = [float(squares_N[:rank].sum()) for rank in self.ranks]
        total = float(squares_N.sum())
        return Decomposition(
            address=self.matrix.address,
            truncation=truncation,
            file=save_basis(self.directory / f"basis-{self.unit_id}.safetensors", basis),
            ranks=self.ranks,
            energies=tuple(part / total if total else 1.0 for part in kept),
        )

    def _covariance(self) -> torch.Tensor | None:
        """Return c_II; None where the weights have to do: nothing was collected, or it is not finite."""
        import torch

        from aidocks.laser.calibration import load_covariance

        if self.truncation == "weight":
            return None
        covariance_II = load_covariance(self.covariances, self.matrix.address)
        # The sum of x_i x_j is never larger than those of the squares, so where these are finite, all is.
        if covariance_II is None or not bool(torch.isfinite(covariance_II.diagonal()).all()):
            return None
        return covariance_II

    def outputs(self, result: Decomposition) -> Sequence[OutputFile]:
        return (result.file,)
