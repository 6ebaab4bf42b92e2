"""The spectral scan: one unit per matrix, which reads one tensor block by block and needs no model."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from aidocks.checkpoints.dtypes import DTYPE_BITS, to_torch
from aidocks.checkpoints.files import write_bytes
from aidocks.checkpoints.header import TensorEntry
from aidocks.checkpoints.reader import Checkpoint
from aidocks.errors import CorruptCheckpoint
from aidocks.laser.batches import label_of
from aidocks.laser.matrices import Matrix
from aidocks.plan import Unit, UnitContext
from aidocks.specs.laser import Rule

if TYPE_CHECKING:
    import torch

    from aidocks.laser.marchenko_pastur import Decision, Values

#: Singular values that a scan's result carries, at most.
SAMPLED_VALUES = 64
#: Raise it when the same matrix gets other singular values, so that those kept before are not used any more.
_METHOD = "gram-fp64/2"


class RuleDecision(BaseModel):
    """What one rule makes of one matrix; see ``marchenko_pastur.Decision``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int
    sigma: float
    threshold: float
    snr: float | None
    energy: float


class MatrixSpectrum(BaseModel):
    """The spectrum of one matrix in short.

    Attributes:
        decisions: By :func:`decision_key`, such as ``laserrmt`` or ``energy 0.9``.
        singular_values: At most 64 of them, descending, evenly spaced in order; first and last are the
            extremes.
        frobenius: Frobenius norm.
        sigma: Standard deviation of the noise entries by the fitted bulk of the spectrum, outliers left out.
        outliers: How many these are.
        edge: The largest singular value of that noise; the outliers are those above it.
        bulk_distance: Kolmogorov-Smirnov distance of that bulk from the Marchenko-Pastur law, 0 to 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    matrix: Matrix
    decisions: dict[str, RuleDecision]
    singular_values: tuple[float, ...]
    frobenius: float
    sigma: float
    outliers: int = 0
    edge: float = 0.0
    bulk_distance: float

    @property
    def snr(self) -> float | None:
        """The original signal-to-noise ratio: None where no singular value is below the original's threshold."""
        return self.decisions["laserrmt"].snr

    @property
    def noise_ratio(self) -> float | None:
        """The corrected signal-to-noise ratio: free of scale, and 0 for noise of any shape; None as in :attr:`snr`."""
        return self.decisions["marchenko_pastur"].snr

    @property
    def spectral_norm(self) -> float:
        return self.singular_values[0]

    @property
    def order(self) -> tuple[float, tuple[float, str, int]]:
        """Sorts the noisiest matrix first."""
        return (math.inf if self.noise_ratio is None else self.noise_ratio), self.matrix.order


def decision_key(rule: Rule, keep: float | None = None) -> str:
    """Return the key under which a spectrum holds the decision of a rule, with the share that it keeps if any."""
    return rule if keep is None else f"{rule} {keep:g}"


class ScanMatrix(Unit[MatrixSpectrum]):
    """Singular values of one matrix, and the rank that each rule would keep.

    The values are kept by content: those of a file with the same bytes are not computed again, wherever it lies.
    """

    result_type: ClassVar[type[BaseModel]] = MatrixSpectrum
    version: ClassVar[int] = 2

    checkpoint: Path = Field(description="Checkpoint directory.")
    matrix: Matrix
    file_sha256: str = Field(description="SHA-256 of the weight file that holds the matrix.")
    cache_dir: Path = Field(description="Where singular values are kept.")
    keeps: tuple[float, ...] = Field((), description="Shares for the rules `fraction` and `energy`.")

    @property
    def label(self) -> str:
        return self.matrix.address

    @property
    def weight(self) -> float:
        return self.matrix.cost

    @property
    def kept_at(self) -> Path:
        """The file of the singular values."""
        key = hashlib.sha256(f"{self.file_sha256}\n{self.matrix.address}\n{_METHOD}".encode()).hexdigest()
        return self.cache_dir / "spectra" / key[:2] / f"{key}.npy"

    def run(self, context: UnitContext) -> MatrixSpectrum:
        return describe_spectrum(self.matrix, self.values(context), self.keeps)

    def values(self, context: UnitContext) -> Values:
        """Return all singular values, descending: float64 [N]; from the cache if they are there, else into it.

        Raises:
            CorruptCheckpoint: For a matrix with entries that are not finite.
        """
        return values_of((self,), context)[0]


