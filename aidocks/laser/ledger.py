"""The ledger: one line for every candidate, whatever became of it, and how its figures are written for people."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, Field

from aidocks.specs.laser import Truncation
from aidocks.specs.objective import Metric
from aidocks.specs.part_score import PartScore, ScoredPart

_UNITS: dict[Metric, str] = {
    "perplexity": "nats per token",
    "accuracy": "share of wrong answers",
    "log_likelihood": "nats per answer",
    "preference": "nats per pair",
}
_PARTS: dict[ScoredPart, str] = {"search": "search", "held_out": "held out", "report": "report"}


class LedgerLine(BaseModel):
    """One candidate: what it is, what was predicted and measured of it, and what was decided.

    Changes are of the objective's mean loss per item; negative is better. None stands for what was not computed or not
    measured; for a measured one (``items`` above 0) it stands for a loss that is not finite.

    Attributes:
        address: Full parameter name; with the expert's number in brackets where a tensor holds several.
        rule: What proposed the rank; several rules that agree are separated by commas.
        energy: Share that the components kept have, before any shrinking: by `weight` of the squared Frobenius norm;
            by `activation_aware` of the energy of the layer's output on the calibration data.
        snr: Corrected signal-to-noise ratio of the matrix; 0 for noise of any shape.
        predicted_change: First order, from gradients on the calibration part.
        predicted_standard_error: Of the first order, over samples.
        predicted_with_fisher: First and second order.
        items: Items that it was measured on alone; 0 when it was not.
        composed_delta: Change on top of the reductions accepted before it; so are the two after it. Of one that was
            accepted in a group, the change that the whole group makes.
        guards: z of every guard that was decided on, by its label: against the base, together with the reductions
            accepted before it; positive is worse.
        group: Number of the group with which it was accepted.
        decision: In words.
        accepted: Whether the result holds it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str
    layer: int | None
    kind: str
    rank: int
    full_rank: int
    truncation: Truncation
    shrink: bool = False
    rule: str
    energy: float | None = None
    snr: float | None = None
    predicted_change: float | None = None
    predicted_standard_error: float | None = None
    predicted_with_fisher: float | None = None
    items: int = Field(0, ge=0)
    delta: float | None = None
    standard_error: float | None = None
    z: float | None = None
    composed_delta: float | None = None
    composed_standard_error: float | None = None
    composed_z: float | None = None
    guards: dict[str, float | None] = Field(default_factory=dict)
    group: int | None = None
    decision: str
    accepted: bool = False

    @property
    def label(self) -> str:
        return f"{self.address} {self.rank}/{self.full_rank} {short_truncation(self.truncation)}"


def short_truncation(truncation: Truncation) -> str:
    """Return a word for which directions were kept: `weight` or `activation`."""
    return "activation" if truncation == "activation_aware" else truncation


def loss_unit(metric: Metric) -> str:
    """Return the unit of a metric's loss per item."""
    return _UNITS[metric]


def part_title(part: ScoredPart) -> str:
    """Return what people call a part of the data."""
    return _PARTS[part]


def written_value(score: PartScore, value: float | None, error: float | None) -> str:
    """Return a value in the metric's own unit with its standard error: `39.72 ± 0.41`, `57.9 % ± 1.2 %`."""
    if value is None:
        return "not finite"
    if score.metric == "accuracy":
        return f"{value:.1%} ± {error:.1%}" if error is not None else f"{value:.1%}"
    return with_error(value, error)


def with_error(value: float | None, error: float | None) -> str:
    """Return a number with as many digits as its standard error bears: `−0.0041 ± 0.0013`."""
    if value is None:
        return "not finite"
    if not error or not math.isfinite(error):
        return _signed(f"{value:.4g}")
    digits = max(0, min(12, 1 - math.floor(math.log10(error))))
    return f"{_signed(f'{value:.{digits}f}')} ± {error:.{digits}f}"


def written_z(z: float | None) -> str:
    """Return a z value; nothing where nothing changed."""
    return "" if z is None else _signed(f"{z:.2f}")


def _signed(number: str) -> str:
    return number.replace("-", "−", 1) if number.startswith("-") else number
