"""The units that decompose matrices into the directions of their outputs, in order of importance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from aidocks.checkpoints.files import OutputFile
from aidocks.errors import CorruptCheckpoint
from aidocks.laser.batches import label_of
from aidocks.laser.matrices import Matrix, stored_matrix
from aidocks.plan import Unit, UnitContext
from aidocks.specs.laser import Truncation

if TYPE_CHECKING:
    import torch

    from aidocks.laser.truncation import Basis


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
        return decompose((self,), context)[0]

    def outputs(self, result: Decomposition) -> Sequence[OutputFile]:
        return (result.file,)

    def stored(self, context: UnitContext) -> torch.Tensor:
        """Return the matrix on the worker's device.

        Raises:
            CorruptCheckpoint: When it has entries that are not finite.
        """
        import torch

        from aidocks.laser.scan import open_checkpoint

        w_OI = stored_matrix(open_checkpoint(self.checkpoint, context), self.matrix).to(context.device)
        if not bool(torch.isfinite(w_OI).all()):
            raise CorruptCheckpoint(
                f"The matrix {self.matrix.address} contains values that are not finite.",
                value=self.matrix.address,
            )
        return w_OI

    def covariance(self) -> torch.Tensor | None:
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

    def written(self, basis: Basis, truncation: Truncation) -> Decomposition:
        """Write what was found, and return where."""
        from aidocks.laser.truncation import save_basis

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


class Decompositions(BaseModel):
    """The decompositions of several matrices, in their order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    results: tuple[Decomposition, ...]


class DecomposeMatrices(Unit[Decompositions]):
    """What several :class:`DecomposeMatrix` do, for matrices of one shape, as one batch; see ``batches``."""

    result_type: ClassVar[type[BaseModel]] = Decompositions

    units: tuple[DecomposeMatrix, ...] = Field(min_length=1)

    @property
    def label(self) -> str:
        return label_of(self.units)

    @property
    def weight(self) -> float:
        return sum(unit.weight for unit in self.units)

    def run(self, context: UnitContext) -> Decompositions:
        return Decompositions(results=tuple(decompose(self.units, context)))

    def outputs(self, result: Decompositions) -> Sequence[OutputFile]:
        return tuple(one.file for one in result.results)


def decompose(units: Sequence[DecomposeMatrix], context: UnitContext) -> list[Decomposition]:
    """Decompose matrices of one shape as one batch on the worker's device, and write their bases.

    Raises:
        CorruptCheckpoint: For a matrix with entries that are not finite.
    """
    from aidocks.laser.truncation import bases
    from aidocks.threads import one_thread

    truncations: list[Truncation] = []

    def read() -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        for unit in units:  # second moments, which may be the largest by far, one after another
            covariance_II = unit.covariance()
            truncations.append("weight" if covariance_II is None else "activation_aware")
            yield unit.stored(context), covariance_II

    with one_thread(context.device):
        found = bases(read())
    return [
        unit.written(basis, truncation)
        for unit, basis, truncation in zip(units, found, truncations, strict=True)
    ]
