"""Router rows by gradient descent: the language-modelling loss of the MoE on all experts' texts, and a balanced load.

Only the rows are trained, everything else is frozen. Shape suffixes: L layers, E experts, H hidden size, B sequences,
T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from aidocks.moe.examples import pad
from aidocks.moe.routing import balance_loss, linear_router, routed_by

_BETAS = (0.9, 0.95)
_EPSILON = 1e-12


@dataclass
class State:
    """Rows and what Adam knows of them, each float32 [L, E, H].

    Attributes:
        step: Steps taken so far.
    """

    gates: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    step: int


@dataclass(frozen=True)
class Schedule:
    """How large steps are.

    Attributes:
        rate: Largest step of a weight, relative to the root mean square of its layer's rows.
        steps: Of the whole training; the rate falls to zero along half a cosine.
        balance: Weight of the load-balancing loss.
    """

    rate: float
    steps: int
    balance: float


def train(
    network: Any,
    state: State,
    domains: Sequence[Sequence[torch.Tensor]],
    count: int,
    schedule: Schedule,
    seed: int,
) -> tuple[list[float], int]:
    """Take ``count`` steps, each on one sequence of every domain; ``state`` changes.

    Args:
        network: An MoE of transformers; its parameters get no gradient.
        state: Where to start.
        domains: Sequences of every domain, each [T].
        count: Steps to take.
        schedule: Of the whole training.
        seed: Chooses the sequences.

    Returns:
        Language-modelling loss of each step (nats per token, mean over domains), and the tokens learned from.
    """
    network.requires_grad_(False)
    losses, tokens = [], 0
    for batch in _draw(domains, count, seed):
        ids_BT, mask_BT = pad(batch, network.device)
        gates = state.gates.to(network.device).detach().requires_grad_(True)
        loss, balance = language_loss(network, gates, ids_BT, mask_BT)
        objective = loss.mean() + schedule.balance * balance.mean()
        (gradient_LEH,) = torch.autograd.grad(objective, gates)
        _step(state, gradient_LEH.cpu(), schedule)
        losses.append(float(loss.detach().mean()))
        tokens += int(mask_BT.sum())
    return losses, tokens


def language_loss(
    network: Any, gates_LEH: torch.Tensor, ids_BT: torch.Tensor, mask_BT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean loss of each sequence in nats per token [B], and each layer's load-balancing loss [L]."""
    logits: list[torch.Tensor] = []
    with routed_by(network, linear_router(gates_LEH, logits)):
        output = network(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
    real = mask_BT.flatten().bool()
    chosen = network.config.num_experts_per_tok
    balance = torch.stack([balance_loss(layer[real], chosen) for layer in logits])
    losses_BT = functional.cross_entropy(
        output.logits[:, :-1].float().transpose(1, 2), ids_BT[:, 1:], reduction="none"
    )
    predicted_BT = mask_BT[:, 1:]
    return (losses_BT * predicted_BT).sum(1) / predicted_BT.sum(1), balance


@torch.inference_mode()
def validate(
    network: Any, gates_LEH: torch.Tensor, domains: Sequence[Sequence[torch.Tensor]]
) -> tuple[list[float], list[float]]:
    """Return each domain's loss in nats per token, and each layer's load-balancing loss on the domains together."""
    gates_LEH = gates_LEH.to(network.device)
    losses, tokens = [0.0] * len(domains), [0] * len(domains)
    balances = []
    for turn in range(max(map(len, domains))):
        members = [number for number, sequences in enumerate(domains) if turn < len(sequences)]
        ids_BT, mask_BT = pad([domains[number][turn] for number in members], network.device)
        loss_B, balance_L = language_loss(network, gates_LEH, ids_BT, mask_BT)
        predicted_B = (mask_BT.sum(1) - 1).tolist()
        for number, loss, predicted in zip(members, loss_B.tolist(), predicted_B, strict=True):
            losses[number] += loss * predicted
            tokens[number] += predicted
        if len(members) == len(domains):
            balances.append(balance_L.cpu())
    means = [loss / predicted for loss, predicted in zip(losses, tokens, strict=True)]
    return means, torch.stack(balances).mean(0).tolist()


@torch.inference_mode()
def sequence_losses(network: Any, sequences: Sequence[torch.Tensor]) -> float:
    """Return the loss of any causal language model over sequences, each [T], in nats per token."""
    total, predicted = 0.0, 0
    for ids_T in sequences:
        ids_T = ids_T.to(network.device)
        logits_TV = network(input_ids=ids_T[None], use_cache=False).logits[0]
        total += float(functional.cross_entropy(logits_TV[:-1].float(), ids_T[1:], reduction="sum"))
        predicted += len(ids_T) - 1
    return total / predicted


def _draw(domains: Sequence[Sequence[torch.Tensor]], count: int, seed: int) -> Iterator[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield [
            sequences[int(torch.randint(len(sequences), (1,), generator=generator))] for sequences in domains
        ]


def _step(state: State, gradient_LEH: torch.Tensor, schedule: Schedule) -> None:
    """One step of Adam (Kingma and Ba, arXiv:1412.6980, algorithm 1) with a rate for every layer."""
    state.step += 1
    for moment, beta, value in (
        (state.first, _BETAS[0], gradient_LEH),
        (state.second, _BETAS[1], gradient_LEH.square()),
    ):
        moment.lerp_(value, 1 - beta)
    first = state.first / (1 - _BETAS[0] ** state.step)
    second = state.second / (1 - _BETAS[1] ** state.step)
    progress = (state.step - 1) / schedule.steps
    size_L11 = state.gates.square().mean((1, 2), keepdim=True).sqrt()
    rate_L11 = schedule.rate * 0.5 * (1 + math.cos(math.pi * progress)) * size_L11
    state.gates -= rate_L11 * first / (second.sqrt() + _EPSILON)
