"""How a model rotates queries and keys (rotary positions), in one form, whichever way its configuration says it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_DEFAULT_THETA = 10_000.0
#: What transformers takes where a configuration is silent; 10 000 for all others.
_THETAS = {
    "cohere": 500_000.0,
    "gemma3": 1_000_000.0,
    "gemma3_text": 1_000_000.0,
    "gpt_oss": 150_000.0,
    "llama4_text": 500_000.0,
    "mixtral": 1_000_000.0,
    "olmo3": 500_000.0,
    "phimoe": 1_000_000.0,
    "smollm3": 2_000_000.0,
}
_PARTS = {"gpt_neox": 0.25}


def read_rotation(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotation that a configuration gives.

    ``rope_theta`` and ``rope_scaling`` are how transformers wrote it until its release 5, ``rope_parameters`` since.

    Args:
        config: Content of config.json, or the part of it that describes the language model.

    Returns:
        ``rope_theta``, ``rope_type`` and ``partial_rotary_factor``, defaults filled in, then what else the type of
        rotation has, by name; where the layers differ, such a rotation for every type of layer.
    """
    given = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if any(isinstance(value, Mapping) for value in given.values()):
        kinds = {kind: value for kind, value in given.items() if isinstance(value, Mapping)}
        return {
            kind: read_rotation({"model_type": config.get("model_type"), "rope_parameters": value})
            for kind, value in sorted(kinds.items())
        }
    local = config.get("rope_local_base_freq")  # of Gemma 3, whose other layers rotate as the rest says
    if local is not None:
        full = {key: value for key, value in config.items() if key != "rope_local_base_freq"}
        return {
            "full_attention": read_rotation(full),
            "sliding_attention": read_rotation({"rope_theta": local}),
        }
    return _one_rotation(config, given)


def _one_rotation(config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    model_type = config.get("model_type")
    rest = {key: value for key, value in given.items() if value is not None}
    kind = rest.pop("type", "default")
    kind = rest.pop("rope_type", kind)
    theta = rest.pop("rope_theta", _first(config, "rope_theta", "rotary_emb_base"))
    part = rest.pop("partial_rotary_factor", _first(config, "partial_rotary_factor", "rotary_pct"))
    return {
        "rope_theta": float(_THETAS.get(str(model_type), _DEFAULT_THETA) if theta is None else theta),
        "rope_type": kind,
        "partial_rotary_factor": float(_PARTS.get(str(model_type), 1.0) if part is None else part),
        **dict(sorted(rest.items())),
    }


def _first(config: Mapping[str, Any], *keys: str) -> Any:
    return next((config[key] for key in keys if config.get(key) is not None), None)
