"""Router rows in closed form, against the same regression written as least squares, and what follows from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aidocks.moe.fitting import PATH_SCALE, PENALTY, fit_along_path, ridge_rows
from aidocks.moe.routing import linear_router, routed_by
from tests.support.routing import small_moe

EXPERTS, LAYERS, HIDDEN = 3, 3, 32


def one_hot(counts: list[int]) -> torch.Tensor:
    """Shares [tokens, experts] of so many tokens of each expert."""
    return torch.cat(
        [torch.eye(len(counts))[number].expand(count, -1) for number, count in enumerate(counts)]
    )


def least_squares(inputs: np.ndarray, shares: np.ndarray, penalty: float) -> np.ndarray:
    """The same rows by way of an augmented least-squares problem (numpy only, no normal equations)."""
    experts = shares.shape[1]
    weight = (shares / np.maximum(shares.sum(0), 1)).sum(1) / experts
    ridge = penalty * np.mean(np.sum(weight[:, None] * inputs**2, axis=0))
    root = np.sqrt(weight)[:, None]
    stacked = np.vstack([root * inputs, np.sqrt(ridge) * np.eye(inputs.shape[1])])
    targets = np.vstack([root * (shares - 1 / experts), np.zeros((inputs.shape[1], experts))])
    solution: np.ndarray = np.linalg.lstsq(stacked, targets, rcond=None)[0].T
    return solution


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    experts, hidden = draw(st.integers(2, 5)), draw(st.integers(2, 12))
    counts = draw(st.lists(st.integers(1, 20), min_size=experts, max_size=experts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    return torch.randn(sum(counts), hidden, generator=generator), one_hot(counts)


@given(problems(), st.floats(1e-3, 10))
@settings(max_examples=50, deadline=None)
def test_the_rows_solve_the_regression(problem: tuple[torch.Tensor, torch.Tensor], penalty: float) -> None:
    inputs, shares = problem
    wanted = least_squares(inputs.double().numpy(), shares.double().numpy(), penalty)
    rows = ridge_rows(inputs, shares, penalty)
    assert rows.dtype == torch.float64
    np.testing.assert_allclose(rows.numpy(), wanted, rtol=1e-6, atol=1e-9)


@given(problems())
@settings(max_examples=50, deadline=None)
def test_rows_are_centred_over_experts(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    rows = ridge_rows(*problem)
    assert float(rows.sum(0).abs().max()) <= 1e-9 * max(1.0, float(rows.abs().max()))


@given(problems(), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_order_means_nothing_but_order(problem: tuple[torch.Tensor, torch.Tensor], random: Any) -> None:
    inputs, shares = problem
    rows = ridge_rows(inputs, shares)
    tokens, experts = list(range(len(inputs))), list(range(shares.shape[1]))
    random.shuffle(tokens)
    random.shuffle(experts)
    again = ridge_rows(inputs[tokens], shares[tokens][:, experts])
    assert torch.allclose(again, rows[experts], rtol=1e-8, atol=1e-10)


@given(problems(), st.floats(0.01, 100))
@settings(max_examples=30, deadline=None)
def test_logits_do_not_depend_on_the_size_of_the_states(
    problem: tuple[torch.Tensor, torch.Tensor], size: float
) -> None:
    inputs, shares = problem[0].double(), problem[1]
    larger = size * inputs
    logits = inputs @ ridge_rows(inputs, shares).T
    assert torch.allclose(logits, larger @ ridge_rows(larger, shares).T)


def test_every_expert_s_text_counts_equally_however_long() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(30, 8, generator=generator)
    rows = ridge_rows(inputs, one_hot([10, 10, 10]))
    # The first expert's tokens fifty times over: the same text, only longer.
    longer = torch.cat([inputs[:10].repeat(50, 1), inputs[10:]])
    assert torch.allclose(ridge_rows(longer, one_hot([500, 10, 10])), rows, rtol=1e-6)


def test_separable_texts_are_told_apart_although_they_share_a_direction() -> None:
    generator = torch.Generator().manual_seed(1)
    shares = one_hot([200, 50, 20])
    centres = torch.randn(EXPERTS, HIDDEN, generator=generator)
    common = 5 * torch.randn(HIDDEN, generator=generator)
    inputs = shares @ centres + common + 0.3 * torch.randn(len(shares), HIDDEN, generator=generator)
    logits = inputs.double() @ ridge_rows(inputs, shares).T
    assert float((logits.argmax(1) == shares.argmax(1)).double().mean()) > 0.99


def test_a_token_that_two_experts_share_counts_half_for_each() -> None:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(40, 8, generator=generator)
    shares = torch.tensor([[0.5, 0.5, 0.0]] * 20 + [[0.0, 0.0, 1.0]] * 20)
    rows = ridge_rows(inputs, shares)
    assert torch.allclose(rows[0], rows[1])
    assert not torch.allclose(rows[0], rows[2])


@pytest.fixture(scope="module")
def network() -> Any:
    return small_moe(
        vocab_size=128,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_local_experts=EXPERTS,
    )


def texts(lengths: list[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """One sequence of each length, of the experts in turn, each expert with tokens of its own."""
    generator = torch.Generator().manual_seed(3)
    owners = [number % EXPERTS for number in range(len(lengths))]
    sequences = [
        torch.randint(8 * owner, 8 * owner + 8, (length,), generator=generator)
        for owner, length in zip(owners, lengths, strict=True)
    ]
    return sequences, torch.eye(EXPERTS)[owners]


def test_each_layer_is_fitted_on_what_the_layers_before_lead_to(network: Any) -> None:
    sequences, shares = texts([24] * 9)
    fitted = fit_along_path(network, sequences, shares)
    assert fitted.shape == (LAYERS, EXPERTS, HIDDEN)
    assert (fitted.dtype, fitted.device.type) == (torch.float64, "cpu")
    inputs: list[torch.Tensor] = []
    along_path = linear_router((PATH_SCALE * fitted).float())

    def watch(layer: int, inputs_NH: torch.Tensor) -> torch.Tensor:
        inputs.append(inputs_NH)
        return along_path(layer, inputs_NH)

    with routed_by(network, watch), torch.inference_mode():
        network(input_ids=torch.stack(sequences), use_cache=False)
    wanted = torch.stack([ridge_rows(each, shares.repeat_interleave(24, 0), PENALTY) for each in inputs])
    assert torch.allclose(fitted, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))


def test_padding_counts_for_nothing(network: Any) -> None:
    sequences, shares = texts([20, 7, 13, 9, 16, 5])
    fitted = fit_along_path(network, sequences, shares)
    # The same states from one sequence at a time, where nothing is padded.
    inputs: list[torch.Tensor] = []
    along_path = linear_router((PATH_SCALE * fitted).float())

    def watch(layer: int, inputs_NH: torch.Tensor) -> torch.Tensor:
        inputs.append(inputs_NH)
        return along_path(layer, inputs_NH)

    for ids in sequences:
        with routed_by(network, watch), torch.inference_mode():
            network(input_ids=ids[None], use_cache=False)
    for layer in range(LAYERS):
        alone = torch.cat(inputs[layer::LAYERS])
        tokens = torch.cat([shares[i].expand(len(ids), -1) for i, ids in enumerate(sequences)])
        wanted = ridge_rows(alone, tokens)
        assert torch.allclose(fitted[layer], wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_sequences_may_come_in_any_order(network: Any) -> None:
    sequences, shares = texts([20, 7, 13, 9, 16, 5])
    order = [4, 0, 5, 2, 1, 3]
    one = fit_along_path(network, sequences, shares)
    other = fit_along_path(network, [sequences[i] for i in order], shares[order])
    assert torch.allclose(one, other, rtol=1e-3, atol=1e-5 * float(one.abs().max()))


def test_texts_are_routed_to_their_experts(network: Any) -> None:
    sequences, shares = texts([32] * 12)
    fitted = fit_along_path(network, sequences, shares).float()
    seen: list[torch.Tensor] = []
    with routed_by(network, linear_router(PATH_SCALE * fitted, seen)), torch.inference_mode():
        network(input_ids=torch.stack(sequences), use_cache=False)
    owners = shares.argmax(1).repeat_interleave(32)
    for layer in seen:
        assert float((layer.argmax(1) == owners).double().mean()) > 0.8
