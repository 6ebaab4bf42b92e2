"""The models of a merge, opened: what their headers and configurations say. No weights are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from functools import cached_property
from pathlib import Path
from typing import Any

from aidocks.errors import IncompatibleModels
from aidocks.merge.adapter import HEAD, read_adapter
from aidocks.merge.names import spell_alike, without_computed
from aidocks.merge.recipe import Source, StoredTensor
from aidocks.merge.vocabulary import EMBEDDINGS
from aidocks.models.resolve import ModelResolver
from aidocks.models.tokenizer_files import FAST_FILE
from aidocks.specs.merge_config import MergeConfig
from aidocks.specs.merge_settings import split_reference

#: Beginning of the names of the types that only quantised checkpoints have.
_QUANTISED_TYPES = ("F8_", "F6_", "F4")
TIE = "tie_word_embeddings"


@dataclass(frozen=True)
class Member:
    """A model that a merge names.

    Attributes:
        field: Path in the request of the first place that names it.
        reference: What stands there: ``model[+adapter]``.
        source: Where its weights are, or are going to be.
        tensors: Its tensors by name, in the order of the files, without those that its configuration gives.
        config: What its config.json says.
        tokenizer: Directory of its tokenizer's files; it need not be there yet.
        spelled: Name in the merge -> its own name, of tensors that other models call otherwise.
    """

    field: str
    reference: str
    source: Source
    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Any]
    tokenizer: Path
    spelled: Mapping[str, str] = dataclass_field(default_factory=dict)

    @property
    def directory(self) -> Path:
        """The checkpoint, with tokenizer and other files beside the weights."""
        return self.source.checkpoint

    @cached_property
    def named(self) -> Mapping[str, StoredTensor]:
        """Its tensors by their names in the merge."""
        names = {own: name for name, own in self.spelled.items()}
        return {names.get(own, own): tensor for own, tensor in self.tensors.items()}

    def own_name(self, name: str) -> str:
        """Return what a tensor is called in its files."""
        return self.spelled.get(name, name)

    @property
    def vocab_size(self) -> int | None:
        """Rows of its embedding, as its configuration says."""
        found = text_config(self.config).get("vocab_size", self.config.get("vocab_size"))
        return found if type(found) is int else None

    def refuse(self, message: str, hint: str | None = None) -> IncompatibleModels:
        """Return the error that blames the field which names this model."""
        return IncompatibleModels(message, field=self.field, value=self.reference, hint=hint)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a configuration that describes the language model: all of it, or ``text_config``."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def with_settings(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with other settings of its language model, wherever it has them."""
    inner = config.get("text_config")
    if not isinstance(inner, Mapping):
        return {**config, **changes}
    # transformers looks for a tie outside, too.
    outside = {key: value for key, value in changes.items() if key in config or key == TIE}
    return {**config, "text_config": {**inner, **changes}, **outside}


def open_members(
    merge: MergeConfig,
    resolver: ModelResolver,
    *,
    path: str = "",
    made: Mapping[str, Member] | None = None,
    converted: Mapping[str, Path] | None = None,
) -> dict[str, Member]:
    """Open every model that a merge names.

    Args:
        merge: A merge of the request.
        resolver: Finds models.
        path: Of the merge in the request: ``stages[0].`` or empty.
        made: The results of earlier stages, by name.
        converted: Model reference -> directory of its weights in safetensors format, for models that are stored in
            another one.

    Returns:
        Reference (``model[+adapter]``) -> model, in the order in which the request names them, the base first.

    Raises:
        AIDocksError: As :meth:`~aidocks.models.resolve.ModelResolver.open`, naming the field.
        IncompatibleModels: For quantised weights.
    """
    members: dict[str, Member] = {}
    for field, reference in merge.references():
        if reference not in members:
            member = _open(path + field, reference, resolver, made or {}, converted or {})
            _refuse_quantised(member)
            members[reference] = member
    spelled = spell_alike([member.tensors for member in members.values()])
    return {
        reference: replace(member, spelled=names)
        for (reference, member), names in zip(members.items(), spelled, strict=True)
    }


def _open(
    field: str,
    reference: str,
    resolver: ModelResolver,
    made: Mapping[str, Member],
    converted: Mapping[str, Path],
) -> Member:
    from aidocks.checkpoints.reader import Checkpoint

    name, adapter_reference = split_reference(reference)
    if name in made:
        earlier = made[name]
        source = earlier.source.model_copy(update={"reference": reference, "field": field})
        member = replace(earlier, field=field, reference=reference, source=source)
    else:
        place = converted.get(name)
        checkpoint = Checkpoint(place) if place is not None else resolver.open(name, field=field)
        member = Member(
            field=field,
            reference=reference,
            source=Source(reference=reference, checkpoint=checkpoint.path, field=field),
            tensors=without_computed(checkpoint.entries),
            config=checkpoint.config,
            tokenizer=checkpoint.path,
        )
    return member if adapter_reference is None else _adapted(member, adapter_reference, resolver)


def _adapted(member: Member, adapter_reference: str, resolver: ModelResolver) -> Member:
    """Return a model with an adapter added to it."""
    field = f"{member.field}.lora"
    place = resolver.resolve(adapter_reference, field=field).path
    adapter = read_adapter(place, field=field)
    tensors = adapter.entries(member.tensors, field=field, reference=adapter_reference)
    changes: dict[str, Any] = {}
    embedding = next((name for name in tensors if name.endswith(EMBEDDINGS)), None)
    if embedding is not None and tensors[embedding].shape != member.tensors[embedding].shape:
        changes["vocab_size"] = tensors[embedding].shape[0]
        head = tensors.get(HEAD)
        if text_config(member.config).get(TIE) and not adapter.brings_head:
            tensors.pop(HEAD, None)  # a copy of the embedding as it was
        elif head is not None and head.shape != tensors[embedding].shape:
            adapter.refuse(
                f"the model's embedding has {tensors[embedding].shape[0]} rows with it, but its head {head.shape[0]}",
                field,
                adapter_reference,
            )
    if adapter.brings_head:
        changes[TIE] = False
    return replace(
        member,
        source=member.source.model_copy(update={"adapter": place}),
        tensors=tensors,
        config=with_settings(member.config, changes) if changes else member.config,
        tokenizer=place if (place / FAST_FILE).is_file() else member.tokenizer,
    )


def _refuse_quantised(member: Member) -> None:
    by = member.config.get("quantization_config")
    name = next(_quantised(member.tensors), None)
    if not by and name is None:
        return
    how = by.get("quant_method") if isinstance(by, Mapping) else None
    reason = f"{name} is {member.tensors[name].dtype}" if name else f"quantization_config says {how or by!r}"
    raise member.refuse(
        f"The model {member.reference!r} is quantised ({reason}): its stored numbers are not its weights.",
        "Give the model that it was made from.",
    )


def _quantised(tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    return (name for name, tensor in tensors.items() if tensor.dtype.startswith(_QUANTISED_TYPES))
