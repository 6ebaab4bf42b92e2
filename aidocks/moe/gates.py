"""Router rows from prompts, without training.

``hidden`` and ``cheap_embed`` follow the definitions that mergekit's MoE script made known (and
https://goddard.blog/posts/clown-moe explains), so that prompts written for it mean the same here.

Shape suffixes: L layers, E experts, H hidden size, B prompts of one batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import torch

# Bounds the activations of a batch; prompts of one length share a batch, so none is padded.
_TOKENS_PER_BATCH = 2048


def random_gates(num_layers: int, num_experts: int, hidden_size: int, seed: int) -> torch.Tensor:
    """Return random directions of unit length, float64 [L, E, H]; the scale is that of the other modes."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_layers, num_experts, hidden_size)
    return _unit(torch.randn(shape, generator=generator, dtype=torch.float64))


def contrast(positive: Iterable[torch.Tensor], negative: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return mean(positive) - mean(negative), with rows of unit length.

    Args:
        positive: Vectors of the prompts that an expert is for, each [..., H].
        negative: Vectors of those that it is not for; may be empty.
    """
    row = torch.stack(list(positive)).double().mean(0)
    if negative:
        row = row - torch.stack(list(negative)).double().mean(0)
    return _unit(row)


def _unit(rows: torch.Tensor) -> torch.Tensor:
    lengths: torch.Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / lengths.clamp_min(torch.finfo(torch.float64).tiny)


def condition_numbers(gates_LEH: torch.Tensor) -> list[float | None]:
    """Return each layer's ratio of largest to smallest singular value; None where rows are dependent.

    Near 1 the rows point in different directions and the router can tell the experts apart.
    """
    values_LE = torch.linalg.svdvals(gates_LEH.double())
    tiny = torch.finfo(torch.float64).eps * max(gates_LEH.shape[1:])
    return [float(values[0] / values[-1]) if values[-1] > tiny * values[0] else None for values in values_LE]


def embed_prompts(
    prompts: Iterable[str], tokenizer: Any, embedding_VH: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return prompt -> sum of its token embeddings, float64 [H]; special tokens do not count."""
    return {
        prompt: embedding_VH[tokenizer(prompt, add_special_tokens=False)["input_ids"]].double().sum(0)
        for prompt in prompts
    }


def tokenize(prompts: Iterable[str], tokenizer: Any, longest: int) -> tuple[dict[str, list[int]], int]:
    """Tokenise prompts for :func:`hidden_states`.

    All begin with the tokenizer's BOS, also where the tokenizer would not add it: the first position of a
    sequence attracts attention whatever stands there, and a prompt of one word must not be that position.

    Args:
        prompts: Texts.
        tokenizer: A transformers tokenizer.
        longest: The model's context in tokens. Of longer prompts the end counts.

    Returns:
        Prompt -> token ids, and how many prompts were cut.
    """
    tokens: dict[str, list[int]] = {}
    cut = 0
    for prompt in prompts:
        ids: list[int] = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        room = longest - len(start)
        cut += len(ids) > room
        tokens[prompt] = [*start, *ids[max(0, len(ids) - room) :]]
    return tokens, cut


@torch.inference_mode()
def hidden_states(tokens: dict[str, list[int]], network: Any) -> dict[str, torch.Tensor]:
    """Return prompt -> residual stream that enters each layer at the prompt's last token, float64 [L, H].

    The result of a prompt depends on the set of prompts at most (rounding in batches), not on their order.

    Args:
        tokens: Prompt -> token ids, none empty.
        network: A causal language model of transformers whose layers are ``network.model.layers``.
    """
    by_length: dict[int, list[str]] = {}
    for prompt in sorted(tokens):
        by_length.setdefault(len(tokens[prompt]), []).append(prompt)
    states: dict[str, torch.Tensor] = {}
    for length, prompts in sorted(by_length.items()):
        size = max(1, _TOKENS_PER_BATCH // length)
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            ids_BT = torch.tensor([tokens[prompt] for prompt in batch], device=network.device)
            with _layer_inputs(network) as inputs:
                network.model(input_ids=ids_BT, use_cache=False)
            for prompt, state_LH in zip(batch, torch.stack(inputs, dim=1), strict=True):
                states[prompt] = state_LH
    return states


@contextmanager
def _layer_inputs(network: Any) -> Any:
    """Collect the last position of what enters each layer, [B, H] per layer; nothing else of it is kept."""
    collected: list[torch.Tensor] = []

    def take(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering_BTH = args[0] if args else kwargs["hidden_states"]
        collected.append(entering_BTH[:, -1].double().cpu())

    handles = [layer.register_forward_pre_hook(take, with_kwargs=True) for layer in network.model.layers]
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()
