"""What a model looks like to a training: its sizes, and what of it a choice trains. Headers and configuration only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from aidocks.checkpoints.header import TensorEntry
from aidocks.laser.matrices import Matrix, find_matrices
from aidocks.merge.layers import count_layers
from aidocks.merge.members import text_config
from aidocks.merge.names import without_computed
from aidocks.merge.vocabulary import EMBEDDINGS
from aidocks.specs.patterns import compile_pattern
from aidocks.training.run import LOW_RANK, AdapterSettings

_HEAD = "lm_head.weight"
#: Fields of configurations that hold the width of the MLP; where there is none it is four times the hidden size.
_MLP_WIDTHS = (
    "moe_intermediate_size",
    "intermediate_size",
    "ffn_dim",
    "n_inner",
    "ffn_hidden_size",
    "hidden_dim",
)
_HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_CONTEXTS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
_VOCABULARIES = ("vocab_size",)


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a causal language model.

    Attributes:
        entries: Its stored tensors by name.
        parameters: All of them; a head that is the embedding counts once.
        embedding: Parameters of the embedding of tokens.
        linear: The matrices of its layers.
        hidden: Values of a token between two layers.
        keys: Values of a token's key (or value) in one layer, all heads.
        heads: Attention heads.
        mlp: Values of a token within an MLP: of all experts that see it.
        layers: How many.
        vocabulary: Tokens that the head tells apart.
        context: Longest input in tokens, if the configuration says.
    """

    entries: Mapping[str, TensorEntry]
    parameters: int
    embedding: int
    linear: tuple[Matrix, ...]
    hidden: int
    keys: int
    heads: int
    mlp: int
    layers: int
    vocabulary: int
    context: int | None

    @property
    def multiplied(self) -> int:
        """Parameters that a token is multiplied by: those of all matrices, the head's included."""
        # Of an embedding a token only takes a row, but a head that is the same matrix is multiplied by.
        tied = _HEAD not in self.entries
        return self.parameters - (0 if tied else self.embedding)

    def trained(self, adapter: AdapterSettings) -> int:
        """Return how many parameters a choice trains."""
        if adapter.kind == "full":
            return self.parameters
        if adapter.kind == "layers":
            return sum(self.entries[name].numel for name in self.chosen(adapter.layers))
        if adapter.kind == "prompt_tuning":
            return adapter.virtual_tokens * self.hidden
        if adapter.kind == "prefix_tuning":
            return adapter.virtual_tokens * self.layers * 2 * self.keys
        assert adapter.kind in LOW_RANK, adapter.kind
        targets = [m for m in self.linear if not adapter.target_modules or m.kind in adapter.target_modules]
        factors = sum(adapter.rank * sum(matrix.shape) for matrix in targets)
        lengths = sum(matrix.shape[0] for matrix in targets) if adapter.kind == "dora" else 0
        whole = sum(
            entry.numel
            for name, entry in self.entries.items()
            if any(module in name.split(".") for module in adapter.modules_to_save)
        )
        return factors + lengths + whole

    def chosen(self, patterns: Iterable[str]) -> tuple[str, ...]:
        """Return the tensors whose names have a match for one of some patterns (regular expressions)."""
        compiled = [compile_pattern(pattern) for pattern in patterns]
        return tuple(name for name in self.entries if any(pattern.search(name) for pattern in compiled))


def shape_of(config: Mapping[str, Any], entries: Mapping[str, TensorEntry]) -> ModelShape:
    """Return the sizes of a model.

    Args:
        config: Content of config.json.
        entries: Its tensors by name.
    """
    own = without_computed(entries)
    inner = text_config(config)
    hidden = _first(inner, _HIDDEN) or 0
    heads = _first(inner, _HEADS) or 1
    width = inner.get("head_dim") or hidden // heads
    experts = _first(inner, ("num_experts_per_tok", "moe_top_k")) or 1
    return ModelShape(
        entries=own,
        parameters=sum(entry.numel for entry in own.values()),
        embedding=sum(entry.numel for name, entry in own.items() if name.endswith(EMBEDDINGS)),
        linear=find_matrices(own),
        hidden=hidden,
        keys=(_first(inner, ("num_key_value_heads",)) or heads) * width,
        heads=heads,
        mlp=(_first(inner, _MLP_WIDTHS) or 4 * hidden) * experts,
        layers=count_layers(config) or 0,
        vocabulary=_first(inner, _VOCABULARIES) or 0,
        context=context_of(config),
    )


def context_of(config: Mapping[str, Any]) -> int | None:
    """Return the longest input of a model in tokens, if its configuration says."""
    return _first(text_config(config), _CONTEXTS)


def _first(config: Mapping[str, Any], keys: Iterable[str]) -> int | None:
    return next((config[key] for key in keys if type(config.get(key)) is int and config[key] > 0), None)
