"""What tests of routers share: example texts of three domains, and a small MoE of random weights."""

from __future__ import annotations

import random
from typing import Any

WORDS = ["licence copyright patent grant", "red green blue yellow", "seven eleven forty ninety"]


def records(number: int, count: int = 40) -> tuple[str, ...]:
    """Return example texts of one domain, each another."""
    generator = random.Random(number)
    words = WORDS[number].split()
    return tuple(" ".join(generator.choices([*words, str(i)], k=12)) for i in range(count))


def small_moe(**settings: Any) -> Any:
    """Return a Mixtral network of transformers, the same for the same settings."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        num_experts_per_tok=2,
        **settings,
    )
    return MixtralForCausalLM(config).eval()
