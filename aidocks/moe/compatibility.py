"""What must be true of base, experts and text before any work begins. Reads headers and settings only."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aidocks.errors import InvalidSpec
from aidocks.evaluate.texts import TextSource, require_chunks, require_context
from aidocks.moe.dense import (
    COMPARED,
    DenseConfig,
    Member,
    check_no_more_tensors,
    check_tensors,
    mlp_shapes,
    read_dense,
    shared_shapes,
)
from aidocks.specs.moe import MoESpec

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def check_members(base: Member, experts: Sequence[Member]) -> DenseConfig:
    """Return the configuration of the base, if everything fits together.

    Raises:
        IncompatibleModels: Naming the field, the first thing that differs, and both values.
    """
    config = read_dense(base)
    check_tensors(base, shared_shapes(config))
    check_no_more_tensors(base, config)
    if not any((base.checkpoint.path / name).is_file() for name in _TOKENIZER_FILES):
        raise base.refuse(f"The model {base.reference!r} has no tokenizer ({' or '.join(_TOKENIZER_FILES)}).")
    vocabulary = _Vocabulary(base.checkpoint.path)
    checked = {base.checkpoint.path: False}
    for expert in experts:
        # The base may be an expert, and a model may be several: each is looked at once.
        if expert.checkpoint.path not in checked:
            _check_like_base(expert, read_dense(expert), base, config)
            _check_vocabulary(expert, base, vocabulary)
        if not checked.get(expert.checkpoint.path):
            check_tensors(expert, mlp_shapes(config))
            checked[expert.checkpoint.path] = True
    return config


def _check_like_base(expert: Member, config: DenseConfig, base: Member, expected: DenseConfig) -> None:
    for name in COMPARED:
        found, wanted = getattr(config, name), getattr(expected, name)
        if not _same(found, wanted):
            raise expert.refuse(
                f"{name} is {_shown(found)} in {expert.reference!r}, but {_shown(wanted)} in the base "
                f"{base.reference!r}.",
                "Experts are fine-tunes of one base, or share its shape.",
            )
    check_no_more_tensors(expert, config)


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        return found.keys() == wanted.keys() and all(_same(found[key], wanted[key]) for key in found)
    if isinstance(found, float) and isinstance(wanted, int | float):
        # Some writers store float32 values, with more decimals: 9.999999747378752e-06 is 1e-05.
        return math.isclose(found, wanted, rel_tol=1e-6)
    return bool(found == wanted)


def _shown(value: Any) -> str:
    return json.dumps(value if isinstance(value, int | float | str) or value is None else dict(value))


class _Vocabulary:
    """Token -> id of a model, or its SentencePiece file where that is all there is."""

    def __init__(self, path: Path) -> None:
        self.tokens: dict[str, int] | None = None
        self.sentencepiece: bytes | None = None
        if (path / "tokenizer.json").is_file():
            self.tokens = _read_tokens(path / "tokenizer.json")
        elif (path / "tokenizer.model").is_file():
            self.sentencepiece = (path / "tokenizer.model").read_bytes()


def _read_tokens(path: Path) -> dict[str, int]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = document["model"]["vocab"]
        if isinstance(vocabulary, list):  # a Unigram model lists its tokens with their scores
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        added = {token["content"]: int(token["id"]) for token in document.get("added_tokens") or ()}
        return {str(token): int(number) for token, number in (vocabulary | added).items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidSpec(f"{path.parent.name}/tokenizer.json cannot be read: {error!r}.") from error


def _check_vocabulary(expert: Member, base: Member, wanted: _Vocabulary) -> None:
    found = _Vocabulary(expert.checkpoint.path)
    names = f"{expert.reference!r} and the base {base.reference!r} have different tokenizers"
    hint = "The result has the base's tokenizer, so an expert must have learned with the same one."
    if found.tokens is not None and wanted.tokens is not None:
        if found.tokens == wanted.tokens:
            return
        token = min(
            (
                t
                for t in found.tokens.keys() | wanted.tokens.keys()
                if found.tokens.get(t) != wanted.tokens.get(t)
            ),
            key=lambda t: (wanted.tokens.get(t, len(wanted.tokens)), t) if wanted.tokens else (0, t),
        )
        here, there = _number(found.tokens, token), _number(wanted.tokens, token)
        raise expert.refuse(f"{names}: the token {token!r} is {here} in one and {there} in the other.", hint)
    # A model that has no tokenizer of its own, or one of the other form, is known by its vocabulary size.
    if (
        None not in (found.sentencepiece, wanted.sentencepiece)
        and found.sentencepiece != wanted.sentencepiece
    ):
        raise expert.refuse(f"{names}: their tokenizer.model files differ.", hint)


def _number(tokens: dict[str, int], token: str) -> str:
    return f"number {tokens[token]}" if token in tokens else "unknown"


def check_text(base: Member, config: DenseConfig, text: TextSource, spec: MoESpec) -> None:
    """Refuse a text that is too short or chunks that are too long.

    Raises:
        InvalidSpec: Saying how many chunks there are, or how long they may be.
    """
    require_context(base.reference, config.max_position_embeddings, spec.seqlen)
    require_chunks(base.checkpoint.path, text, "held_out", spec.chunks, spec.seqlen, spec.seed)
