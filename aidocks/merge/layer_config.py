"""What a configuration says of its layers, rewritten for a model that consists of other layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aidocks.merge.layers import COUNTS, count_layers
from aidocks.merge.members import Member, text_config

#: Fields that list numbers of layers.
_NUMBERS = ("mlp_only_layers", "cross_attention_layers", "moe_layers", "attn_layer_indices")
#: Fields with an element for every layer whose names do not say so.
_PER_LAYER = ("num_query_heads", "num_kv_heads", "ffn_multipliers", "block_configs")
#: Fields by which a layer's number decides what it is.
_BY_POSITION = (
    "attn_layer_offset",
    "attn_layer_period",
    "decoder_sparse_step",
    "expert_layer_offset",
    "expert_layer_period",
    "first_k_dense_replace",
    "full_attention_interval",
    "global_attn_every_n_layers",
    "interleave_moe_layer_step",
    "no_rope_layer_interval",
    "sliding_window_pattern",
)
_FIRST_WINDOW = "max_window_layers"


@dataclass(frozen=True)
class LayerOrigin:
    """Which model's settings a layer of the result has, and which of its layers it was."""

    member: Member
    layer: int

    @property
    def config(self) -> Mapping[str, Any]:
        return text_config(self.member.config)


def rewrite_layers(
    config: Mapping[str, Any], origins: Sequence[LayerOrigin]
) -> tuple[dict[str, Any], list[str]]:
    """Return the configuration of a model of these layers, and what one should know of it.

    Args:
        config: Of the model that gives all other settings.
        origins: One for every layer of the result.

    Raises:
        IncompatibleModels: When a layer's setting cannot be known.
    """
    inner = text_config(config)
    are_where_they_were = [origin.layer for origin in origins] == list(range(count_layers(config) or 0))
    if are_where_they_were and all(_agree(inner, origin.config) for origin in origins):
        return dict(config), []
    changes: dict[str, Any] = {key: len(origins) for key in COUNTS if type(inner.get(key)) is int}
    changes |= _lists(origins)
    for key in _NUMBERS:
        if any(isinstance(origin.config.get(key), list) for origin in origins):
            changes[key] = [
                number
                for number, origin in enumerate(origins)
                if origin.layer in (origin.config.get(key) or ())
            ]
    changes |= _windows(inner, origins, "layer_types" in changes)
    written = {**inner, **changes}
    notes = [
        f"{key} is {inner[key]}: what a layer is depends on its number, and layers have other numbers now."
        for key in _BY_POSITION
        if inner.get(key) not in (None, 0, 1) and not are_where_they_were
    ]
    return (written if inner is config else {**config, "text_config": written}), notes


def differing_layers(one: LayerOrigin, other: LayerOrigin, length: int) -> dict[str, list[int]]:
    """Return the fields that say other things of a model's layers than of another's, with the numbers of those.

    Args:
        one: The first layer of a model.
        other: The layer of another model that is merged with it; those that follow go together, too.
        length: Number of layers.

    Returns:
        Field -> numbers of layers, as the other model counts them.
    """
    found = {}
    for key in (*_listed(one), *_NUMBERS):
        mine, its = one.config.get(key), other.config.get(key)
        if not isinstance(mine, list) or not isinstance(its, list) or mine == its:
            continue
        pairs = [(one.layer + n, other.layer + n) for n in range(length)]
        if key in _NUMBERS:
            found[key] = [that for this, that in pairs if (this in mine) != (that in its)]
        elif key in _listed(other):
            found[key] = [that for this, that in pairs if mine[this] != its[that]]
    return {key: layers for key, layers in found.items() if layers}


def _agree(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Tell whether two configurations say the same of layers, where both say something."""
    lists = [key for key in one.keys() & other.keys() if isinstance(one[key], list)]
    named = [key for key in lists if _is_per_layer(key) or key in _NUMBERS]
    windows = [config.get("use_sliding_window") and (config.get(_FIRST_WINDOW),) for config in (one, other)]
    return all(one[key] == other[key] for key in named) and (windows[0] or ()) == (windows[1] or ())


def _is_per_layer(key: str) -> bool:
    return ("layer" in key and key not in _NUMBERS) or key in _PER_LAYER


def _lists(origins: Sequence[LayerOrigin]) -> dict[str, list[Any]]:
    """Return the fields that have an element for every layer."""
    keys = dict.fromkeys(key for origin in origins for key in _listed(origin))
    changes = {}
    for key in keys:
        known = [origin.config[key][origin.layer] for origin in origins if key in _listed(origin)]
        if len(known) == len(origins):
            changes[key] = known
        elif all(value == known[0] for value in known):
            changes[key] = [known[0]] * len(origins)
        else:
            without = next(origin for origin in origins if key not in _listed(origin))
            raise without.member.refuse(
                f"The configuration of {without.member.reference!r} has no {key}, which says of other models' layers "
                "that they differ.",
                f"Add {key} to its config.json.",
            )
    return changes


def _listed(origin: LayerOrigin) -> Iterator[str]:
    layers = count_layers(origin.config)
    for key, value in origin.config.items():
        if _is_per_layer(key) and isinstance(value, list) and len(value) == layers:
            yield key


def _windows(inner: Mapping[str, Any], origins: Sequence[LayerOrigin], listed: bool) -> dict[str, Any]:
    """Return the fields that say from which layer on there is a sliding window."""
    first = inner.get(_FIRST_WINDOW)
    if type(first) is not int:
        return {}
    windowed = [
        bool(o.config.get("use_sliding_window")) and o.layer >= int(o.config.get(_FIRST_WINDOW, first))
        for o in origins
    ]
    if not any(windowed):
        return {_FIRST_WINDOW: len(origins)}
    if listed:
        return {}
    if windowed == sorted(windowed):
        return {_FIRST_WINDOW: windowed.index(True)}
    return {"layer_types": ["sliding_attention" if window else "full_attention" for window in windowed]}
