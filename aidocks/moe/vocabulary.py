"""Vocabularies: whether models give their tokens the same numbers, and whose tokenizer the result has.

One vocabulary *extends* another when it has every token of it under the same number, and further ones after all of
them. Models fit together when, of base and expert, one extends the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aidocks.errors import IncompatibleModels, InvalidSpec
from aidocks.moe.dense import Member

# By content, of this process: a request is checked when it comes, when it is executed and when it is planned.
_known: dict[bytes, Mapping[str, int]] = {}
_MAX_KNOWN = 8
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_TOKENIZER_FIELD = "tokenizer_source"


@dataclass(frozen=True)
class Vocabulary:
    """What the numbers of a model's tokens mean.

    Attributes:
        member: The model.
        rows: Rows of its embedding; there may be more than tokens.
        tokens: Token -> number; None for a model without tokenizer.json.
        sentencepiece: The SentencePiece file of a model that has no tokenizer.json.
    """

    member: Member
    rows: int
    tokens: Mapping[str, int] | None
    sentencepiece: bytes | None


@dataclass(frozen=True)
class Extension:
    """Rows of the result's embedding that are not the base's: all from ``first`` on.

    Attributes:
        member: The model that has them.
        first: The first of them.
        rows: Rows of that model's embedding, and of the result's.
    """

    member: Member
    first: int
    rows: int


def read_vocabulary(member: Member, rows: int) -> Vocabulary:
    """Return a model's vocabulary.

    Args:
        member: The model.
        rows: Its ``vocab_size``.

    Raises:
        InvalidSpec: When tokenizer.json cannot be read.
    """
    fast, slow = (member.checkpoint.path / name for name in TOKENIZER_FILES)
    if fast.is_file():
        raw = fast.read_bytes()
        digest = hashlib.sha256(raw).digest()
        tokens = _known.get(digest)
        if tokens is None:
            tokens = _known[digest] = _parse(member, raw)
            while len(_known) > _MAX_KNOWN:
                del _known[next(iter(_known))]
        return Vocabulary(member, rows, tokens, None)
    return Vocabulary(member, rows, None, slow.read_bytes() if slow.is_file() else None)


def _parse(member: Member, raw: bytes) -> dict[str, int]:
    try:
        document = json.loads(raw)
        vocabulary = document["model"]["vocab"]
        if isinstance(vocabulary, list):  # a Unigram model lists its tokens with their scores
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        added = {token["content"]: int(token["id"]) for token in document.get("added_tokens") or ()}
        return {str(token): int(number) for token, number in (vocabulary | added).items()}
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidSpec(
            f"The tokenizer.json of {member.reference!r} cannot be read: {repr(error)[:200]}.",
            field=member.field,
            value=member.reference,
        ) from error


def check_vocabulary(expert: Vocabulary, base: Vocabulary) -> None:
    """Refuse an expert whose tokens mean something else than the base's.

    Raises:
        IncompatibleModels: Naming the first token and both its numbers.
    """
    member = expert.member
    hint = "An expert must have learned with the base's tokenizer, or with one that extends it."
    names = f"{member.reference!r} and the base {base.member.reference!r} have different tokenizers"
    if expert.tokens is not None and base.tokens is not None:
        token = _conflict(expert.tokens, base.tokens)
        if token is not None:
            here, there = _number(expert.tokens, token), _number(base.tokens, token)
            raise member.refuse(
                f"{names}: the token {token!r} is {here} in one and {there} in the other.", hint
            )
        return
    if None not in (expert.sentencepiece, base.sentencepiece) and expert.sentencepiece != base.sentencepiece:
        raise member.refuse(f"{names}: their tokenizer.model files differ.", hint)
    # A model that has no tokenizer of its own, or one of the other form, is known by the size of its vocabulary.
    if expert.rows != base.rows:
        raise member.refuse(
            f"vocab_size is {expert.rows} in {member.reference!r}, but {base.rows} in the base "
            f"{base.member.reference!r}, and there are no two files tokenizer.json to compare.",
            hint,
        )


def choose_tokenizer(source: str, base: Vocabulary, others: Sequence[Vocabulary]) -> Vocabulary:
    """Return the vocabulary of the result: the base's or one that extends it.

    Args:
        source: ``tokenizer_source`` of the request.
        base: The base's.
        others: The experts', each checked against the base's.

    Raises:
        InvalidSpec: For a name that is none of the models', or whose tokenizer is not more than the base's.
        IncompatibleModels: For ``union``, where no vocabulary extends all others.
    """
    if source in ("base", base.member.reference):
        return base
    if source == "union":
        return _union(base, others)
    named = next((other for other in others if other.member.reference == source), None)
    if named is None:
        references = sorted({other.member.reference for other in others})
        raise InvalidSpec(
            f"The tokenizer of {source!r} is asked for, which is none of the request's models.",
            field=_TOKENIZER_FIELD,
            value=source,
            hint=f"Use 'base', 'union', or one of {references}.",
        )
    if named.tokens is None or base.tokens is None:
        reason = f"{(named if named.tokens is None else base).member.reference!r} has no tokenizer.json"
    elif lacking := base.tokens.keys() - named.tokens.keys():
        reason = f"it does not know the base's token {min(lacking)!r}"
    else:
        return named
    raise InvalidSpec(
        f"The tokenizer of {source!r} cannot be the result's: {reason}.",
        field=_TOKENIZER_FIELD,
        value=source,
        hint="Use 'base' or 'union'.",
    )


def _union(base: Vocabulary, others: Sequence[Vocabulary]) -> Vocabulary:
    if base.tokens is None:
        return base
    known = [(one, one.tokens) for one in (base, *others) if one.tokens is not None]
    largest, tokens = max(known, key=lambda pair: len(pair[1]))
    for other, fewer in known:
        token = _conflict(tokens, fewer)
        if token is not None:
            raise IncompatibleModels(
                f"There is no union of the tokenizers of {largest.member.reference!r} and "
                f"{other.member.reference!r}: the token {token!r} is {_number(tokens, token)} in one and "
                f"{_number(fewer, token)} in the other.",
                field=_TOKENIZER_FIELD,
                value="union",
                hint="Use 'base', or the source_model of the expert whose tokens matter.",
            )
    return largest


def find_extension(base: Vocabulary, chosen: Vocabulary) -> Extension | None:
    """Return which rows of the embedding are the chosen model's; None where all are the base's.

    Raises:
        IncompatibleModels: When the chosen model has tokens without rows.
    """
    further = further_tokens(chosen, base)
    if not further:
        return None
    assert chosen.tokens is not None
    last = max(further, key=chosen.tokens.__getitem__)
    if chosen.tokens[last] >= chosen.rows:
        raise chosen.member.refuse(
            f"The token {last!r} of {chosen.member.reference!r} is number {chosen.tokens[last]}, but its tensor "
            f"model.embed_tokens.weight has {chosen.rows} rows."
        )
    # The base may have rows without tokens, which only fill its embedding up: tokens win.
    return Extension(chosen.member, min(chosen.tokens[further[0]], base.rows), chosen.rows)


def further_tokens(vocabulary: Vocabulary, base: Vocabulary) -> list[str]:
    """Return the tokens that a vocabulary has beside the base's, by their numbers."""
    if vocabulary.tokens is None or base.tokens is None or vocabulary.tokens is base.tokens:
        return []
    return sorted(vocabulary.tokens.keys() - base.tokens.keys(), key=vocabulary.tokens.__getitem__)


def _conflict(one: Mapping[str, int], other: Mapping[str, int]) -> str | None:
    """Return a token that keeps either vocabulary from extending the other; None when one does."""
    if one is other or one == other:
        return None
    moved = [token for token, number in one.items() if other.get(token, number) != number]
    if moved:
        return min(moved, key=lambda token: (other[token], token))
    only_one, only_other = one.keys() - other.keys(), other.keys() - one.keys()
    if only_one and only_other:
        return min(only_other, key=lambda token: (other[token], token))
    larger, smaller = (one, other) if only_one else (other, one)
    first = min(only_one or only_other, key=lambda token: (larger[token], token))
    return first if larger[first] <= max(smaller.values(), default=-1) else None


def _number(tokens: Mapping[str, int], token: str) -> str:
    return f"number {tokens[token]}" if token in tokens else "unknown"
