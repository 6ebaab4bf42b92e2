"""The dense models that an MoE is built from: what their configurations mean, and which tensors they have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aidocks.errors import IncompatibleModels
from aidocks.specs.moe import DType

if TYPE_CHECKING:
    from aidocks.checkpoints.reader import Checkpoint

# What transformers takes where a configuration is silent; the classes differ.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "sliding_window": None},
    "mistral": {
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
        "num_key_value_heads": 8,
    },
}
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
_FLOATS = ("BF16", "F16", "F32", "F64")


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
    """A Llama or Mistral configuration, defaults filled in. Field names are those of ``config.json``."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    hidden_act: str
    rope_parameters: Mapping[str, Any]
    sliding_window: int | None = field(compare=False)
    max_position_embeddings: int = field(compare=False)
    tie_word_embeddings: bool = field(compare=False)


#: In what an expert must equal the base, the most telling first.
COMPARED = tuple(name for name, f in DenseConfig.__dataclass_fields__.items() if f.compare)


def read_dense(member: Member) -> DenseConfig:
    """Return the meaning of a model's configuration.

    Raises:
        IncompatibleModels: For anything but a plain Llama or Mistral, naming what is not.
    """
    config = member.checkpoint.config
    model_type = config.get("model_type")
    name = f"The model {member.reference!r}"
    if model_type not in _DEFAULTS:
        raise member.refuse(
            f"{name} is of the type {model_type!r}.",
            "Llama and Mistral models can be combined ('llama', 'mistral').",
        )
    architectures = config.get("architectures") or [_ARCHITECTURES[model_type]]
    if architectures != [_ARCHITECTURES[model_type]]:
        raise member.refuse(f"{name} has the architecture {architectures}, not {_ARCHITECTURES[model_type]}.")
    if config.get("quantization_config"):
        raise member.refuse(f"{name} is quantised.", "Give the model that it was made from.")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise member.refuse(f"{name} has biases ({key} is true), for which a Mixtral model has no place.")
    full = _DEFAULTS[model_type] | {key: value for key, value in config.items() if value is not None}
    if config.get("sliding_window", ...) is None:
        full["sliding_window"] = None
    try:
        heads = int(full["num_attention_heads"])
        return DenseConfig(
            model_type=model_type,
            hidden_size=int(full["hidden_size"]),
            intermediate_size=int(full["intermediate_size"]),
            num_hidden_layers=int(full["num_hidden_layers"]),
            num_attention_heads=heads,
            num_key_value_heads=int(full.get("num_key_value_heads", heads)),
            head_dim=int(full.get("head_dim", int(full["hidden_size"]) // heads)),
            vocab_size=int(full["vocab_size"]),
            rms_norm_eps=float(full["rms_norm_eps"]),
            hidden_act=str(full.get("hidden_act", "silu")),
            rope_parameters=_rope(full),
            sliding_window=full["sliding_window"] if model_type == "mistral" else None,
            max_position_embeddings=int(full["max_position_embeddings"]),
            tie_word_embeddings=bool(full.get("tie_word_embeddings", False)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise member.refuse(f"{name} has a config.json that lacks a usable {error}.") from error


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return rotary parameters in one form, whichever version of transformers wrote them."""
    given = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    kind = given.pop("type", "default")
    return {
        "rope_theta": float(given.pop("rope_theta", config.get("rope_theta", 10_000.0))),
        "rope_type": given.pop("rope_type", kind),
        **dict(sorted(given.items())),
    }


def mlp_shapes(config: DenseConfig) -> dict[str, tuple[int, int]]:
    """Return name -> shape of the tensors that every expert gives."""
    wide, tall = (
        (config.intermediate_size, config.hidden_size),
        (config.hidden_size, config.intermediate_size),
    )
    kinds = {"gate_proj": wide, "up_proj": wide, "down_proj": tall}
    return {
        f"model.layers.{layer}.mlp.{kind}.weight": shape
        for layer in range(config.num_hidden_layers)
        for kind, shape in kinds.items()
    }


def shared_shapes(config: DenseConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the tensors that the base gives, in the order in which a model uses them."""
    hidden = config.hidden_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    kinds: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{layer}.{kind}.weight": shape for kind, shape in kinds.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def check_tensors(member: Member, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a model whose stored tensors are not these, floating-point.

    Raises:
        IncompatibleModels: Naming the first tensor that is missing or different.
    """
    entries = member.checkpoint.entries
    for name, shape in shapes.items():
        entry = entries.get(name)
        if entry is None:
            raise member.refuse(
                f"The model {member.reference!r} has no tensor {name}, which its configuration implies."
            )
        if tuple(entry.shape) != shape:
            raise member.refuse(
                f"The tensor {name} of {member.reference!r} has shape {list(entry.shape)}, not {list(shape)}."
            )
        if entry.dtype not in _FLOATS:
            raise member.refuse(
                f"The tensor {name} of {member.reference!r} is of the type {entry.dtype}, not a float."
            )


def check_no_more_tensors(member: Member, config: DenseConfig) -> None:
    """Refuse a model with weights that the result would silently lose, such as biases.

    Raises:
        IncompatibleModels: Naming the first of them.
    """
    known = shared_shapes(config).keys() | mlp_shapes(config).keys() | {"lm_head.weight"}
    for name in member.checkpoint.entries:
        # Old checkpoints store this table, which follows from the configuration.
        if name not in known and not name.endswith("rotary_emb.inv_freq"):
            raise member.refuse(
                f"The model {member.reference!r} has the tensor {name}, for which Mixtral has no place."
            )


def stored_dtype(checkpoint: Checkpoint) -> DType:
    """Return the type that most of a checkpoint's bytes are stored in (float64 counts as float32)."""
    sizes: dict[str, int] = {}
    for entry in checkpoint.entries.values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    names: dict[str, DType] = {"BF16": "bfloat16", "F16": "float16"}
    return names.get(max(sizes, key=lambda dtype: sizes[dtype]), "float32")
