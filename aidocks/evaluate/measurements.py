"""Paired measurements of a model before and after a change, and when enough of them have been made.

The items (chunks, questions, preferences) are the independent units: every error is that of a mean over items, and a
change is judged by the differences item by item.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from aidocks.evaluate.objectives import LEAST_ITEMS
from aidocks.evaluate.perplexity import Comparison, compare_losses, standard_error
from aidocks.specs.objective import Metric

Decision = Literal["continue", "futile", "accept"]

#: A measurement ends when its chance of still becoming significant is below this. In simulation a change without
#: effect then takes a third of the items, and one of z = 6 (4) is missed in 2 % (6 %) of the cases because of it.
FUTILE_POWER = 0.1
_NORMAL = NormalDist()


class Value(NamedTuple):
    """A figure in the metric's own unit with its standard error; None where a loss is not finite."""

    value: float | None
    standard_error: float | None


class Pairs(BaseModel):
    """Losses of two states of one model on the same items; lower is better.

    Attributes:
        metric: What the losses are: nats per token of a chunk (perplexity), 1 - correct (accuracy), -log p of the
            answer in nats (log-likelihood), -(log p(chosen) - log p(rejected)) in nats (preference).
        positions: Which items of the data these are, in the order of measurement; the first ones of a part where the
            measurement ended early.
        before: Loss of each item; None where it is not finite.
        after: The same after the change.
        tokens: Predicted tokens of these items.
        dtype: Floating-point type of the computation, such as ``bfloat16``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: Metric
    positions: tuple[int, ...]
    before: tuple[float | None, ...]
    after: tuple[float | None, ...]
    tokens: int
    dtype: str

    @property
    def comparison(self) -> Comparison:
        """The paired change of the mean loss; all None when a loss is not finite."""
        before, after = _finite(self.before), _finite(self.after)
        if before is None or after is None:
            return Comparison(delta=None, standard_error=None, z=None)
        return compare_losses(before, after)

    @property
    def value_before(self) -> Value:
        """Perplexity, accuracy (0 to 1), mean log-likelihood or mean margin (nats) before the change."""
        return _value(self.metric, self.before)

    @property
    def value_after(self) -> Value:
        """The same after the change."""
        return _value(self.metric, self.after)


def finite_losses(losses: Sequence[float]) -> tuple[float | None, ...]:
    """Return losses as JSON can hold them: None for what is not finite."""
    return tuple(loss if math.isfinite(loss) else None for loss in losses)


def decide(pairs: Pairs, total: int, z_threshold: float) -> Decision:
    """Say whether a measurement that has come so far needs to go on. See :func:`judge`."""
    return judge(pairs.comparison, len(pairs.positions), total, z_threshold)


def judge(change: Comparison, items: int, total: int, z_threshold: float) -> Decision:
    """Decide a sequential test of whether the loss falls, with looks at a few fixed numbers of items.

    It is accepted beyond a boundary of the form of P. C. O'Brien and T. R. Fleming (Biometrics 35, 1979),
    z <= -z_threshold * sqrt(total / items): early only what is far beyond doubt, at the end what the fixed test
    accepts, so that repeated looks cost almost no false acceptance. It is futile when the predictive probability of
    crossing the threshold at the end is below 10 %: that of the present trend, whose own uncertainty counts (D. J.
    Spiegelhalter, L. S. Freedman and P. R. Blackburn, Controlled Clinical Trials 7, 1986). Conditional power, which
    takes the trend for certain, would miss twice as many true effects at the same cost.

    Args:
        change: Of the items measured so far.
        items: How many these are.
        total: How many there will be if it goes on.
        z_threshold: Significance that the whole measurement must have.

    Returns:
        At the end ``accept`` or ``futile``; ``futile`` at once when a loss is not finite.
    """
    if change.delta is None:
        return "futile"
    if items >= total:
        return "accept" if change.improved(z_threshold) else "futile"
    if items < LEAST_ITEMS:
        return "continue"
    if not change.standard_error:
        # That all items changed alike, or none at all, may be an accident of the first few: a discrete loss
        # often does not change. An error cannot be estimated from them.
        return "continue"
    share = items / total
    gain = -(change.z or 0.0)
    if gain >= z_threshold / math.sqrt(share):
        return "accept"
    expected, spread = gain / math.sqrt(share), math.sqrt((1 - share) / share)
    power = 1 - _NORMAL.cdf((z_threshold - expected) / spread)
    return "futile" if power < FUTILE_POWER else "continue"


def _finite(losses: Sequence[float | None]) -> list[float] | None:
    finite = [loss for loss in losses if loss is not None]
    return finite if len(finite) == len(losses) else None


def _value(metric: Metric, losses: Sequence[float | None]) -> Value:
    finite = _finite(losses)
    if not finite:
        return Value(None, None)
    mean, error = fmean(finite), standard_error(finite)
    if metric == "perplexity":
        if mean >= 700:
            return Value(None, None)
        return Value(math.exp(mean), math.exp(mean) * error)
    return Value(1 - mean if metric == "accuracy" else -mean, error)
