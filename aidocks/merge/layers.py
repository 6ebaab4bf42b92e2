"""Which tensors belong to which layer of a model, whatever its architecture, by their names alone.

A layer's tensors are called ``<prefix><number>.<rest>``: ``model.layers.3.mlp.up_proj.weight``, ``h.3.ln_1.bias``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from aidocks.merge.members import Member, text_config

#: Fields of a configuration that count the layers.
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_NUMBERED = re.compile(r"(?P<prefix>(?:[^.0-9][^.]*\.)*)(?P<number>0|[1-9][0-9]{0,5})\.(?P<rest>.+)")
#: What lists of layers are called, where their length does not tell.
_LIST_NAMES = ("layers", "layer", "h", "blocks", "block")
_EMBEDDINGS = ("wte", "wpe", "project_in")
# The head of GPT-NeoX, which a part of its name would make an embedding.
_NO_EMBEDDINGS = ("embed_out",)


@dataclass(frozen=True)
class LayerList:
    """A numbered list of layers.

    Attributes:
        prefix: What stands before the number: ``model.layers.``
        layers: For every layer, its tensors without prefix and number, in the order of the files.
    """

    prefix: str
    layers: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.layers)

    def name(self, layer: int, rest: str) -> str:
        """Return the full name of a layer's tensor."""
        return f"{self.prefix}{layer}.{rest}"


@dataclass(frozen=True)
class Layout:
    """The tensors of a model by their place in it.

    Attributes:
        before: Those that come before the layers (embeddings).
        lists: Lists of layers; most models have one.
        after: Those that come after the layers (final norm, head).
        num_layers: As the configuration says; None where it does not.
    """

    before: tuple[str, ...]
    lists: tuple[LayerList, ...]
    after: tuple[str, ...]
    num_layers: int | None

    @cached_property
    def main(self) -> LayerList | None:
        """The list that slices are made of: the only one, or the one that is as long as the configuration says."""
        fitting = [found for found in self.lists if len(found) == self.num_layers]
        if len(fitting) == 1:
            return fitting[0]
        return self.lists[0] if len(self.lists) == 1 and self.num_layers is None else None


def find_layout(member: Member) -> Layout:
    """Return the place of every tensor of a model."""
    num_layers = count_layers(member.config)
    groups: dict[str, dict[int, list[str]]] = {}
    for name in member.named:
        match = _NUMBERED.fullmatch(name)
        if match:
            groups.setdefault(match["prefix"], {}).setdefault(int(match["number"]), []).append(match["rest"])
    lists = tuple(
        LayerList(prefix, tuple(tuple(layers[number]) for number in range(len(layers))))
        for prefix, layers in groups.items()
        if max(layers) == len(layers) - 1 and _is_list_of_layers(prefix, len(layers), num_layers)
    )
    prefixes = {found.prefix for found in lists}
    outside = [name for name in member.named if _prefix(name) not in prefixes]
    return Layout(
        before=tuple(name for name in outside if _is_embedding(name)),
        lists=lists,
        after=tuple(name for name in outside if not _is_embedding(name)),
        num_layers=num_layers,
    )


def count_layers(config: Mapping[str, Any]) -> int | None:
    """Return the number of layers that a configuration gives."""
    inner = text_config(config)
    return next((inner[key] for key in COUNTS if type(inner.get(key)) is int), None)


def interpolation(layer: int, layers: int) -> float:
    """Return where a layer is between the first of a slice (0) and the last (1); 1 for a single layer."""
    return layer / (layers - 1) if layers > 1 else 1.0


def ordered_union(lists: Iterable[Sequence[str]]) -> list[str]:
    """Return every name once: in the order of the first list, then what others have beyond it."""
    return list(dict.fromkeys(name for names in lists for name in names))


def _prefix(name: str) -> str | None:
    match = _NUMBERED.fullmatch(name)
    return match["prefix"] if match else None


def _is_list_of_layers(prefix: str, length: int, num_layers: int | None) -> bool:
    return length == num_layers or prefix.rstrip(".").rpartition(".")[2] in _LIST_NAMES


def _is_embedding(name: str) -> bool:
    parts = name.split(".")
    return any(
        part in _EMBEDDINGS or ("emb" in part.lower() and part not in _NO_EMBEDDINGS) for part in parts[:-1]
    )
