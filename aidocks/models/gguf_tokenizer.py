"""The tokenizer of a GGUF file, rebuilt from the file's own vocabulary and written for transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aidocks.errors import CorruptCheckpoint, IncompatibleModels

_CONTROL, _USER_DEFINED = 3, 4

#: What a tokenizer must give back unchanged: runs of blanks, digits, contractions, scripts, line ends.
PROBES = (
    "Hello world",
    "  x =  12345;\n\n\tif it's 3.5 or 1,000:\r\n",
    "Grüße, 日本語, עברית, mañana 🙂🏽",
    "def f(a1, b22):  # don't\n        return a1**2",
)


def write_tokenizer(fields: Mapping[str, Any], directory: Path, context_length: int) -> dict[str, int]:
    """Write tokenizer files to ``directory``, read them back with transformers, and check both.

    Args:
        fields: Key-value pairs of the GGUF file.
        directory: Model directory.
        context_length: Longest input in tokens.

    Returns:
        Special token ids, as ``config.json`` names them.

    Raises:
        IncompatibleModels: For a kind of tokenizer that cannot be rebuilt exactly.
        CorruptCheckpoint: For a vocabulary that contradicts itself, or that loses text.
    """
    from transformers import AutoTokenizer

    tokenizer = build_tokenizer(fields)
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    ids = {
        key: int(fields[f"tokenizer.ggml.{name}_token_id"])
        for key, name in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding"))
        if f"tokenizer.ggml.{name}_token_id" in fields
    }
    special = {key.removesuffix("_id"): tokens[number] for key, number in ids.items()}
    if "tokenizer.ggml.unknown_token_id" in fields:
        special["unk_token"] = tokens[int(fields["tokenizer.ggml.unknown_token_id"])]
    config = special | {
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        # The name under which every version of transformers takes tokenizer.json as it is.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    if template := fields.get("tokenizer.chat_template"):
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    _check(tokenizer, AutoTokenizer.from_pretrained(directory, local_files_only=True))
    return ids


def build_tokenizer(fields: Mapping[str, Any]) -> Any:
    """Return the ``tokenizers.Tokenizer`` that a GGUF file describes. Raises as :func:`write_tokenizer`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    splitter = _splitter(fields)
    tokens = fields.get("tokenizer.ggml.tokens") or []
    kinds = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [_pair(merge) for merge in fields.get("tokenizer.ggml.merges") or []]
    if len(vocabulary) != len(tokens) or len(kinds) != len(tokens) or not tokens:
        raise CorruptCheckpoint("The GGUF file's vocabulary is empty, or names a token twice.")
    try:
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    except Exception as error:  # the library raises nothing more specific
        raise CorruptCheckpoint(f"The GGUF file's merges do not fit its vocabulary: {error}") from error
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    for kind, is_special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(token, special=is_special, normalized=False)
            for token, its_kind in zip(tokens, kinds, strict=True)
            if its_kind == kind
        ]
        tokenizer.add_special_tokens(added) if is_special else tokenizer.add_tokens(added)
    if fields.get("tokenizer.ggml.add_bos_token"):
        number = int(fields["tokenizer.ggml.bos_token_id"])
        first = tokens[number]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A {first} $B", special_tokens=[(first, number)]
        )
    return tokenizer


def _splitter(fields: Mapping[str, Any]) -> Any:
    """Return the rule by which text is cut before merging; a GGUF file only names it."""
    from tokenizers import pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    known = {
        "gpt-2": byte_level,
        # Every digit stands alone, and that is decided before blanks are attached to what follows them.
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
    }
    model, name = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if model != "gpt2" or name not in known:
        raise IncompatibleModels(
            f"This file's tokenizer (model {model!r}, splitting rule {name!r}) cannot be rebuilt exactly.",
            value=name,
            hint=f"Known: model 'gpt2' with one of {', '.join(sorted(known))}.",
        )
    return known[name]


def _pair(merge: str) -> tuple[str, str]:
    left, blank, right = merge.partition(" ")
    if not (left and blank and right) or " " in right:
        raise CorruptCheckpoint(f"The GGUF file has a merge that is not a pair: {merge!r}.", value=merge)
    return left, right


def _check(built: Any, loaded: Any) -> None:
    for probe in PROBES:
        ids = built.encode(probe, add_special_tokens=False).ids
        if built.decode(ids, skip_special_tokens=False) != probe:
            raise CorruptCheckpoint(
                "The GGUF file's vocabulary does not give text back unchanged.", value=probe
            )
        # transformers may rebuild a tokenizer of a class that it knows by rules of its own.
        again = loaded(probe, add_special_tokens=False)["input_ids"]
        assert again == ids, f"transformers reads {probe!r} as {again}, not {ids}"
