"""The form of Mixtral: Mistral's attention, routed experts, nothing else."""

from __future__ import annotations

from typing import Any

from aidocks.moe.dense import DenseConfig
from aidocks.moe.forms import Form, Sizes


def _settings(dense: DenseConfig, sizes: Sizes) -> dict[str, Any]:
    return {"num_local_experts": sizes.num_experts, "sliding_window": dense.sliding_window}


MIXTRAL = Form(
    architecture="mixtral",
    class_name="MixtralForCausalLM",
    block="block_sparse_moe",
    kinds={"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"},
    has_shared=False,
    biases=(),
    mixed_windows=False,
    settings=_settings,
)
