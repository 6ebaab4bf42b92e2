"""The forms that an MoE can have on disk: names of tensors, and what a form has a place for.

A form is one model class of transformers. Its names on disk are those of the published models of that class
(``block_sparse_moe.experts.N.w1``, ``mlp.experts.N.gate_proj``), which transformers, llama.cpp and vLLM all read;
transformers 5 fuses the experts only in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aidocks.moe.dense import DenseConfig
from aidocks.specs.moe import DType

#: Of the base's configuration, beside what DenseConfig holds.
_KEPT = ("attention_dropout", "initializer_range", "use_cache")


@dataclass(frozen=True)
class Sizes:
    """What a form's configuration says beside what the dense model's does.

    Attributes:
        shared_width: Width of the shared expert; 0 where the form has none.
    """

    num_experts: int
    experts_per_token: int
    shared_width: int = 0


@dataclass(frozen=True)
class Form:
    """One form of an MoE.

    Attributes:
        architecture: ``model_type`` in config.json.
        class_name: Class of transformers.
        block: Name of the MoE block within a layer.
        kinds: What an expert's matrices are called -> what they are called in a Llama; in the order of use.
        has_shared: Whether there is a shared expert beside the routed ones.
        biases: Projections of attention that may have biases: all of these or none.
        mixed_windows: Whether only some layers may have the sliding window.
        settings: Returns the part of config.json that is the form's own.
    """

    architecture: str
    class_name: str
    block: str
    kinds: Mapping[str, str]
    has_shared: bool
    biases: tuple[str, ...]
    mixed_windows: bool
    settings: Callable[[DenseConfig, Sizes], dict[str, Any]]

    def router_name(self, layer: int) -> str:
        """Return the name of a layer's router: [experts, hidden], one row per expert."""
        return f"model.layers.{layer}.{self.block}.gate.weight"

    def shared_gate_name(self, layer: int) -> str | None:
        """Return the name of the row [1, hidden] whose sigmoid weighs the shared expert; None without one."""
        return f"model.layers.{layer}.{self.block}.shared_expert_gate.weight" if self.has_shared else None

    def expert_name(self, layer: int, number: int, kind: str) -> str:
        """Return the name of one matrix of a routed expert."""
        return f"model.layers.{layer}.{self.block}.experts.{number}.{kind}.weight"

    def shared_name(self, layer: int, kind: str) -> str:
        """Return the name of one matrix of the shared expert."""
        return f"model.layers.{layer}.{self.block}.shared_expert.{kind}.weight"

    def config(
        self, base: Mapping[str, Any], dense: DenseConfig, sizes: Sizes, dtype: DType
    ) -> dict[str, Any]:
        """Return config.json, without the ids of special tokens and the size of the vocabulary.

        Args:
            base: The base's config.json.
            dense: What it means.
            sizes: Of the MoE.
            dtype: Type of the weights.
        """
        rope = dict(dense.rope_parameters)
        # Both spellings: the first is that of transformers 5, the others are what everything else reads.
        rotary: dict[str, Any] = {"rope_parameters": rope, "rope_theta": rope["rope_theta"]}
        if rope["rope_type"] != "default":
            rotary["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
        return {
            **{key: base[key] for key in _KEPT if key in base},
            **rotary,
            "architectures": [self.class_name],
            "dtype": dtype,
            "head_dim": dense.head_dim,
            "hidden_act": dense.hidden_act,
            "hidden_size": dense.hidden_size,
            "intermediate_size": dense.intermediate_size,
            "max_position_embeddings": dense.max_position_embeddings,
            "model_type": self.architecture,
            "num_attention_heads": dense.num_attention_heads,
            "num_experts_per_tok": sizes.experts_per_token,
            "num_hidden_layers": dense.num_hidden_layers,
            "num_key_value_heads": dense.num_key_value_heads,
            "output_router_logits": False,
            "rms_norm_eps": dense.rms_norm_eps,
            "tie_word_embeddings": dense.tie_word_embeddings,
            **self.settings(dense, sizes),
        }
