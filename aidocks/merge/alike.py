"""Whether models compute the same function of their weights, so that these can be merged."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from aidocks.merge.members import Member, text_config

#: Settings that say what equal shapes mean.
_MEANING = ("num_attention_heads", "num_key_value_heads", "head_dim", "n_head", "n_heads")
#: Settings that the result takes from one model, and that another's weights were trained with.
_TRAINED_WITH = (
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
)


def check_alike(template: Member, others: Sequence[Member]) -> list[str]:
    """Return what one should know of settings that differ between models.

    Args:
        template: The model that gives the result's configuration.
        others: All models that are merged.

    Raises:
        IncompatibleModels: For another architecture, or settings by which equal shapes mean different things.
    """
    notes = []
    for other in others:
        _require_one_architecture(template, other)
        mine, its = text_config(template.config), text_config(other.config)
        for key in _MEANING:
            if key in mine and key in its and not _same(mine[key], its[key]):
                raise other.refuse(
                    f"{key} is {_shown(its[key])} in {other.reference!r}, but {_shown(mine[key])} in "
                    f"{template.reference!r}: their weights mean different things.",
                    "Models that are merged have the same shape.",
                )
        notes += [
            f"{key} is {_shown(its[key])} in {other.reference!r}; the result has that of {template.reference!r}, "
            f"{_shown(mine[key])}."
            for key in _TRAINED_WITH
            if key in mine and key in its and not _same(mine[key], its[key])
        ]
    return notes


def _require_one_architecture(template: Member, other: Member) -> None:
    for key in ("model_type", "architectures"):
        mine, its = template.config.get(key), other.config.get(key)
        if mine != its and (key == "model_type" or (mine and its)):
            raise other.refuse(
                f"The model {other.reference!r} is a {_plain(its)}, but {template.reference!r} is a {_plain(mine)} "
                f"({key} in config.json).",
                "Models that are merged have the same architecture.",
            )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, float) and isinstance(other, int | float):
        # Some writers store float32 values, with more decimals: 9.999999747378752e-06 is 1e-05.
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)


def _plain(value: Any) -> str:
    return str(value[0]) if isinstance(value, list) and len(value) == 1 else str(value)


def _shown(value: Any) -> str:
    return json.dumps(value)
