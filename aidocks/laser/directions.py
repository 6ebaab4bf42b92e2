"""The directions on which a gradient pass projects, read once for all units of a worker that ask about the same cuts.

Shapes: w_OI a matrix, N = min(O, I), u_ON its directions from the first that any cut touches, K cuts; dropped_NK the
share of each direction that a cut takes away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from aidocks.laser.rules import shrink_factors
from aidocks.laser.truncation import load_directions, load_values

if TYPE_CHECKING:
    from aidocks.laser.screening import ScreenCandidate

#: Bytes of directions that are kept, at most.
_ROOM = 1 << 30
#: What was read last for a network, as long as there is that network: the shares of the calibration data, and those of
#: the guards, are screened for the same candidates.
_READ: WeakKeyDictionary[Any, Directions] = WeakKeyDictionary()


def directions_of(network: Any, candidates: Sequence[ScreenCandidate]) -> Directions:
    """Return the directions of these candidates, with all of them that were read before for this network."""
    known = _READ.get(network)
    if known is None or known.candidates != tuple(candidates):
        known = _READ[network] = Directions(candidates)
    return known


class Directions:
    """Directions of candidates, read when they are first asked for.

    The first to be read stay, as many as there is room for: all are asked for in turn, so none is needed sooner than
    another.
    """

    def __init__(self, candidates: Sequence[ScreenCandidate]) -> None:
        self.candidates = tuple(candidates)
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._room = _ROOM

    def of(self, index: int, shape: tuple[int, ...], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return u_ON in type and on the device of ``like``, and dropped_NK in float32.

        Args:
            index: Of the candidate.
            shape: Of its matrix.
            like: What is projected; of one type and on one device for one network.
        """
        kept = self._kept.get(index)
        if kept is None:
            kept = _read(self.candidates[index], shape, like)
            size = sum(tensor.nbytes for tensor in kept)
            if size <= self._room:
                self._kept[index] = kept
                self._room -= size
        return kept


def _read(
    candidate: ScreenCandidate, shape: tuple[int, ...], like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    count = min(shape)
    dropped_NK = torch.ones(count, len(candidate.cuts))
    kept_N = (
        torch.from_numpy(shrink_factors(load_values(candidate.basis).numpy(), (shape[0], shape[1]))).float()
        if candidate.shrunken_ranks
        else torch.ones(count)
    )
    for place, (rank, shrink) in enumerate(candidate.cuts):
        dropped_NK[:rank, place] -= kept_N[:rank] if shrink else 1.0
    # Leading directions that every cut keeps change nothing.
    first = int(dropped_NK.any(1).float().argmax()) if bool(dropped_NK.any()) else count
    u_ON = load_directions(candidate.basis, first).to(like.device, like.dtype, copy=True)
    return u_ON, dropped_NK[first:].to(like.device, copy=True)
