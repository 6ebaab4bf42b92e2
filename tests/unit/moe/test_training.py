"""Training of the router rows: what is trained, what is not, and that it is Adam."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.nn import functional

from aidocks.moe import training
from aidocks.moe.examples import pad
from aidocks.moe.routing import balance_loss, linear_router, routed_by
from aidocks.moe.training import Schedule, State, language_loss, sequence_losses, train, validate
from tests.support.routing import small_moe

EXPERTS, LAYERS, HIDDEN = 3, 2, 32
STEADY = Schedule(rate=0.05, steps=1_000_000, balance=0.0)


@pytest.fixture
def network() -> Any:
    """A network whose experts differ much, so that it matters which of them serves a token."""
    return small_moe(
        vocab_size=64,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_local_experts=EXPERTS,
        initializer_range=0.3,
    )


def make_domains(count: int = 4, length: int = 16) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        [torch.randint(20 * d, 20 * d + 20, (length,), generator=generator) for _ in range(count)]
        for d in range(EXPERTS)
    ]


def begin(seed: int = 2) -> State:
    gates = torch.randn(LAYERS, EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(seed)) / 4
    return State(gates, torch.zeros_like(gates), torch.zeros_like(gates), 0)


def mean_loss(network: Any, gates: torch.Tensor, domains: Sequence[Sequence[torch.Tensor]]) -> float:
    losses, _ = validate(network, gates, domains)
    return sum(losses) / len(losses)


def test_the_loss_falls(network: Any) -> None:
    domains, state = make_domains(), begin()
    before = mean_loss(network, state.gates, domains)
    losses, tokens = train(network, state, domains, 40, Schedule(0.05, 40, 0.0), seed=0)
    assert (len(losses), state.step) == (40, 40)
    assert tokens == 40 * EXPERTS * 16
    assert mean_loss(network, state.gates, domains) < before - 0.05


def test_a_training_can_be_repeated_bit_for_bit(network: Any) -> None:
    domains, one, other, differently_drawn = make_domains(), begin(), begin(), begin()
    losses = train(network, one, domains, 5, STEADY, seed=0)
    assert train(network, other, domains, 5, STEADY, seed=0) == losses
    assert torch.equal(one.gates, other.gates)
    assert train(network, differently_drawn, domains, 5, STEADY, seed=1) != losses


def test_only_the_rows_change(network: Any) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    ids = make_domains()[0][0][None]
    with torch.inference_mode():
        answer = network(input_ids=ids).logits
    state = begin()
    start = state.gates.clone()
    train(network, state, make_domains(), 3, STEADY, seed=0)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert state.gates.grad is None
    assert not state.gates.requires_grad
    with torch.inference_mode():
        assert torch.equal(network(input_ids=ids).logits, answer)
    for layer in range(LAYERS):
        assert not torch.equal(state.gates[layer], start[layer])


def test_the_gradient_reaches_all_layers_through_the_chosen_experts_weights(network: Any) -> None:
    gates = begin().gates.requires_grad_(True)
    network.requires_grad_(False)
    ids, mask = pad([domain[0] for domain in make_domains()], network.device)
    loss, balance = language_loss(network, gates, ids, mask)
    assert (loss.shape, balance.shape) == ((EXPERTS,), (LAYERS,))
    (gradient,) = torch.autograd.grad(loss.mean(), gates)
    assert bool((gradient.abs().amax((1, 2)) > 0).all())
    # Along one direction, against a difference quotient: small enough that no token changes its experts.
    direction, size = torch.randn(gates.shape, generator=torch.Generator().manual_seed(8)), 1e-3
    with torch.no_grad():
        above, below = (
            language_loss(network, gates + sign * size * direction, ids, mask)[0].mean() for sign in (1, -1)
        )
    assert float((gradient * direction).sum()) == pytest.approx(float((above - below) / (2 * size)), rel=0.1)


def test_steps_are_adam_s(network: Any) -> None:
    domains = [domain[:1] for domain in make_domains()]
    state = begin()
    # One parameter group a layer, whose rate is relative to the size of its rows.
    layers = [state.gates[layer].clone().requires_grad_(True) for layer in range(LAYERS)]
    groups = [{"params": [rows], "lr": 0.0} for rows in layers]
    adam = torch.optim.Adam(groups, betas=training._BETAS, eps=training._EPSILON)
    schedule = Schedule(rate=0.02, steps=6, balance=0.1)
    ids, mask = pad([domain[0] for domain in domains], network.device)
    factors = [1.0, 0.9330, 0.75, 0.5, 0.25, 0.0670]  # half a cosine
    for step in range(6):
        loss, balance = language_loss(network, torch.stack(layers), ids, mask)
        adam.zero_grad()
        (loss.mean() + 0.1 * balance.mean()).backward(inputs=layers)
        for group, rows in zip(adam.param_groups, layers, strict=True):
            group["lr"] = 0.02 * factors[step] * float(rows.detach().square().mean().sqrt())
        adam.step()
        train(network, state, domains, 1, schedule, seed=step)
        assert torch.allclose(state.gates, torch.stack(layers).detach(), rtol=1e-3, atol=1e-5)
    assert state.step == 6


def test_the_balance_loss_evens_the_load(network: Any) -> None:
    domains = make_domains()
    biased = begin()
    biased.gates[:, 0] *= 8
    even, uneven = (State(biased.gates.clone(), biased.first.clone(), biased.second.clone(), 0) for _ in "12")
    train(network, even, domains, 30, Schedule(0.05, 30, 10.0), seed=0)
    train(network, uneven, domains, 30, Schedule(0.05, 30, 0.0), seed=0)
    of_even, of_uneven = (sum(validate(network, state.gates, domains)[1]) for state in (even, uneven))
    assert of_even < of_uneven


def test_validation_is_the_loss_per_token_of_each_domain(network: Any) -> None:
    gates = begin().gates
    generator = torch.Generator().manual_seed(4)
    lengths = [[9, 16, 5], [7], [12, 4]]
    domains = [[torch.randint(0, 64, (n,), generator=generator) for n in part] for part in lengths]
    losses, balance = validate(network, gates, domains)
    seen: list[torch.Tensor] = []
    with routed_by(network, linear_router(gates)), torch.inference_mode():
        wanted = []
        for sequences in domains:
            total = sum(
                float(
                    functional.cross_entropy(
                        network(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="sum"
                    )
                )
                for ids in sequences
            )
            wanted.append(total / sum(len(ids) - 1 for ids in sequences))
        assert [sequence_losses(network, domain) for domain in domains] == pytest.approx(wanted, rel=1e-4)
    assert losses == pytest.approx(wanted, rel=1e-4)
    with routed_by(network, linear_router(gates, seen)), torch.inference_mode():
        for sequences in domains:
            network(input_ids=sequences[0][None])
    # All domains together, in the one turn in which each of them has a sequence.
    by_layer = [torch.cat(seen[layer::LAYERS]) for layer in range(LAYERS)]
    assert balance == pytest.approx([float(balance_loss(layer, 2)) for layer in by_layer], rel=1e-4)


def test_a_sequence_is_the_same_beside_longer_ones(network: Any) -> None:
    gates = begin().gates
    short, long = make_domains(1, 6)[0][0], make_domains(1, 20)[1][0]
    with torch.no_grad():
        alone, _ = language_loss(network, gates, *pad([short], network.device))
        beside, _ = language_loss(network, gates, *pad([long, short], network.device))
    assert float(beside[1]) == pytest.approx(float(alone[0]), rel=1e-5)
