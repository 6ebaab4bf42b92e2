"""What tensors are called: buffers that nobody needs, and models that leave out the first part of every name."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

from aidocks.merge.recipe import StoredTensor

TensorT = TypeVar("TensorT", bound=StoredTensor)

#: What some checkpoints store and no model reads: it is computed from the configuration.
_COMPUTED = (".rotary_emb.inv_freq", ".masked_bias", ".position_ids")
#: Causal masks, where they are no vector: a bias that is added to something is one.
_MASKS = (".attn.bias", ".attention.bias")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def without_computed(tensors: Mapping[str, TensorT]) -> dict[str, TensorT]:
    """Return the tensors of a checkpoint without those that are computed from its configuration."""
    return {name: tensor for name, tensor in tensors.items() if not _is_computed(name, tensor)}


def spell_alike(models: Sequence[Collection[str]]) -> list[dict[str, str]]:
    """Return, for every model, name -> its own name, for the tensors that other models call otherwise.

    GPT-2's files on the model hub say ``wte.weight``, those that transformers saves ``transformer.wte.weight``: where
    names are the same but for such a first part, the names with it are everybody's.

    Args:
        models: The names of each model's tensors.
    """
    kinds = [{_NUMBER.sub("#", name) for name in names} for names in models]
    return [_spelled(names, kinds[place], kinds) for place, names in enumerate(models)]


def own_tensor(tensors: Mapping[str, TensorT], name: str) -> TensorT:
    """Return a tensor of a checkpoint whose names may lack the first part; see :func:`spell_alike`.

    Raises:
        KeyError: There is none.
    """
    return tensors[name if name in tensors else name.partition(".")[2]]


def _spelled(names: Collection[str], own: set[str], kinds: Sequence[set[str]]) -> dict[str, str]:
    for others in kinds:
        prefix = None if others == own else _missing_prefix(own, others)
        if prefix is not None:
            kept = {kind for kind in others if not kind.startswith(prefix)}
            return {prefix + name: name for name in names if _NUMBER.sub("#", name) not in kept}
    return {}


def _missing_prefix(own: set[str], others: set[str]) -> str | None:
    """Return what some names of another model begin with that are otherwise the same; None where there is nothing."""
    for prefix in sorted({kind.partition(".")[0] + "." for kind in others}):
        inside = {kind.removeprefix(prefix) for kind in others if kind.startswith(prefix)}
        outside = {kind for kind in others if not kind.startswith(prefix)}
        if inside == own - outside:
            return prefix
    return None


def _is_computed(name: str, tensor: StoredTensor) -> bool:
    return name.endswith(_COMPUTED) or (name.endswith(_MASKS) and len(tensor.shape) > 1)
