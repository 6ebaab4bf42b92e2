"""The distribution that a search draws from: CMA-ES in the unit cube.

N. Hansen and A. Ostermeier, Completely Derandomized Self-Adaptation in Evolution Strategies (Evolutionary Computation
9, 2001); constants as in N. Hansen, The CMA Evolution Strategy: A Tutorial (arXiv:1604.00772), by the library
``cmaes``. In one dimension the covariance matrix is a number beside the step size, and the method an evolution strategy
with cumulative step-size adaptation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

#: Stands for the cost of what has none; CMA-ES looks at the order alone.
WORST = 1e9

Shares = tuple[float, ...]


def default_size(variables: int) -> int:
    """Return the population that the tutorial recommends: 4 + 3 ln n (eq. 48)."""
    return 4 + math.floor(3 * math.log(variables))


class Population:
    """A normal distribution over [0, 1]^n that moves to where costs are low. Equal for equal seeds and costs.

    Args:
        mean: Where it begins.
        size: Candidates of a generation.
        step: Standard deviation in the beginning, as a share of the ranges.
        seed: Of the draws.
    """

    def __init__(self, mean: Sequence[float], *, size: int, step: float, seed: int) -> None:
        import numpy as np
        from cmaes import CMA

        bounds = np.array([[0.0, 1.0]] * len(mean))
        self._search = CMA(
            mean=np.array(mean, dtype=np.float64), sigma=step, bounds=bounds, population_size=size, seed=seed
        )
        self._drawn: list[Any] = []
        self._spread = step

    @property
    def size(self) -> int:
        return int(self._search.population_size)

    @property
    def mean(self) -> Shares:
        """Centre of the distribution, inside of the ranges."""
        return tuple(min(1.0, max(0.0, float(share))) for share in self._search.mean)

    @property
    def spread(self) -> float:
        """How far the candidates drawn last lie from where the centre then was, root mean square, as a share."""
        return self._spread

    @property
    def has_converged(self) -> bool:
        """Whether the library sees nothing more to find: steps or differences of cost have vanished."""
        return bool(self._search.should_stop())

    def draw(self) -> tuple[Shares, ...]:
        """Draw a generation."""
        self._drawn = [self._search.ask() for _ in range(self.size)]
        self._spread = math.sqrt(fmean(float(((one - self._search.mean) ** 2).mean()) for one in self._drawn))
        return tuple(tuple(float(share) for share in drawn) for drawn in self._drawn)

    def learn(self, costs: Sequence[float]) -> None:
        """Move the distribution by the costs of the generation drawn last, in its order; lower is better."""
        self._search.tell(list(zip(self._drawn, costs, strict=True)))
