"""Router rows without training: from prompts, or at random.

``hidden``, ``hidden_avg`` and ``cheap_embed`` follow the definitions that mergekit's MoE script made known (and
https://goddard.blog/posts/clown-moe explains), so that prompts written for it mean the same here. ``random`` and
``uniform_random`` need neither prompts nor torch.

Shape suffixes: L layers, E experts, H hidden size, B prompts of one batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float64]

# Bounds the activations of a batch; prompts of one length share a batch, so none is padded.
_TOKENS_PER_BATCH = 2048


def random_gates(num_layers: int, num_rows: int, hidden_size: int, seed: int) -> Floats:
    """Return random directions of unit length, float64 [L, rows, H]; the scale is that of the prompt modes."""
    return unit(np.random.default_rng(seed).standard_normal((num_layers, num_rows, hidden_size)))


def uniform_gates(num_layers: int, num_rows: int, hidden_size: int, seed: int) -> Floats:
    """Return rows drawn evenly from +-1/sqrt(H), float64 [L, rows, H]: how linear layers are initialised."""
    bound = hidden_size**-0.5
    return np.random.default_rng(seed).uniform(-bound, bound, (num_layers, num_rows, hidden_size))


def contrast(positive: Iterable[Floats], negative: Sequence[Floats]) -> Floats:
    """Return mean(positive) - mean(negative), with rows of unit length.

    Args:
        positive: Vectors of the prompts that an expert is for, each [..., H].
        negative: Vectors of those that it is not for; may be empty.
    """
    row: Floats = np.stack(list(positive)).mean(0)
    return unit(row - np.stack(negative).mean(0) if negative else row)


def unit(rows: Floats) -> Floats:
    """Scale the last axis to length 1; a zero row stays zero."""
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    scaled: Floats = rows / np.maximum(lengths, np.finfo(np.float64).tiny)
    return scaled


def condition_numbers(gates_LEH: NDArray[Any]) -> list[float | None]:
    """Return each layer's ratio of largest to smallest singular value; None where rows are dependent.

    Near 1 the rows point in different directions and the router can tell the experts apart.
    """
    values_LE = np.linalg.svd(gates_LEH.astype(np.float64), compute_uv=False)
    tiny = np.finfo(np.float64).eps * max(gates_LEH.shape[1:])
    return [float(values[0] / values[-1]) if values[-1] > tiny * values[0] else None for values in values_LE]


def embed_prompts(prompts: Iterable[str], tokenizer: Any, embedding_VH: torch.Tensor) -> dict[str, Floats]:
    """Return prompt -> sum of its token embeddings, float64 [H]; special tokens do not count."""
    return {
        prompt: embedding_VH[tokenizer(prompt, add_special_tokens=False)["input_ids"]].double().sum(0).numpy()
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


def hidden_states(tokens: dict[str, list[int]], network: Any, *, over_all: bool = False) -> dict[str, Floats]:
    """Return prompt -> residual stream that enters each layer, float64 [L, H].

    The result of a prompt depends on the set of prompts at most (rounding in batches), not on their order.

    Args:
        tokens: Prompt -> token ids, none empty.
        network: A causal language model of transformers whose layers are ``network.model.layers``.
        over_all: Whether it is averaged over all tokens rather than taken at the last one.
    """
    import torch

    by_length: dict[int, list[str]] = {}
    for prompt in sorted(tokens):
        by_length.setdefault(len(tokens[prompt]), []).append(prompt)
    states: dict[str, Floats] = {}
    for length, prompts in sorted(by_length.items()):
        size = max(1, _TOKENS_PER_BATCH // length)
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            ids_BT = torch.tensor([tokens[prompt] for prompt in batch], device=network.device)
            with _layer_inputs(network, over_all) as inputs, torch.inference_mode():
                network.model(input_ids=ids_BT, use_cache=False)
            for prompt, state_LH in zip(batch, torch.stack(inputs, dim=1), strict=True):
                states[prompt] = state_LH.numpy()
    return states


@contextmanager
def _layer_inputs(network: Any, over_all: bool) -> Iterator[list[torch.Tensor]]:
    """Collect what enters each layer, [B, H] per layer; nothing else of it is kept."""
    collected: list[torch.Tensor] = []

    def take(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering_BTH = args[0] if args else kwargs["hidden_states"]
        taken_BH = entering_BTH.double().mean(1) if over_all else entering_BTH[:, -1].double()
        collected.append(taken_BH.cpu())

    handles = [layer.register_forward_pre_hook(take, with_kwargs=True) for layer in network.model.layers]
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()
