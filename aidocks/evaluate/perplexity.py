"""Perplexity of causal language models, measured chunk by chunk so that two models can be compared in pairs.

This module holds the light part (results, statistics, the unit); the model itself is in ``causal_lm``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from aidocks.evaluate.memory import memory_to_load
from aidocks.evaluate.texts import Split, TextSource
from aidocks.plan import Unit, UnitContext


class PerplexityResult(BaseModel):
    """Losses of one model on a fixed list of chunks.

    Attributes:
        nll: Summed negative log-likelihood of each chunk in nats; None where it is not finite.
        tokens: Predicted tokens of each chunk (one fewer than its length).
        positions: Which chunks of the text these are; equal positions make two results comparable.
        dtype: Floating-point type of the computation, such as ``bfloat16``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    nll: tuple[float | None, ...]
    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    dtype: str

    @property
    def total_tokens(self) -> int:
        return sum(self.tokens)

    @property
    def losses(self) -> list[float] | None:
        """Mean loss of each chunk in nats per token; None when one is not finite."""
        finite = [nll for nll in self.nll if nll is not None]
        if len(finite) < len(self.nll):
            return None
        return [nll / tokens for nll, tokens in zip(finite, self.tokens, strict=True)]

    @property
    def mean_loss(self) -> float | None:
        """Mean loss in nats per token, or None when it is not finite."""
        if self.losses is None:
            return None
        return math.fsum(nll for nll in self.nll if nll is not None) / self.total_tokens

    @property
    def perplexity(self) -> float | None:
        """exp(mean loss), or None when it is not finite."""
        loss = self.mean_loss
        return math.exp(loss) if loss is not None and loss < 700 else None

    @property
    def standard_error(self) -> float | None:
        """Standard error of the perplexity over chunks (delta method), or None when it is not finite."""
        losses, perplexity = self.losses, self.perplexity
        if losses is None or perplexity is None:
            return None
        return perplexity * standard_error(losses)


class Comparison(BaseModel):
    """Paired difference of two models on the same chunks; all None when a loss is not finite.

    Attributes:
        delta: Mean over chunks of (loss after - loss before), in nats per token; negative is better.
        standard_error: Standard error of that mean.
        z: delta / standard_error; None when no chunk changed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    delta: float | None
    standard_error: float | None
    z: float | None

    def improved(self, z_threshold: float) -> bool:
        """Say whether the loss fell significantly. A loss that is not finite never counts as better."""
        return self.z is not None and self.z <= -z_threshold

    def worsened(self, z_threshold: float) -> bool:
        """Say whether the loss rose significantly, or is no longer finite."""
        return self.delta is None or (self.z is not None and self.z >= z_threshold)


#: Stands for an infinite z (every chunk changed by exactly the same amount), which JSON cannot hold.
_LARGEST_Z = 1e9


def compare(before: PerplexityResult, after: PerplexityResult) -> Comparison:
    """Compare two models in pairs of chunks, which removes the spread between chunks from the error."""
    assert (before.positions, before.tokens) == (after.positions, after.tokens), "results of different chunks"
    if before.losses is None or after.losses is None:
        return Comparison(delta=None, standard_error=None, z=None)
    return compare_losses(before.losses, after.losses)


def compare_losses(before: Sequence[float], after: Sequence[float]) -> Comparison:
    """Compare two models by their finite losses on the same items, which are the independent units."""
    differences = [b - a for a, b in zip(before, after, strict=True)]
    delta, error = fmean(differences), standard_error(differences)
    z = (
        None
        if delta == 0
        else max(-_LARGEST_Z, min(_LARGEST_Z, delta / error if error else delta * math.inf))
    )
    return Comparison(delta=delta, standard_error=error, z=z)


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of independent values; 0 for a single one."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


class MeasurePerplexity(Unit[PerplexityResult]):
    """Perplexity of one checkpoint on one split of one text."""

    result_type: ClassVar[type[BaseModel]] = PerplexityResult

    model: Path = Field(description="Checkpoint directory.")
    text: TextSource = Field(default=TextSource(name="prose"), description="Where the chunks come from.")
    split: Split = "held_out"
    seq_length: int = Field(128, ge=2, description="Tokens of a chunk.")
    chunks: int = Field(32, ge=2, description="Number of chunks.")
    seed: int = 0
    dtype: str | None = Field(
        None, description="Computation type; None lets the worker choose what it does well."
    )

    @property
    def label(self) -> str:
        return f"{self.model.name} on {self.text.name} ({self.split.replace('_', '-')})"

    @property
    def memory(self) -> int | None:
        return memory_to_load(self.model)

    @property
    def weight(self) -> float:
        return float(self.seq_length * self.chunks)

    def run(self, context: UnitContext) -> PerplexityResult:
        from aidocks.evaluate.causal_lm import load_cached

        model = load_cached(self.model, self.dtype, context)
        return model.measure(self.text, self.split, self.seq_length, self.chunks, self.seed)
