"""Routing with other rows than a network was loaded with: the same choice as transformers', and nothing stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from aidocks.moe.routing import balance_loss, choose_experts, linear_router, routed_by

EXPERTS, LAYERS, HIDDEN = 4, 3, 32
IDS = (torch.arange(3, 3 + 2 * 24).view(2, 24) * 7) % 128

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS},
    "qwen2_moe": {
        "num_experts": EXPERTS,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 48,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
    },
    "qwen3_moe": {
        "num_experts": EXPERTS,
        "moe_intermediate_size": 48,
        "head_dim": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
    },
}


@st.composite
def routings(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """Logits [tokens, experts] of which no two of a token are equal, and experts per token."""
    tokens, experts = draw(st.integers(1, 12)), draw(st.integers(2, 8))
    noise = draw(arrays(np.float64, (tokens, experts), elements=st.floats(-0.4, 0.4)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    order = generator.permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)
    return torch.from_numpy(noise + order), draw(st.integers(1, experts))


@given(routings())
@settings(max_examples=60, deadline=None)
def test_the_weights_of_a_token_s_experts_sum_to_one(routing: tuple[torch.Tensor, int]) -> None:
    logits, per_token = routing
    weights, chosen = choose_experts(logits, per_token)
    assert weights.shape == chosen.shape == (len(logits), per_token)
    assert torch.allclose(weights.sum(1), torch.ones(len(logits), dtype=weights.dtype))
    assert bool((weights > 0).all())
    assert all(len(set(row)) == per_token for row in chosen.tolist())
    worst_chosen = logits.gather(1, chosen).min(1).values
    others = logits.scatter(1, chosen, -torch.inf).max(1).values
    assert bool((worst_chosen >= others).all())


@given(routings(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_experts_in_another_order_are_chosen_as_before(
    routing: tuple[torch.Tensor, int], random: Any
) -> None:
    logits, per_token = routing
    order = list(range(logits.shape[1]))
    random.shuffle(order)
    weights, chosen = choose_experts(logits, per_token)
    permuted_weights, permuted = choose_experts(logits[:, order], per_token)
    assert torch.equal(torch.tensor(order)[permuted], chosen)
    assert torch.allclose(permuted_weights, weights)
    assert torch.allclose(balance_loss(logits[:, order], per_token), balance_loss(logits, per_token))


@given(routings())
@settings(max_examples=60, deadline=None)
def test_the_balance_loss_is_that_of_transformers(routing: tuple[torch.Tensor, int]) -> None:
    logits, per_token = routing
    logits = logits.float()
    theirs = load_balancing_loss_func((logits,), logits.shape[1], per_token)
    assert float(balance_loss(logits, per_token)) == pytest.approx(float(theirs), rel=1e-5)


@pytest.mark.parametrize("per_token", [1, 2, 4])
def test_an_even_load_costs_as_much_as_experts_per_token(per_token: int) -> None:
    # Every rotation of one token's logits: each expert is at each place equally often.
    logits = torch.stack([torch.tensor([3.0, 2.0, 1.0, 0.0]).roll(shift) for shift in range(EXPERTS)])
    assert float(balance_loss(logits, per_token)) == pytest.approx(per_token)
    one_sided = logits[:1].expand(EXPERTS, -1)
    even = per_token == EXPERTS
    assert float(balance_loss(one_sided, per_token)) >= per_token - 1e-5
    assert even or float(balance_loss(one_sided, per_token)) > per_token + 0.1


def test_the_balance_loss_has_a_gradient_that_evens_the_load() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]] * 5, requires_grad=True)
    balance_loss(logits, 1).backward()
    assert logits.grad is not None
    assert bool((logits.grad[:, 0] > 0).all())
    assert bool((logits.grad[:, 1:] < 0).all())


@pytest.fixture(scope="module")
def networks() -> Callable[[str, int], Any]:
    def make(architecture: str, per_token: int) -> Any:
        config = AutoConfig.for_model(
            architecture,
            vocab_size=128,
            hidden_size=HIDDEN,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            num_experts_per_tok=per_token,
            **ARCHITECTURES[architecture],
        )
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for layer in network.model.layers:
                layer.mlp.gate.weight.normal_(0, 0.5)
        return network

    return make


def logits_of(network: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = network(input_ids=IDS, use_cache=False).logits
    return logits


def rows_of(network: Any) -> torch.Tensor:
    return torch.stack([layer.mlp.gate.weight.detach().clone() for layer in network.model.layers])


@pytest.mark.parametrize("per_token", [1, 2, EXPERTS])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_network_s_own_rows_are_its_own_logits(architecture: str, per_token: int, networks: Any) -> None:
    network = networks(architecture, per_token)
    own = logits_of(network)
    seen: list[torch.Tensor] = []
    with routed_by(network, linear_router(rows_of(network), seen)):
        routed = logits_of(network)
    assert torch.equal(routed, own)
    assert [tuple(layer.shape) for layer in seen] == [(IDS.numel(), EXPERTS)] * LAYERS


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_other_rows_are_what_a_network_with_these_rows_computes(architecture: str, networks: Any) -> None:
    network = networks(architecture, 2)
    before = logits_of(network)
    rows = torch.randn(LAYERS, EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(5))
    with routed_by(network, linear_router(rows)):
        routed = logits_of(network)
    assert not torch.equal(routed, before)
    assert torch.equal(logits_of(network), before), "the router is the network's own again"
    with torch.no_grad():
        for layer, rows_EH in zip(network.model.layers, rows, strict=True):
            layer.mlp.gate.weight.copy_(rows_EH)
    assert torch.equal(logits_of(network), routed)


def test_the_network_s_own_router_comes_back_after_a_failure(networks: Any) -> None:
    network = networks("mixtral", 2)
    before = logits_of(network)

    def fail(layer: int, inputs: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), routed_by(network, fail):
        logits_of(network)
    assert torch.equal(logits_of(network), before)


def test_routers_compute_in_float32_in_a_bfloat16_network(networks: Any) -> None:
    network = networks("mixtral", 2).to(torch.bfloat16)
    kinds: list[tuple[torch.dtype, int]] = []

    def route(layer: int, inputs_NH: torch.Tensor) -> torch.Tensor:
        kinds.append((inputs_NH.dtype, layer))
        return inputs_NH[:, :EXPERTS]

    with routed_by(network, route):
        assert logits_of(network).dtype is torch.bfloat16
    assert kinds == [(torch.float32, layer) for layer in range(LAYERS)]
