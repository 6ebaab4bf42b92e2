"""The Mixtral form of an MoE: its configuration, the names of its tensors, and where each of them comes from.

Names on disk are those of Mixtral-8x7B (``block_sparse_moe.experts.N.w1``), which transformers, llama.cpp and
vLLM all read; transformers 5 fuses the experts only in memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from aidocks.checkpoints.writer import TensorPlan
from aidocks.moe.dense import DenseConfig, shared_shapes
from aidocks.specs.moe import DType

STORED: dict[DType, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

# The order of a layer in the file is the order in which it is used.
_EXPERT_KINDS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_EXPERT = re.compile(r"(model\.layers\.\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight")
#: Of the base's configuration, beside what DenseConfig holds.
_KEPT = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "initializer_range",
    "pad_token_id",
    "use_cache",
)


@dataclass(frozen=True)
class TensorSource:
    """Where a tensor of the result comes from.

    Attributes:
        model: ``base``, ``router``, or the position of an expert.
        name: Name of the tensor there.
    """

    model: Literal["base", "router"] | int
    name: str


def router_name(layer: int) -> str:
    """Return the name of a layer's router: [experts, hidden], one row per expert."""
    return f"model.layers.{layer}.block_sparse_moe.gate.weight"


def find_source(name: str) -> TensorSource:
    """Return where the tensor ``name`` of a Mixtral checkpoint comes from."""
    expert = _EXPERT.fullmatch(name)
    if expert:
        layer, number, kind = expert.groups()
        return TensorSource(model=int(number), name=f"{layer}.mlp.{_EXPERT_KINDS[kind]}.weight")
    return TensorSource(model="router" if ".block_sparse_moe.gate." in name else "base", name=name)


def plan_tensors(config: DenseConfig, num_experts: int, dtype: DType) -> tuple[TensorPlan, ...]:
    """Return all tensors of the result in file order."""
    shapes: dict[str, tuple[int, ...]] = {}
    wide, tall = (
        (config.intermediate_size, config.hidden_size),
        (config.hidden_size, config.intermediate_size),
    )
    for name, shape in shared_shapes(config).items():
        shapes[name] = shape
        prefix, _, last = name.partition(".post_attention_layernorm")
        if last:
            shapes[f"{prefix}.block_sparse_moe.gate.weight"] = (num_experts, config.hidden_size)
            for number in range(num_experts):
                for kind in _EXPERT_KINDS:
                    expert = f"{prefix}.block_sparse_moe.experts.{number}.{kind}.weight"
                    shapes[expert] = tall if kind == "w2" else wide
    return tuple(TensorPlan(name=name, dtype=STORED[dtype], shape=shape) for name, shape in shapes.items())


def mixtral_config(
    base: Mapping[str, Any], config: DenseConfig, num_experts: int, experts_per_token: int, dtype: DType
) -> dict[str, Any]:
    """Return ``config.json`` of the result.

    Args:
        base: The base's ``config.json``.
        config: What it means.
        num_experts: Experts of every layer.
        experts_per_token: How many of them serve a token.
        dtype: Type of the weights.
    """
    rope = dict(config.rope_parameters)
    # Both spellings: the first is that of transformers 5, the others are what everything else reads.
    rotary: dict[str, Any] = {"rope_parameters": rope, "rope_theta": rope["rope_theta"]}
    if rope["rope_type"] != "default":
        rotary["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        **{key: base[key] for key in _KEPT if key in base},
        **rotary,
        "architectures": ["MixtralForCausalLM"],
        "dtype": dtype,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "mixtral",
        "num_attention_heads": config.num_attention_heads,
        "num_experts_per_tok": experts_per_token,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "num_local_experts": num_experts,
        "output_router_logits": False,
        "rms_norm_eps": config.rms_norm_eps,
        "router_aux_loss_coef": 0.001,
        "sliding_window": config.sliding_window,
        "tie_word_embeddings": config.tie_word_embeddings,
        "vocab_size": config.vocab_size,
    }
