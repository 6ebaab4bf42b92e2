"""The spectral scan: one unit per matrix, which reads one tensor and needs no model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from aidocks.checkpoints.reader import Checkpoint
from aidocks.errors import CorruptCheckpoint
from aidocks.laser.matrices import Matrix
from aidocks.plan import Unit, UnitContext
from aidocks.specs.laser import Rule

#: Singular values that a scan's result carries, at most.
SAMPLED_VALUES = 64


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
        decisions: Rank, noise scale, threshold, signal-to-noise ratio and kept energy by rule. Both ratios
            are free of scale; the one of ``marchenko_pastur`` is also free of shape (0 for pure noise).
        singular_values: At most 64 of them, descending, evenly spaced in order; first and last are the
            extremes.
        frobenius: Frobenius norm.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    matrix: Matrix
    decisions: dict[Rule, RuleDecision]
    singular_values: tuple[float, ...]
    frobenius: float

    @property
    def noise_ratio(self) -> float:
        """The corrected signal-to-noise ratio, by which candidates are ordered."""
        snr = self.decisions["marchenko_pastur"].snr
        return math.inf if snr is None else snr


class ScanMatrix(Unit[MatrixSpectrum]):
    """Singular values of one matrix, and the rank that each rule would keep."""

    result_type: ClassVar[type[BaseModel]] = MatrixSpectrum

    checkpoint: Path = Field(description="Checkpoint directory.")
    matrix: Matrix

    @property
    def label(self) -> str:
        return self.matrix.name

    @property
    def weight(self) -> float:
        return self.matrix.cost

    def run(self, context: UnitContext) -> MatrixSpectrum:
        import torch

        from aidocks.laser.marchenko_pastur import RULES
        from aidocks.laser.spectrum import singular_values

        weight = open_checkpoint(self.checkpoint, context).tensor(self.matrix.name)
        if not bool(torch.isfinite(weight).all()):
            raise CorruptCheckpoint(
                f"The matrix {self.matrix.name} contains values that are not finite.", value=self.matrix.name
            )
        values = singular_values(weight.to(context.device))
        decisions: dict[Rule, RuleDecision] = {}
        for name, rule in RULES.items():
            decision = rule(values.numpy(), self.matrix.shape)
            decisions[name] = RuleDecision(
                rank=decision.rank,
                sigma=decision.sigma,
                threshold=decision.threshold,
                snr=decision.snr,
                energy=decision.energy,
            )
        return MatrixSpectrum(
            matrix=self.matrix,
            decisions=decisions,
            singular_values=tuple(_sample(values.tolist())),
            frobenius=float(values.square().sum().sqrt()),
        )


def _sample(values: list[float]) -> list[float]:
    if len(values) <= SAMPLED_VALUES:
        return values
    step = (len(values) - 1) / (SAMPLED_VALUES - 1)
    return [values[round(i * step)] for i in range(SAMPLED_VALUES)]


def open_checkpoint(path: Path, context: UnitContext) -> Checkpoint:
    """Return the checkpoint from the worker's cache; its headers are parsed once per worker."""
    checkpoint: Checkpoint = context.keep("checkpoint", path, lambda: Checkpoint(path))
    return checkpoint