class MatrixSpectra(BaseModel):
    """The spectra of several matrices, in their order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    results: tuple[MatrixSpectrum, ...]


class ScanMatrices(Unit[MatrixSpectra]):
    """What several :class:`ScanMatrix` do, for matrices of one shape, as one batch; see ``batches``."""

    result_type: ClassVar[type[BaseModel]] = MatrixSpectra

    units: tuple[ScanMatrix, ...] = Field(min_length=1)

    @property
    def label(self) -> str:
        return label_of(self.units)

    @property
    def weight(self) -> float:
        return sum(unit.weight for unit in self.units)

    def run(self, context: UnitContext) -> MatrixSpectra:
        found = zip(self.units, values_of(self.units, context), strict=True)
        return MatrixSpectra(
            results=tuple(describe_spectrum(unit.matrix, values_N, unit.keeps) for unit, values_N in found)
        )


def values_of(units: Sequence[ScanMatrix], context: UnitContext) -> list[Values]:
    """Return all singular values of matrices of one shape in one checkpoint, each as :meth:`ScanMatrix.values`.

    Raises:
        CorruptCheckpoint: For a matrix with entries that are not finite.
    """
    values = [_load(unit.kept_at, unit.matrix.full_rank) for unit in units]
    missing = [place for place, values_N in enumerate(values) if values_N is None]
    if missing:
        entries = open_checkpoint(units[0].checkpoint, context).entries
        matrices = [units[place].matrix for place in missing]
        stored = [(entries[matrix.name], matrix) for matrix in matrices]
        for place, values_N in zip(missing, compute_values(stored, context.device), strict=True):
            _keep(units[place].kept_at, values_N)
            values[place] = values_N
    return [values_N for values_N in values if values_N is not None]


def scan_units(
    checkpoint: Checkpoint,
    matrices: Iterable[Matrix],
    file_hashes: Mapping[str, str],
    cache_dir: Path,
    keeps: tuple[float, ...] = (),
) -> tuple[ScanMatrix, ...]:
    """Return the units that scan matrices of a checkpoint, in their order.

    Args:
        checkpoint: The model.
        matrices: Some of it.
        file_hashes: SHA-256 of the weight files by name.
        cache_dir: Where singular values are kept.
        keeps: See :class:`ScanMatrix`.
    """
    return tuple(
        ScanMatrix(
            checkpoint=checkpoint.path,
            matrix=matrix,
            file_sha256=file_hashes[checkpoint.entries[matrix.name].file.name],
            cache_dir=cache_dir,
            keeps=keeps,
        )
        for matrix in matrices
    )


def compute_values(stored: Sequence[tuple[TensorEntry, Matrix]], device: str = "cpu") -> list[Values]:
    """Return all singular values of stored matrices of one shape, descending: float64 [N] of each.

    Raises:
        CorruptCheckpoint: For a matrix with entries that are not finite, or a file that has become shorter.
    """
    import numpy as np

    from aidocks.laser.spectrum import gram, values_of_grams
    from aidocks.threads import one_thread

    with one_thread(device):
        grams = [gram(_blocks(entry, matrix), matrix.full_rank, device) for entry, matrix in stored]
        computed: list[Values] = [values_N.numpy() for values_N in values_of_grams(grams)]
    for values_N, (_, matrix) in zip(computed, stored, strict=True):
        if not np.isfinite(values_N).all():
            raise CorruptCheckpoint(
                f"The matrix {matrix.address} contains values that are not finite.",
                value=matrix.address,
                hint="Nothing can be said about such a model; restore its files, or look for another copy.",
            )
    return computed


def describe_spectrum(matrix: Matrix, values_N: Values, keeps: tuple[float, ...] = ()) -> MatrixSpectrum:
    """Return what a spectrum shows: every rule's decision, the fitted bulk, norms."""
    import numpy as np

    from aidocks.laser.marchenko_pastur import fit_bulk
    from aidocks.laser.rules import RULES, SHARES, decide

    made = {decision_key(rule): decide(rule, values_N, matrix.shape) for rule in RULES}
    for rule in SHARES:
        made |= {decision_key(rule, keep): decide(rule, values_N, matrix.shape, keep) for keep in keeps}
    fit = fit_bulk(values_N, matrix.shape)
    return MatrixSpectrum(
        matrix=matrix,
        decisions={key: _rule_decision(decision) for key, decision in made.items()},
        singular_values=tuple(_sample(values_N.tolist())),
        frobenius=float(np.sqrt(np.square(values_N).sum())),
        sigma=fit.sigma,
        outliers=fit.outliers,
        edge=fit.edge,
        bulk_distance=fit.distance,
    )


