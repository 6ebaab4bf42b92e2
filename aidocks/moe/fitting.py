"""Router rows in closed form: in every layer a ridge classifier of what the router sees to the expert whose text it is.

The router of a layer sees the normalised state after attention, so that is what is classified, not the state that
enters the layer. Targets are centred (one-hot less their mean): a Mixtral router has no bias, and the direction that
all states share must not decide. Every expert's texts count equally, however long they are. Layers are fitted one
after the other within a single pass, each on the states that the routers before it lead to.

Shape suffixes: L layers, E experts, H hidden size, N tokens (flattened), B sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from aidocks.moe.examples import pad
from aidocks.moe.routing import routed_by

#: Ridge penalty, relative to the mean of the Gram matrix' diagonal.
PENALTY = 0.1
#: Tokens whose products are summed at a time.
_BLOCK = 4096
#: Scale of the rows along the path on which later layers are fitted.
PATH_SCALE = 4.0


def ridge_rows(inputs_NH: torch.Tensor, shares_NE: torch.Tensor, penalty: float = PENALTY) -> torch.Tensor:
    """Return the rows [E, H], float64, of the ridge regression of centred expert shares on router inputs.

    Args:
        inputs_NH: What the router sees of each token.
        shares_NE: Whose text the token is of: rows that sum to 1.
        penalty: Relative to the mean of the Gram matrix' diagonal.
    """
    experts, hidden = shares_NE.shape[1], inputs_NH.shape[1]
    shares_NE = shares_NE.double()
    # A token's weight is such that every expert's texts weigh 1/E in all.
    weights_N = (shares_NE / shares_NE.sum(0).clamp_min(1.0)).sum(1) / experts
    gram = inputs_NH.new_zeros(hidden, hidden, dtype=torch.float64)
    moments = inputs_NH.new_zeros(hidden, experts, dtype=torch.float64)
    # In blocks, so that only a block of the inputs exists in float64.
    for begin in range(0, len(inputs_NH), _BLOCK):
        block = slice(begin, begin + _BLOCK)
        X, Y = inputs_NH[block].double(), shares_NE[block]
        weighted = (X * weights_N[block, None]).T
        gram += weighted @ X
        moments += weighted @ (Y - 1 / experts)
    gram.diagonal().add_(penalty * gram.diagonal().mean())
    rows_EH: torch.Tensor = torch.linalg.solve(gram, moments).T
    return rows_EH


@torch.inference_mode()
def fit_along_path(network: Any, sequences: Sequence[torch.Tensor], shares_BE: torch.Tensor) -> torch.Tensor:
    """Fit all routers in one pass over the sequences. Returns rows [L, E, H], float64 on the CPU.

    Args:
        network: An MoE of transformers, whose own router rows do not matter.
        sequences: Token ids, each [T].
        shares_BE: Whose text each sequence is: rows that sum to 1.
    """
    ids_BT, mask_BT = pad(sequences, network.device)
    real = mask_BT.flatten().bool()
    shares_NE = shares_BE.to(network.device).repeat_interleave(ids_BT.shape[1], dim=0)[real]
    fitted: list[torch.Tensor] = []

    def fit(layer: int, inputs_NH: torch.Tensor) -> torch.Tensor:
        rows_EH = ridge_rows(inputs_NH[real], shares_NE)
        fitted.append(rows_EH.cpu())
        return inputs_NH @ (PATH_SCALE * rows_EH).to(inputs_NH).T

    with routed_by(network, fit):
        network.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
    return torch.stack(fitted)
