"""The weights of a dense model: under which name, and in which rows of it, each of them is stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from aidocks.moe.dense import DenseConfig, Member

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

_FLOATS = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True)
class Part:
    """One weight of a dense model.

    Attributes:
        name: What Llama calls it, and all MoE forms.
        shape: Its shape.
        tensor: Name of the stored tensor.
        rows: The rows of that tensor that are this weight (half-open); None for all.
    """

    name: str
    shape: tuple[int, ...]
    tensor: str
    rows: tuple[int, int] | None = None


def attention_parts(config: DenseConfig, layer: int) -> list[Part]:
    """Return what the base gives to a layer, in the order in which it is used; the last is the MLP's norm."""
    prefix = f"model.layers.{layer}"
    hidden = config.hidden_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    sizes = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    parts = [_whole(f"{prefix}.input_layernorm.weight", hidden)]
    if config.model_type == "phi3":
        parts += _stacked(f"{prefix}.self_attn", "qkv_proj", sizes, hidden)
    else:
        parts += [_whole(f"{prefix}.self_attn.{kind}.weight", size, hidden) for kind, size in sizes.items()]
    parts.append(_whole(f"{prefix}.self_attn.o_proj.weight", hidden, queries))
    sizes["o_proj"] = hidden
    parts += [_whole(f"{prefix}.self_attn.{kind}.bias", sizes[kind]) for kind in config.biases]
    if config.model_type == "qwen3":
        parts += [
            _whole(f"{prefix}.self_attn.{kind}.weight", config.head_dim) for kind in ("q_norm", "k_norm")
        ]
    return [*parts, _whole(f"{prefix}.post_attention_layernorm.weight", hidden)]


def mlp_parts(config: DenseConfig, layer: int) -> dict[str, Part]:
    """Return ``gate_proj``, ``up_proj`` and ``down_proj`` of a layer: what an expert gives."""
    prefix, hidden, width = f"model.layers.{layer}.mlp", config.hidden_size, config.intermediate_size
    down = _whole(f"{prefix}.down_proj.weight", hidden, width)
    if config.model_type == "phi3":
        gate, up = _stacked(prefix, "gate_up_proj", {"gate_proj": width, "up_proj": width}, hidden)
    else:
        gate, up = (_whole(f"{prefix}.{kind}.weight", width, hidden) for kind in ("gate_proj", "up_proj"))
    return {"gate_proj": gate, "up_proj": up, "down_proj": down}


def outer_parts(config: DenseConfig) -> list[Part]:
    """Return what lies outside the layers: embedding, last norm, and the head where it is not the embedding."""
    embedding = _whole(EMBEDDING, config.vocab_size, config.hidden_size)
    parts = [embedding, _whole("model.norm.weight", config.hidden_size)]
    if not config.tie_word_embeddings:
        parts.append(_whole(HEAD, config.vocab_size, config.hidden_size))
    return parts


def base_parts(config: DenseConfig) -> list[Part]:
    """Return everything that the base gives."""
    layers = range(config.num_hidden_layers)
    return [*outer_parts(config), *(part for layer in layers for part in attention_parts(config, layer))]


def expert_parts(config: DenseConfig) -> list[Part]:
    """Return everything that an expert gives."""
    layers = range(config.num_hidden_layers)
    return [part for layer in layers for part in mlp_parts(config, layer).values()]


def check_parts(member: Member, parts: Iterable[Part]) -> None:
    """Refuse a model whose stored tensors are not these, floating-point.

    Raises:
        IncompatibleModels: Naming the first tensor that is missing or different.
    """
    entries = member.checkpoint.entries
    for name, shape in _stored_shapes(parts).items():
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


def check_nothing_else(member: Member, config: DenseConfig) -> None:
    """Refuse a model with weights that the result would silently lose, such as biases.

    Raises:
        IncompatibleModels: Naming the first of them.
    """
    # A tied model may store its head all the same; it is not read.
    known = {part.tensor for part in (*base_parts(config), *expert_parts(config))} | {HEAD}
    for name in member.checkpoint.entries:
        # Old checkpoints store this table, which follows from the configuration.
        if name not in known and not name.endswith("rotary_emb.inv_freq"):
            raise member.refuse(
                f"The model {member.reference!r} has the tensor {name}, which a model of the type "
                f"{config.model_type!r} has not; the result would lose it."
            )


def _whole(name: str, *shape: int) -> Part:
    return Part(name, shape, name)


def _stacked(prefix: str, stored: str, sizes: Mapping[str, int], columns: int) -> list[Part]:
    parts, begin = [], 0
    for kind, size in sizes.items():
        rows = (begin, begin + size)
        parts.append(Part(f"{prefix}.{kind}.weight", (size, columns), f"{prefix}.{stored}.weight", rows))
        begin += size
    return parts


def _stored_shapes(parts: Iterable[Part]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for part in parts:
        # The last of the weights that share a tensor ends where the tensor does.
        shapes[part.tensor] = (part.rows[1], *part.shape[1:]) if part.rows else part.shape
    return shapes
