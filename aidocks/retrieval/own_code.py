"""The guard against models whose code transformers does not have: from configuration and headers, without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from aidocks.checkpoints.header import TensorEntry
from aidocks.merge.members import text_config

#: Where the same weights are to be had in the form that transformers itself reads: part of a model's name -> model.
_NATIVE_COPIES = {"jina-embeddings-v3": "jinaai/jina-embeddings-v3-hf"}


@cache
def native_source(model_type: str) -> str:
    """Return the code that transformers itself has for a type of model; empty where it has none."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", model_type):
        return ""
    package = find_spec("transformers")
    folder = model_type.replace("-", "_")
    for root in (package.submodule_search_locations if package else None) or ():
        path = Path(root) / "models" / folder / f"modeling_{folder}.py"
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return ""


def why_own_code(
    config: Mapping[str, Any],
    entries: Mapping[str, TensorEntry],
    strange: str | None,
    *,
    is_decoder: bool,
) -> str | None:
    """Say why a model cannot be run by transformers' own code, or would be another model if it were.

    A configuration with ``auto_map`` belongs to code of the author's. Loaded without it, transformers takes the class
    of the same ``model_type`` and fills what does not fit with random numbers, with a warning at most.

    Args:
        config: Content of config.json.
        entries: Stored tensors by name.
        strange: A module that is not sentence-transformers'; None where there is none.
        is_decoder: Whether it reads from left to right.
    """
    if strange is not None:
        return f"its module {strange} is Python code of its own"
    model_type = str(config.get("model_type"))
    code = native_source(model_type)
    if not code:
        return f"transformers has no model type {model_type!r}"
    positions = config.get("position_embedding_type", "absolute")
    if positions in ("alibi", "rotary") and positions not in code:
        return f"its positions ({positions}) are not those of transformers' own class"
    if not config.get("auto_map"):
        return None
    if is_decoder and _bidirectional(config):
        return "its attention looks in both directions, unlike that of transformers' own class"
    unknown = next((name for name in entries if not _known(name, code, model_type)), None)
    if unknown is not None:
        return f"transformers' own {model_type} has no tensor {unknown}"
    return None


def _bidirectional(config: Mapping[str, Any]) -> bool:
    inner = text_config(config)
    return inner.get("is_causal") is False or bool(inner.get("use_bidirectional_attention"))


def _known(tensor: str, code: str, model_type: str) -> bool:
    """Tell whether every part of a tensor's name is one of a module in some code."""
    names = _attributes(code) | _renamed(model_type)
    return all(part.isdecimal() or part in names for part in tensor.split("."))


@cache
def _attributes(code: str) -> frozenset[str]:
    """Return the names that modules of some code give to their parts, with those that all have."""
    own = re.findall(r"\bself\.(\w+)\s*(?::[^=\n]+)?=", code) + re.findall(
        r"base_model_prefix\s*=\s*\"(\w+)\"", code
    )
    # Of layer norms in the oldest checkpoints, which transformers renames.
    return frozenset(
        {*own, "weight", "bias", "gamma", "beta"} | set(re.findall(r"register_buffer\(\s*\"(\w+)\"", code))
    )


@cache
def _renamed(model_type: str) -> frozenset[str]:
    """Return parts of names that transformers renames when it loads a type of model (nomic_bert)."""
    package = find_spec("transformers")
    for root in (package.submodule_search_locations if package else None) or ():
        path = Path(root) / "conversion_mapping.py"
        if not path.is_file():
            continue
        match = re.search(
            rf'^        "{re.escape(model_type)}": \[$(.*?)^        \],?$',
            path.read_text(encoding="utf-8"),
            re.M | re.S,
        )
        return (
            frozenset(re.findall(r"\w+", " ".join(re.findall(r'"([^"]+)"', match[1]))))
            if match
            else frozenset()
        )
    return frozenset()


def native_copy(directory: Path, config: Mapping[str, Any]) -> str | None:
    """Return the hub model that has the same weights in the form that transformers reads; None where none is known."""
    said = (config.get("_name_or_path"), config.get("auto_map"), directory.name, directory.parent.parent.name)
    names = " ".join(str(one) for one in said)
    is_lora = "lora_adaptations" in config
    found = next((copy for part, copy in _NATIVE_COPIES.items() if part in names), None)
    return found or (_NATIVE_COPIES["jina-embeddings-v3"] if is_lora else None)
