"""Paired measurements of a model before and after a change, and when enough of them have been made.

The items (chunks, questions, preferences) are the independent units: every error is that of a mean over items, and a
change is judged by the differences item by item. An error that is estimated from few items is itself uncertain, so
what counts is not the z that is shown but the one that is as improbable as Student's t of so many items.
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

    def improved(self, z_threshold: float) -> bool:
        """Say whether the loss fell significantly, at the threshold's level for any number of items."""
        z = self.comparison.z
        return z is not None and normal_equivalent(z, len(self.positions)) <= -z_threshold

    def worsened(self, z_threshold: float) -> bool:
        """Say whether the loss rose significantly, or is no longer finite."""
        delta, z = self.comparison.delta, self.comparison.z
        return delta is None or (z is not None and normal_equivalent(z, len(self.positions)) >= z_threshold)

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
    takes the trend for certain, would miss twice as many true effects at the same cost. Every z is that of
    :func:`normal_equivalent`.

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
    gain = -normal_equivalent(change.z or 0.0, items)
    if items >= total:
        return "accept" if change.z is not None and gain >= z_threshold else "futile"
    if items < LEAST_ITEMS:
        return "continue"
    if not change.standard_error:
        # That all items changed alike, or none at all, may be an accident of the first few: a discrete loss
        # often does not change. An error cannot be estimated from them.
        return "continue"
    share = items / total
    if gain >= z_threshold / math.sqrt(share):
        return "accept"
    expected, spread = gain / math.sqrt(share), math.sqrt((1 - share) / share)
    power = 1 - _NORMAL.cdf((z_threshold - expected) / spread)
    return "futile" if power < FUTILE_POWER else "continue"


def normal_equivalent(t: float, items: int) -> float:
    """Return the z that is as improbable for a normal variable as t is for the mean of few items over its error.

    The mean of n normal differences over its estimated error has Student's distribution with n - 1 degrees of freedom,
    of which |t| > 3 is 2.0 % at n = 8, not the 0.27 % of a normal variable.

    Args:
        t: Mean over standard error.
        items: Number n of differences; a single one has no error and proves nothing.
    """
    if items < 2 or t == 0:
        return 0.0
    log_tail = _log_student_tail(abs(t), items - 1)
    if log_tail > -700:
        z = -_NORMAL.inv_cdf(math.exp(log_tail))
    else:  # below what a float can hold: the tail is exp(-z²/2) / (z √2π), nearly
        z = math.sqrt(-2 * log_tail)
        for _ in range(4):
            z = math.sqrt(-2 * (log_tail + math.log(z * math.sqrt(2 * math.pi))))
    return math.copysign(z, t)


def _log_student_tail(t: float, freedom: int) -> float:
    """Return log P(T > t) of Student's distribution for t > 0: half the regularised incomplete beta function

    I_x(a, b) at x = ν / (ν + t²), a = ν / 2, b = 1 / 2 (NIST Digital Library of Mathematical Functions, 8.17).
    """
    a, b, x, y = freedom / 2, 0.5, freedom / (freedom + t * t), t * t / (freedom + t * t)
    log_y = 2 * math.log(t) - math.log(freedom + t * t)  # y itself may be too small for a float
    log_power = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * log_y
    if x < (a + 1) / (a + b + 2):
        return log_power + math.log(_beta_fraction(a, b, x) / (2 * a))
    return math.log1p(-math.exp(log_power) * _beta_fraction(b, a, y) / b) - math.log(2)


def _beta_fraction(a: float, b: float, x: float) -> float:
    """Return the continued fraction 1 / (1 + d₁ / (1 + d₂ / ...)) of I_x(a, b) (8.17.22), for x below (a+1)/(a+b+2)."""
    value = 1.0
    for m in range(50 + int(5 * math.sqrt(max(a, b))), 0, -1):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m - 1) * (a + b + m - 1) * x / ((a + 2 * m - 2) * (a + 2 * m - 1))
        value = 1 + odd / (1 + even / value)
    return 1 / value


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