def _rule_decision(decision: Decision) -> RuleDecision:
    return RuleDecision(
        rank=decision.rank,
        sigma=decision.sigma,
        threshold=decision.threshold,
        snr=decision.snr,
        energy=decision.energy,
    )


def _sample(values: list[float]) -> list[float]:
    if len(values) <= SAMPLED_VALUES:
        return values
    step = (len(values) - 1) / (SAMPLED_VALUES - 1)
    return [values[round(i * step)] for i in range(SAMPLED_VALUES)]


def _blocks(entry: TensorEntry, matrix: Matrix) -> Iterator[torch.Tensor]:
    """Yield a matrix from its file, block by block along its longer side (see ``spectrum.gram``).

    The file is read, not mapped: mapped pages stay in the process's memory until the whole checkpoint is there. Rows
    are read as they are needed; of a matrix that is wider than high each block takes a part of every row, so it is
    held as it is stored.
    """
    import torch

    from aidocks.laser.spectrum import blocks_of, rows_of_block

    rows, columns = matrix.shape
    dtype, row_bytes = to_torch(matrix.dtype), columns * DTYPE_BITS[matrix.dtype] // 8
    begin = entry.begin + (matrix.expert or 0) * rows * row_bytes
    at_once = min(rows, rows_of_block(columns)) if rows >= columns else rows
    room = memoryview(bytearray(at_once * row_bytes))
    with entry.file.open("rb", buffering=0) as file:
        for first in range(0, rows, at_once):
            count = min(at_once, rows - first)
            _read(file.fileno(), room[: count * row_bytes], begin + first * row_bytes, entry)
            read = torch.frombuffer(room, dtype=dtype, count=count * columns).view(count, columns)
            if rows >= columns:
                yield read
            else:
                yield from blocks_of(read)


def _read(descriptor: int, room: memoryview, begin: int, entry: TensorEntry) -> None:
    done = 0
    while done < len(room):
        count = os.preadv(descriptor, [room[done:]], begin + done)
        if count == 0:
            raise CorruptCheckpoint(
                f"{entry.file.name} has become shorter since it was opened; {entry.name} is cut off.",
                hint="Something changed the file while it was being read; restore it and try again.",
            )
        done += count


def _load(path: Path, count: int) -> Values | None:
    """Return the values that were kept; None where there are none, or something else than ``count`` values."""
    import numpy as np

    try:
        values_N = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    right = values_N.shape == (count,) and values_N.dtype == np.float64
    return values_N if right and bool(np.isfinite(values_N).all()) else None


def _keep(path: Path, values_N: Values) -> None:
    import numpy as np

    content = BytesIO()
    np.save(content, values_N, allow_pickle=False)
    write_bytes(path, content.getvalue())


def open_checkpoint(path: Path, context: UnitContext) -> Checkpoint:
    """Return the checkpoint from the worker's cache; its headers are parsed once per worker."""
    checkpoint: Checkpoint = context.keep("checkpoint", path, lambda: Checkpoint(path))
    return checkpoint
