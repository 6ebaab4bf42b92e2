"""Running an MoE with other router rows than those it was loaded with, in float32 whatever its type.

Shape suffixes: L layers, E experts, H hidden size, N tokens (flattened), K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional

#: Takes a layer's number and the router's input, float32 [N, H]; returns its logits [N, E].
Router = Callable[[int, torch.Tensor], torch.Tensor]


def choose_experts(logits_NE: torch.Tensor, experts_per_token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights and numbers of each token's experts, each [N, K]: softmax, the K largest, their sum made 1.

    Source: Jiang et al., "Mixtral of Experts", arXiv:2401.04088, section 2.1.
    """
    largest_NK, chosen_NK = torch.topk(torch.softmax(logits_NE, dim=-1), experts_per_token, dim=-1)
    return largest_NK / largest_NK.sum(-1, keepdim=True), chosen_NK


def balance_loss(logits_NE: torch.Tensor, experts_per_token: int) -> torch.Tensor:
    """Return the load-balancing loss of one layer: a scalar, ``experts_per_token`` when the load is even, more if not.

    Source: Fedus et al., "Switch Transformers", arXiv:2101.03961, equations 4 to 6, for several choices a token.
    """
    experts = logits_NE.shape[-1]
    probabilities_NE = torch.softmax(logits_NE, dim=-1)
    chosen_NK = torch.topk(probabilities_NE, experts_per_token, dim=-1).indices
    share_E = functional.one_hot(chosen_NK, experts).sum(1).to(probabilities_NE).mean(0)
    return experts * (share_E * probabilities_NE.mean(0)).sum()


@contextmanager
def routed_by(network: Any, router: Router) -> Iterator[None]:
    """Replace what the routers of a Mixtral, Qwen2-MoE or Qwen3-MoE network say, until the end of the block."""
    experts_per_token = network.config.num_experts_per_tok

    def replace(layer: int) -> Any:
        def answer(module: Any, args: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> Any:
            inputs_NH = args[0].reshape(-1, args[0].shape[-1])
            logits_NE = router(layer, inputs_NH.float())
            scores_NK, chosen_NK = choose_experts(logits_NE, experts_per_token)
            return logits_NE, scores_NK.to(output[1].dtype), chosen_NK

        return answer

    handles = [
        block.mlp.gate.register_forward_hook(replace(layer))
        for layer, block in enumerate(network.model.layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def linear_router(gates_LEH: torch.Tensor, logits: list[torch.Tensor] | None = None) -> Router:
    """Return the router with these rows, float32; every layer's logits are appended to ``logits``."""

    def route(layer: int, inputs_NH: torch.Tensor) -> torch.Tensor:
        answer = inputs_NH @ gates_LEH[layer].T
        if logits is not None:
            logits.append(answer)
        return answer

    return route
