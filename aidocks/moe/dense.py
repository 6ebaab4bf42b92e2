"""The dense models that an MoE is built from, and what their configurations mean.

Every default here is what transformers takes where a ``config.json`` is silent; the classes differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aidocks.errors import IncompatibleModels
from aidocks.models.rope import read_rotation
from aidocks.models.tokenizer_files import SPECIAL_TOKENS
from aidocks.specs.moe import DType

if TYPE_CHECKING:
    from aidocks.checkpoints.reader import Checkpoint

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131_072, "sliding_window": 4096, "num_key_value_heads": 8},
    "phi3": {
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "qwen2": {"max_position_embeddings": 32_768, "sliding_window": 4096, "num_key_value_heads": 32},
    "qwen3": {
        "max_position_embeddings": 32_768,
        "sliding_window": 4096,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
}
#: What a request may name, as people know it.
SUPPORTED = (
    f"Llama, Mistral, Phi-3, Qwen2 and Qwen3 models can be combined ({', '.join(map(repr, _CLASSES))})."
)
_DEFAULT_SPECIAL = {"llama": (1, 2, None), "mistral": (1, 2, None), "phi3": (1, 32_000, 32_000)}
# Said of the types that people try, by the beginning of their names; the first that fits counts.
_REFUSED = {
    "gemma": "Gemma scales its embeddings and adds 1 to the weights of its norms; no MoE form computes that",
    "mixtral": "it is an MoE already; base and experts must be dense",
    "qwen2_moe": "it is an MoE already; base and experts must be dense",
    "qwen3_moe": "it is an MoE already; base and experts must be dense",
    "phimoe": "it is an MoE already; base and experts must be dense",
    "phi": "only Phi-3 has the norms and the gated MLP that an MoE form computes",
}
# Rotations that transformers computes in the same way for a dense model and for its MoE form.
_ROTATIONS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
#: Those whose frequencies depend on the context that the model was first trained with.
_OF_ORIGINAL_CONTEXT = ("yarn", "longrope", "llama3")
_LAYER_TYPES = {"full_attention": False, "sliding_attention": True}


@dataclass(frozen=True)
class Member:
    """One model that a request names.

    Attributes:
        field: Spec field that names it, such as ``experts[1].source_model``.
        reference: What the field says.
    """

    field: str
    reference: str
    checkpoint: Checkpoint

    def refuse(self, message: str, hint: str | None = None) -> IncompatibleModels:
        return IncompatibleModels(message, field=self.field, value=self.reference, hint=hint)


@dataclass(frozen=True)
class DenseConfig:
    """The configuration of a dense model, defaults filled in. Field names are those of ``config.json``.

    Attributes:
        rope_parameters: The rotation in one form, whichever version of transformers wrote it.
        attention_bias: Whether all four projections of attention have biases.
        sliding_window: Tokens that a windowed layer attends to; None where no layer has a window.
        windowed: For every layer, whether it has the window.
        special_ids: Field -> number of the tokens that begin, end and fill up a text.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    hidden_act: str
    rope_parameters: Mapping[str, Any]
    attention_bias: bool
    mlp_bias: bool
    vocab_size: int = field(compare=False)
    sliding_window: int | None = field(compare=False)
    windowed: tuple[bool, ...] = field(compare=False)
    max_position_embeddings: int = field(compare=False)
    tie_word_embeddings: bool = field(compare=False)
    special_ids: Mapping[str, Any] = field(compare=False)

    @property
    def biases(self) -> tuple[str, ...]:
        """The projections of attention that have biases."""
        if self.model_type == "qwen2":
            return ("q_proj", "k_proj", "v_proj")
        return ("q_proj", "k_proj", "v_proj", "o_proj") if self.attention_bias else ()


#: In what an expert must equal the base, the most telling first.
COMPARED = tuple(name for name, f in DenseConfig.__dataclass_fields__.items() if f.compare)


def read_dense(member: Member) -> DenseConfig:
    """Return the meaning of a model's configuration.

    Raises:
        IncompatibleModels: For a model that cannot become part of an MoE, naming what is not right.
    """
    config = member.checkpoint.config
    model_type = config.get("model_type")
    name = f"The model {member.reference!r}"
    if model_type not in _CLASSES:
        reason = next((why for start, why in _REFUSED.items() if str(model_type).startswith(start)), None)
        raise member.refuse(
            f"{name} is of the type {model_type!r}{f': {reason}' if reason else ''}.", SUPPORTED
        )
    architectures = config.get("architectures") or [_CLASSES[model_type]]
    if architectures != [_CLASSES[model_type]]:
        raise member.refuse(
            f"{name} has the architecture {str(architectures)[:200]}, not {_CLASSES[model_type]}."
        )
    if config.get("quantization_config"):
        raise member.refuse(f"{name} is quantised.", "Give the model that it was made from.")
    full = {"rms_norm_eps": 1e-6, "sliding_window": None} | _DEFAULTS[model_type] | config
    if full.get("num_key_value_heads") is None:
        full["num_key_value_heads"] = full.get("num_attention_heads")
    try:
        return _build(member, full)
    except IncompatibleModels:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise member.refuse(f"{name} has a config.json that lacks a usable {error}.") from error


