"""What of the models' differences from the base is kept: all, the largest, the middle, a random part.

Each function returns masks, block by block, for :mod:`aidocks.merge.task_vectors`. The methods that descend from task
arithmetic differ in little else.

Shapes: R rows and C columns of a block. Densities are shares of a tensor's values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from aidocks.errors import InvalidSpec
from aidocks.merge import order
from aidocks.merge.method import Parameter
from aidocks.merge.random import random_words

if TYPE_CHECKING:
    import torch

    from aidocks.merge.inputs import Block, Inputs

#: Which values of each model's delta a block keeps: bool [R, C], or one bool where it is the same for all.
Masks = Callable[["Block"], "list[torch.Tensor | bool]"]

#: The parameter of :func:`without_outliers`.
GAMMA = Parameter(
    "gamma",
    float,
    0.01,
    scope="model",
    at_least=0,
    at_most=1,
    description="Share of the largest values to leave out.",
)
#: The parameter of :func:`by_rank`.
EPSILON = Parameter(
    "epsilon",
    float,
    0.15,
    scope="model",
    at_least=0,
    at_most=1,
    description="How far the probabilities to keep go from density.",
)


def largest(inputs: Inputs, density: Sequence[float]) -> Masks:
    """Keep the largest magnitudes of each delta: a share of ``density``, and at least one value.

    Exactly max(1, int(density · n)) of n values are kept; of equal ones those that come first. With a density of 0 or
    below none is kept, with 1 or above all.
    """
    size = inputs.num_values
    counts = [[max(1, int(share * size))] if 0 < share < 1 and size else [] for share in density]
    cuts = order.first(inputs, lambda block: _keys(block, largest_first=True), counts)

    def masks(block: Block) -> list[torch.Tensor | bool]:
        return [
            cut[0].first(order.by_magnitude(delta, largest_first=True), block.number) if cut else share >= 1
            for delta, share, cut in zip(block.deltas, density, cuts, strict=True)
        ]

    return masks


def without_outliers(inputs: Inputs, density: Sequence[float], gamma: Sequence[float]) -> Masks:
    """Keep the middle magnitudes of each delta: without the largest share ``gamma``, and a share ``density`` in all.

    Of n values the largest int(gamma · n) are left out, then the smallest, so that int(density · n) are kept. Fewer
    of the largest are left out where that many could not be kept otherwise.
    """
    size = inputs.num_values
    bounds = []
    for share, top in zip(density, gamma, strict=True):
        kept = int(share * size)
        below = max(0, size - kept - int(top * size))
        bounds.append((below, min(below + kept, size)))
    # Nothing to look for where all values, or none, come first.
    wanted = [
        [count for count in bound if 0 < count < size] if share < 1 else []
        for bound, share in zip(bounds, density, strict=True)
    ]
    cuts = order.first(inputs, lambda block: _keys(block, largest_first=False), wanted)

    def mask(delta: torch.Tensor, number: int, model: int) -> torch.Tensor | bool:
        if density[model] >= 1:
            return True
        below, end = bounds[model]
        if below == end:
            return False
        keys = order.by_magnitude(delta, largest_first=False)
        found = [cut.first(keys, number) for cut in cuts[model]]
        if not found:
            return True
        if len(found) == 2:
            return found[1] & ~found[0]
        return ~found[0] if end == size else found[0]

    return lambda block: [mask(delta, block.number, model) for model, delta in enumerate(block.deltas)]


def at_random(inputs: Inputs, density: Sequence[float]) -> Masks:
    """Keep each value of each delta with the probability ``density``, whatever the others."""

    def masks(block: Block) -> list[torch.Tensor | bool]:
        return [
            random_words(inputs, block, model) < _below(share) if 0 < share < 1 else share >= 1
            for model, share in enumerate(density)
        ]

    return masks


def by_rank(inputs: Inputs, density: Sequence[float], epsilon: Sequence[float]) -> Masks:
    """Keep values at random, the larger the likelier.

    In each row the probability rises evenly with the rank of the magnitude, from density - epsilon at the smallest to
    density + epsilon at the largest. A vector is a single row, as is each vector along the last axis of a tensor of
    more than two. Of equal magnitudes the first has the lower rank. See :func:`require_probabilities`.
    """

    def mask(delta: torch.Tensor, block: Block, model: int) -> torch.Tensor | bool:
        share, spread = density[model], epsilon[model]
        if not 0 < share < 1:
            return share >= 1
        return _by_rank(delta, random_words(inputs, block, model), share, spread)

    return lambda block: [mask(delta, block, model) for model, delta in enumerate(block.deltas)]


def require_probabilities(density: Sequence[float], epsilon: Sequence[float], **_: Any) -> None:
    """Refuse values by which :func:`by_rank` would keep something with a probability that is none.

    Raises:
        InvalidSpec: Naming both.
    """
    for share, spread in zip(density, epsilon, strict=True):
        if 0 < share < 1 and not (share - spread > 0 and share + spread < 1):
            raise InvalidSpec(
                f"With a density of {share:g} and an epsilon of {spread:g} values would be kept with probabilities "
                f"from {share - spread:g} to {share + spread:g}.",
                field="parameters.epsilon",
                value=spread,
                hint=f"Choose an epsilon below {min(share, 1 - share):g}.",
            )


def remembered(masks: Masks) -> Masks:
    """Return masks that are made once for every block, and kept: of each value one bit."""
    import numpy as np
    import torch

    known: dict[int, list[bool | tuple[np.ndarray, torch.Size]]] = {}

    def recalled(block: Block) -> list[torch.Tensor | bool]:
        if block.number not in known:
            made = masks(block)
            known[block.number] = [
                (np.packbits(mask.cpu().numpy()), mask.shape) if isinstance(mask, torch.Tensor) else mask
                for mask in made
            ]
            return made
        return [
            torch.from_numpy(np.unpackbits(mask[0], count=mask[1].numel()).view(bool))
            .reshape(mask[1])
            .to(block.values[0].device)
            if isinstance(mask, tuple)
            else mask
            for mask in known[block.number]
        ]

    return recalled


def _by_rank(delta: torch.Tensor, words: torch.Tensor, density: float, epsilon: float) -> torch.Tensor:
    import torch

    columns = delta.shape[-1]
    # A single value is the largest and the smallest of its row.
    rise = torch.linspace(-epsilon, epsilon, columns, dtype=torch.float64) if columns > 1 else torch.zeros(1)
    # What _below returns, for all ranks; density +- epsilon lies between 0 and 1.
    limits = ((density + rise) * 2**32).round_().sub_(2**31).clamp_max_(2**31 - 1).to(torch.int32)
    places = _places_by_magnitude(delta)
    # The numbers are drawn for ranks, not for positions: a row of limits serves all rows.
    return torch.empty_like(words, dtype=torch.bool).scatter_(1, places, words < limits.to(words.device))


def _places_by_magnitude(delta: torch.Tensor) -> torch.Tensor:
    """Return for each row the positions of its values from the smallest magnitude to the largest: int64 [R, C]."""
    import numpy as np
    import torch

    if delta.dtype != torch.float32 or delta.device.type != "cpu":
        return torch.argsort(delta.abs(), dim=1, stable=True)
    # Magnitude and position in one integer: to sort them is much faster than to find the order of magnitudes.
    packed = delta.abs().view(torch.int32).to(torch.int64).bitwise_left_shift_(32)
    packed |= torch.arange(delta.shape[1])
    packed.numpy().sort(axis=1)
    return packed.bitwise_and_(np.iinfo(np.uint32).max)


def _keys(block: Block, *, largest_first: bool) -> list[torch.Tensor]:
    return [order.by_magnitude(delta, largest_first=largest_first) for delta in block.deltas]


def _below(probability: float) -> int:
    """Return the limit below which a random int32 lies with a probability."""
    return min(round(probability * 2**32), 2**32 - 1) - 2**31
