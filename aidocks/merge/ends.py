"""Both ends of a model: the tensors whose rows are the vocabulary, and whether the head is the embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aidocks.merge.layers import Layout
from aidocks.merge.members import TIE, Member, text_config, with_settings
from aidocks.merge.slices import Slice

# Their first axis can be as long as the vocabulary, and is another.
_POSITIONS = ("pos", "wpe", "token_type")


@dataclass(frozen=True)
class Ends:
    """The ends of one model.

    Attributes:
        embedding: Its tensor [vocabulary, hidden]; None where no name says which it is.
        heads: Stored tensors of that shape behind the layers.
        is_tied: Whether the head is the embedding.
    """

    embedding: str | None
    heads: tuple[str, ...]
    is_tied: bool


@dataclass(frozen=True)
class Head:
    """What the head of the result is made of.

    Attributes:
        name: Its tensor; None where the result has none of its own.
        stored: Names of heads that some of the models store; none of them is merged as it is.
        tensors: Reference of a model -> the tensor that is its head.
        is_tied: Whether the result's head is its embedding; None where that is for its configuration to say.
        note: What one should know of it.
    """

    name: str | None
    stored: frozenset[str]
    tensors: Mapping[str, str]
    is_tied: bool | None
    note: str | None = None


def is_vocabulary(member: Member, name: str) -> bool:
    """Tell whether the rows of a tensor outside the layers are the vocabulary."""
    shape = member.named[name].shape
    if not shape or shape[0] != member.vocab_size or any(part in name for part in _POSITIONS):
        return False
    return len(shape) == 2 or (len(shape) == 1 and name.endswith("bias"))


def find_ends(member: Member, layout: Layout) -> Ends:
    """Return the ends of a model."""
    rows = [name for name in layout.before if is_vocabulary(member, name) and _is_matrix(member, name)]
    embedding = rows[0] if rows else None
    heads = tuple(
        name
        for name in layout.after
        if embedding and member.named[name].shape == member.named[embedding].shape
    )
    tie = text_config(member.config).get(TIE, member.config.get(TIE))
    is_tied = bool(embedding) and (not heads if tie is None else bool(tie))
    return Ends(embedding, heads, is_tied)


def choose_head(slices: Sequence[Slice]) -> Head:
    """Return what the head of the result is made of.

    The last slice's models give it. A model that has none of its own (``tie_word_embeddings``) gives its embedding;
    where that holds for all of them, the result has none of its own either.
    """
    last = slices[-1].inputs
    ends = {given.member.reference: find_ends(given.member, given.layout) for given in last}
    stored = frozenset(name for found in ends.values() for name in found.heads)
    if all(found.is_tied for found in ends.values()):
        return Head(None, stored, {}, True, _note_of_embedding(slices))
    if not stored:
        return Head(None, stored, {}, None)
    name = next(found.heads[0] for found in ends.values() if found.heads)
    note = None
    if any(found.is_tied for found in ends.values()):
        tied = ", ".join(repr(reference) for reference, found in ends.items() if found.is_tied)
        note = f"The result has a head of its own ({name}); that of {tied} is the embedding (tie_word_embeddings)."
    tensors = {
        reference: found.embedding if found.is_tied and found.embedding else name
        for reference, found in ends.items()
    }
    return Head(name, stored, tensors, False, note)


def _note_of_embedding(slices: Sequence[Slice]) -> str | None:
    """Return what to say where the last layers are other models' than the embedding, which is the head."""
    first, last = (
        list(dict.fromkeys(given.member.reference for given in part.inputs))
        for part in (slices[0], slices[-1])
    )
    if set(first) == set(last):
        return None
    return (
        f"The head of the result is its embedding (tie_word_embeddings), which is that of "
        f"{', '.join(map(repr, first))}; its last layers are those of {', '.join(map(repr, last))}."
    )


def set_tie(config: dict[str, Any], is_tied: bool | None) -> None:
    """Write into a configuration whether the head is the embedding."""
    if is_tied is not None:
        config.update(with_settings(config, {TIE: is_tied}))


def _is_matrix(member: Member, name: str) -> bool:
    return len(member.named[name].shape) == 2
