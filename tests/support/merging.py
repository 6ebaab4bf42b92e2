"""Models that exist as headers only, and the way from YAML to a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from aidocks.checkpoints.header import TensorEntry
from aidocks.merge.members import Member
from aidocks.merge.recipe import Source
from aidocks.merge.target import Target, Vocabulary, plan_target
from aidocks.specs.merge import MergeSpec
from aidocks.specs.read import build_spec, parse_yaml

HIDDEN, WIDE, ROWS = 64, 172, 512
_LAYER = {
    "input_layernorm.weight": (HIDDEN,),
    "mlp.down_proj.weight": (HIDDEN, WIDE),
    "mlp.gate_proj.weight": (WIDE, HIDDEN),
    "mlp.up_proj.weight": (WIDE, HIDDEN),
    "post_attention_layernorm.weight": (HIDDEN,),
    "self_attn.k_proj.weight": (32, HIDDEN),
    "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.v_proj.weight": (32, HIDDEN),
}
Shapes = dict[str, tuple[int, ...]]


def llama_shapes(layers: int = 5, rows: int = ROWS, head: bool = False) -> Shapes:
    """Return the tensors of a small Llama."""
    shapes: Shapes = {"model.embed_tokens.weight": (rows, HIDDEN)}
    shapes |= {f"model.layers.{n}.{rest}": shape for n in range(layers) for rest, shape in _LAYER.items()}
    shapes["model.norm.weight"] = (HIDDEN,)
    if head:
        shapes["lm_head.weight"] = (rows, HIDDEN)
    return shapes


def llama(
    name: str,
    *,
    layers: int = 5,
    rows: int = ROWS,
    head: bool = False,
    dtype: str = "BF16",
    shapes: Shapes | None = None,
    config: Mapping[str, Any] | None = None,
) -> Member:
    """Return a small Llama of which there is nothing but what its headers and its configuration say."""
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "head_dim": 8,
        "hidden_size": HIDDEN,
        "model_type": "llama",
        "num_attention_heads": 8,
        "num_hidden_layers": layers,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": not head,
        "vocab_size": rows,
    }
    return model(name, shapes or llama_shapes(layers, rows, head), settings | dict(config or {}), dtype)


def model(name: str, shapes: Shapes, config: Mapping[str, Any], dtype: str = "BF16") -> Member:
    """Return a model of these tensors."""
    place = Path("/models") / name
    entries = {key: TensorEntry(key, dtype, shape, place, 0, 0) for key, shape in shapes.items()}
    return Member("", name, Source(reference=name, checkpoint=place), entries, config, place)


def with_dtypes(member: Member, dtypes: Mapping[str, str]) -> Member:
    """Return the model with tensors of other types."""
    changed = {
        name: TensorEntry(name, dtypes.get(name, entry.dtype), entry.shape, Path(), 0, 0)
        for name, entry in member.tensors.items()
    }
    return replace(member, tensors=changed)


def plan(text: str, *models: Member, vocabulary: Vocabulary | None = None) -> Target:
    """Return the plan of the last merge that a YAML text asks for."""
    spec = build_spec(MergeSpec, parse_yaml(text))
    given = {member.reference: member for member in models}
    members: dict[str, Member] = {}
    for field, reference in spec.references():
        members.setdefault(reference, replace(given[reference], field=field))
    return plan_target(spec, members, vocabulary)
