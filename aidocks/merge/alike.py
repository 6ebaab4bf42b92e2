"""Whether models compute the same function of their weights, so that these can be merged."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from aidocks.merge.layer_config import LayerOrigin, differing_layers
from aidocks.merge.members import Member, text_config
from aidocks.merge.slices import Slice
from aidocks.models.rope import read_rotation

#: Settings that say what equal shapes mean.
_MEANING = ("num_attention_heads", "num_key_value_heads", "head_dim", "n_head", "n_heads")
#: Settings that the result takes from one model, and that another's weights were trained with.
_TRAINED_WITH = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "hidden_act",
    "num_experts_per_tok",
    "query_pre_attn_scalar",
    "rms_norm_eps",
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
        notes += _of_rotations(template, other)
    return notes


def check_layers(template: Member, slices: Sequence[Slice]) -> list[str]:
    """Return what one should know of layers that are merged though their models say that they are of other kinds.

    Args:
        template: The model that gives the result's configuration.
        slices: Of the merge.
    """
    notes = []
    for part in slices:
        first = part.inputs[0]
        start = LayerOrigin(template, 0) if part.length is None else LayerOrigin(first.member, first.first)
        for given in part.inputs:
            length = part.length or given.layout.num_layers or 0
            differing = differing_layers(start, LayerOrigin(given.member, given.first), length)
            notes += [
                f"{key} says of {_layers(layers)} of {given.member.reference!r} that they are of another kind than "
                f"those of {start.member.reference!r} with which they are merged; the result has the latter's."
                for key, layers in differing.items()
            ]
    return notes


def _layers(numbers: Sequence[int]) -> str:
    return f"the layers {', '.join(map(str, numbers))}"


def _of_rotations(template: Member, other: Member) -> list[str]:
    """Return a note where models rotate queries and keys in different ways, however their configurations say it."""
    mine, its = _rotation(template), _rotation(other)
    keys = sorted(key for key in mine.keys() | its.keys() if not _same(mine.get(key), its.get(key)))
    if not keys:
        return []
    ours, others = ({key: found[key] for key in keys if key in found} for found in (mine, its))
    return [
        f"The rotation of positions is {_shown(others)} in {other.reference!r}; the result has that of "
        f"{template.reference!r}, {_shown(ours)}."
    ]


def _rotation(member: Member) -> dict[str, Any]:
    try:
        return read_rotation(text_config(member.config))
    except (TypeError, ValueError) as error:
        raise member.refuse(
            f"The config.json of {member.reference!r} does not say how positions are rotated (rope_parameters): "
            f"{error}."
        ) from error


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
