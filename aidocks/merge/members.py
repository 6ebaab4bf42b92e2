"""The models of a merge, opened: what their headers and configurations say. No weights are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aidocks.errors import IncompatibleModels
from aidocks.merge.adapter import read_adapter
from aidocks.merge.recipe import Source, StoredTensor
from aidocks.models.resolve import ModelResolver
from aidocks.specs.merge_config import MergeConfig
from aidocks.specs.merge_settings import split_reference

#: Beginning of the names of the types that only quantised checkpoints have.
_QUANTISED_TYPES = ("F8_", "F6_", "F4")


@dataclass(frozen=True)
class Member:
    """A model that a merge names.

    Attributes:
        field: Path in the request of the first place that names it.
        reference: What stands there: ``model[+adapter]``.
        source: Where its weights are, or are going to be.
        tensors: Its tensors by name, in the order of the files.
        config: What its config.json says.
        tokenizer: Directory of its tokenizer's files.
    """

    field: str
    reference: str
    source: Source
    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Any]
    tokenizer: Path

    @property
    def directory(self) -> Path:
        """The checkpoint, with tokenizer and other files beside the weights."""
        return self.source.checkpoint

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
    return members


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
        source = earlier.source.model_copy(update={"reference": reference})
        member = replace(earlier, field=field, reference=reference, source=source)
    else:
        place = converted.get(name)
        checkpoint = Checkpoint(place) if place is not None else resolver.open(name, field=field)
        member = Member(
            field=field,
            reference=reference,
            source=Source(reference=reference, checkpoint=checkpoint.path),
            tensors=checkpoint.entries,
            config=checkpoint.config,
            tokenizer=checkpoint.path,
        )
    return member if adapter_reference is None else _adapted(member, adapter_reference, resolver)


def _adapted(member: Member, adapter_reference: str, resolver: ModelResolver) -> Member:
    """Return a model with an adapter added to it."""
    field = f"{member.field}.lora"
    place = resolver.resolve(adapter_reference, field=field).path
    tensors = read_adapter(place, field=field).entries(
        member.tensors, field=field, reference=adapter_reference
    )
    source = member.source.model_copy(update={"adapter": place})
    return replace(member, source=source, tensors=tensors)


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
