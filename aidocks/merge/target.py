"""The plan of a merge: the tensors of the result, how each of them is made of the models', and its configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from aidocks.checkpoints.dtypes import DTYPE_BITS, stored_name
from aidocks.checkpoints.writer import ShardPlan, TensorPlan, plan_shards
from aidocks.merge.alike import check_alike, check_layers
from aidocks.merge.ends import choose_head, set_tie
from aidocks.merge.layer_config import LayerOrigin, rewrite_layers
from aidocks.merge.layers import count_layers
from aidocks.merge.members import Member
from aidocks.merge.method import find_method
from aidocks.merge.recipe import Source, TensorMerge
from aidocks.merge.slices import Arranger, Slice
from aidocks.merge.tensors import TensorPlanner
from aidocks.specs.merge_config import MergeConfig

#: Types as requests write them, in safetensors' spelling.
_DTYPE_KEYS = ("dtype", "torch_dtype")
# What says where a model came from, not what it is.
_LEFT_OUT = ("_name_or_path",)


class Vocabulary(Protocol):
    """What planning asks of the result's vocabulary, where the request has a policy for it.

    Attributes:
        size: Rows of the result's embedding.
        special_ids: Fields of the configuration that number tokens.
        tokenizer: Directory that most of the tokenizer's files come from.
    """

    @property
    def size(self) -> int: ...

    @property
    def special_ids(self) -> Mapping[str, Any]: ...

    @property
    def tokenizer(self) -> Path: ...


@dataclass(frozen=True)
class Target:
    """What one merge writes, and how it is made.

    Attributes:
        sources: The models that recipes refer to, in the order of the members.
        tensors: All tensors in the order of the files: embeddings, layers, the rest.
        vocabulary_tensors: Names of those whose rows are the vocabulary.
        config: Content of config.json.
        dtype: Type of most bytes of the result, in safetensors' spelling.
        tokenizer: Directory that gives the tokenizer's and other files.
        notes: What one should know of the result.
    """

    sources: tuple[Source, ...]
    tensors: tuple[TensorMerge, ...]
    vocabulary_tensors: frozenset[str]
    config: dict[str, Any]
    dtype: str
    tokenizer: Path
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Parameters of the result."""
        return sum(prod(tensor.shape) for tensor in self.tensors)

    @property
    def num_layers(self) -> int:
        """Layers of the result; 0 where its configuration does not count them."""
        return count_layers(self.config) or 0

    @property
    def class_name(self) -> str:
        """The class that transformers loads the result as."""
        return class_name(self.config)

    def plan_files(self, max_shard_bytes: int) -> tuple[ShardPlan, ...]:
        """Divide the tensors over files."""
        return plan_shards(
            [TensorPlan(name=t.name, dtype=t.dtype, shape=t.shape) for t in self.tensors], max_shard_bytes
        )

    def as_member(self, name: str, directory: Path) -> Member:
        """Return the result as a model that later merges can use.

        Args:
            name: What they call it.
            directory: Where it is going to be.
        """
        return Member(
            field="",
            reference=name,
            source=Source(reference=name, checkpoint=directory),
            tensors=MappingProxyType({tensor.name: tensor for tensor in self.tensors}),
            config=self.config,
            # Its own, which may have other tokens or another chat template than any model's.
            tokenizer=directory,
        )


def plan_target(
    merge: MergeConfig,
    members: Mapping[str, Member],
    vocabulary: Vocabulary | None = None,
    *,
    path: str = "",
) -> Target:
    """Check that the models of a merge fit together, and plan the result.

    Args:
        merge: A merge of the request.
        members: Its models, by the references in it; see :func:`~aidocks.merge.members.open_members`.
        vocabulary: The result's, where the request has a policy for it.
        path: Of the merge in the request: ``stages[0].`` or empty.

    Raises:
        InvalidSpec: For an unknown method or parameter, a missing or wrong value, or slices that cannot be, naming
            the field.
        IncompatibleModels: Naming the model's field, and the first tensor or setting that does not fit.
    """
    method = find_method(merge.merge_method, field=f"{path}merge_method")
    arranger = Arranger(merge, members, method, path)
    slices = arranger.arrange()
    template = members[merge.base_model] if merge.base_model is not None else slices[0].inputs[0].member
    merged = list({given.member.reference: given.member for part in slices for given in part.inputs}.values())
    notes = [*check_alike(template, merged), *check_layers(template, slices)]
    sources = tuple(member.source for member in members.values())
    head = choose_head(slices)
    wanted = merge.out_dtype or merge.dtype
    planner = TensorPlanner(
        method,
        {reference: number for number, reference in enumerate(members)},
        template,
        stored_name(wanted) if wanted else None,
        vocabulary.size if vocabulary else None,
    )
    tensors = tuple(planner.plan(slices, head))
    config, of_layers = _config(template, slices)
    set_tie(config, head.is_tied)
    if wanted:
        _set_dtype(config, wanted)
    if vocabulary:
        _set_vocabulary(config, vocabulary)
    found = [*arranger.notes, *notes, *of_layers, *planner.notes(), *([head.note] if head.note else [])]
    return Target(
        sources=sources,
        tensors=tensors,
        vocabulary_tensors=frozenset(planner.vocabulary),
        config=config,
        dtype=_most_bytes(tensors),
        tokenizer=vocabulary.tokenizer if vocabulary else template.tokenizer,
        notes=tuple(dict.fromkeys(found)),
    )


def class_name(config: Mapping[str, Any]) -> str:
    """Return the class that transformers loads a model of this configuration as; empty where it does not say."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _config(template: Member, slices: Sequence[Slice]) -> tuple[dict[str, Any], list[str]]:
    """Return the configuration of the result but for its vocabulary and its type, and notes."""
    config = {key: value for key, value in template.config.items() if key not in _LEFT_OUT}
    if slices[0].length is None:
        return config, []
    origins = [
        LayerOrigin(part.inputs[0].member, part.inputs[0].first + layer)
        for part in slices
        for layer in range(part.length or 0)
    ]
    return rewrite_layers(config, origins)


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    keys = [key for key in _DTYPE_KEYS if key in config] or [_DTYPE_KEYS[0]]
    config.update(dict.fromkeys(keys, dtype))
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        config["text_config"] = {**inner, **{key: dtype for key in _DTYPE_KEYS if key in inner}}


def _set_vocabulary(config: dict[str, Any], vocabulary: Vocabulary) -> None:
    changes = {"vocab_size": vocabulary.size, **vocabulary.special_ids}
    inner = config.get("text_config")
    if isinstance(inner, Mapping) and "vocab_size" in inner:
        config["text_config"] = {**inner, **{key: value for key, value in changes.items() if key in inner}}
        changes = {key: value for key, value in changes.items() if key in config}
    config.update(changes)


def _most_bytes(tensors: Sequence[TensorMerge]) -> str:
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + prod(tensor.shape) * DTYPE_BITS[tensor.dtype]
    return max(sizes, key=lambda dtype: sizes[dtype])
