"""The forms of Qwen's MoEs: Qwen2-MoE, with a gated shared expert, and Qwen3-MoE, with norms of queries and keys."""

from __future__ import annotations

from typing import Any

from aidocks.moe.dense import DenseConfig
from aidocks.moe.forms import Form, Sizes

_KINDS = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}


def _settings(dense: DenseConfig, sizes: Sizes) -> dict[str, Any]:
    return {
        # Every layer is an MoE, in the class's own words.
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": dense.intermediate_size,
        # The published models leave the weights of the chosen experts as they are; then copies of one expert
        # would not be that expert.
        "norm_topk_prob": True,
        "num_experts": sizes.num_experts,
        "sliding_window": dense.sliding_window,
        "use_sliding_window": dense.sliding_window is not None,
    }


def _qwen2_settings(dense: DenseConfig, sizes: Sizes) -> dict[str, Any]:
    kinds = ["sliding_attention" if windowed else "full_attention" for windowed in dense.windowed]
    return _settings(dense, sizes) | {
        "layer_types": kinds,
        "qkv_bias": bool(dense.biases),
        "shared_expert_intermediate_size": sizes.shared_width,
    }


def _qwen3_settings(dense: DenseConfig, sizes: Sizes) -> dict[str, Any]:
    return _settings(dense, sizes) | {"attention_bias": bool(dense.biases)}


QWEN2_MOE = Form(
    architecture="qwen2_moe",
    class_name="Qwen2MoeForCausalLM",
    block="mlp",
    kinds=_KINDS,
    has_shared=True,
    biases=("q_proj", "k_proj", "v_proj"),
    mixed_windows=True,
    settings=_qwen2_settings,
)
QWEN3_MOE = Form(
    architecture="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
    block="mlp",
    kinds=_KINDS,
    has_shared=False,
    biases=("q_proj", "k_proj", "v_proj", "o_proj"),
    mixed_windows=False,
    settings=_qwen3_settings,
)