def _build(member: Member, full: Mapping[str, Any]) -> DenseConfig:
    model_type = full["model_type"]
    heads, hidden = int(full["num_attention_heads"]), int(full["hidden_size"])
    window, windowed = _windows(member, full)
    return DenseConfig(
        model_type=model_type,
        hidden_size=hidden,
        intermediate_size=int(full["intermediate_size"]),
        num_hidden_layers=int(full["num_hidden_layers"]),
        num_attention_heads=heads,
        num_key_value_heads=int(full["num_key_value_heads"]),
        head_dim=int(full.get("head_dim") or hidden // heads),
        rms_norm_eps=float(full["rms_norm_eps"]),
        hidden_act=str(full.get("hidden_act") or "silu"),
        rope_parameters=_rope(member, full),
        # The other classes have no such setting; their weights are what says.
        attention_bias=model_type in ("llama", "qwen3") and bool(full.get("attention_bias")),
        mlp_bias=model_type == "llama" and bool(full.get("mlp_bias")),
        vocab_size=int(full["vocab_size"]),
        sliding_window=window,
        windowed=windowed,
        max_position_embeddings=int(full["max_position_embeddings"]),
        tie_word_embeddings=bool(full.get("tie_word_embeddings")),
        special_ids={
            key: full.get(key, default)
            for key, default in zip(
                SPECIAL_TOKENS, _DEFAULT_SPECIAL.get(model_type, (None,) * 3), strict=True
            )
        },
    )


def _rope(member: Member, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return rotary parameters in one form, whichever version of transformers wrote them."""
    rotation = read_rotation(config)
    if any(isinstance(value, Mapping) for value in rotation.values()):
        raise member.refuse(
            f"The model {member.reference!r} rotates its layers in different ways (rope_parameters)."
        )
    kind, part = rotation["rope_type"], rotation.pop("partial_rotary_factor")
    if config["model_type"] == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"  # its names in the first releases
    if kind not in _ROTATIONS:
        raise member.refuse(
            f"The model {member.reference!r} has the rotation {kind!r} (rope_parameters.rope_type), which no "
            f"MoE form computes.",
            f"Known: {', '.join(_ROTATIONS)}.",
        )
    if part != 1:
        raise member.refuse(
            f"The model {member.reference!r} rotates only a part of every head (partial_rotary_factor is "
            f"{part}); an MoE form rotates all of it."
        )
    original = config.get("original_max_position_embeddings")
    if kind in _OF_ORIGINAL_CONTEXT and original is not None:
        # transformers prefers the field outside to the one inside; only the one inside can be kept.
        rotation["original_max_position_embeddings"] = int(original)
    return {**rotation, "rope_type": kind}


def _windows(member: Member, config: Mapping[str, Any]) -> tuple[int | None, tuple[bool, ...]]:
    """Return the window, and which layers have it; (None, no layer) where none has."""
    model_type, layers = config["model_type"], int(config["num_hidden_layers"])
    window = config["sliding_window"]
    if model_type == "llama" or (model_type in ("qwen2", "qwen3") and not config.get("use_sliding_window")):
        window = None
    first = int(config.get("max_window_layers", 28)) if model_type in ("qwen2", "qwen3") else 0
    implied = tuple(window is not None and layer >= first for layer in range(layers))
    given = config.get("layer_types")
    if given is None:
        return (window if any(implied) else None), implied
    windowed = tuple(_LAYER_TYPES.get(kind) for kind in given)
    known = tuple(bool(kind) for kind in windowed)
    # Only Qwen's classes read the list; elsewhere it must say what the other fields say.
    free = model_type in ("qwen2", "qwen3") and window is not None
    if None in windowed or len(known) != layers or (known != implied and not free):
        raise member.refuse(
            f"The model {member.reference!r} has layer_types that contradict its other fields, or that no MoE "
            f"form has: {sorted(set(given))} with sliding_window {window}."
        )
    return (window if any(known) else None), known


def stored_dtype(checkpoint: Checkpoint) -> DType:
    """Return the type that most of a checkpoint's bytes are stored in (float64 counts as float32)."""
    sizes: dict[str, int] = {}
    for entry in checkpoint.entries.values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    names: dict[str, DType] = {"BF16": "bfloat16", "F16": "float16"}
    return names.get(max(sizes, key=lambda dtype: sizes[dtype]), "float32")
