"""Texts to measure on: the shipped prose or a user's file, and how their chunks split into disjoint sets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from aidocks.errors import InvalidSpec
from aidocks.models.resolve import path_below

Split = Literal["search", "held_out"]

_SHIPPED = Path(__file__).parent / "texts"
NAMED_TEXTS = {"prose": _SHIPPED / "prose.txt"}
_MAX_BYTES = 1 << 30
#: Tokens are at most so many characters long on average in any text that is worth measuring on.
_CHARACTERS_PER_TOKEN = 16


class TextSource(BaseModel):
    """A text, as a unit names it: by the name of a shipped one, or by path and content hash."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="`prose`, or the file's name.")
    path: Path | None = Field(None, description="The file; None for a shipped text.")
    sha256: str | None = Field(None, description="Hash of the file, so that changed content is other work.")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given


def resolve_text(reference: str, allowed_roots: Sequence[Path], *, field: str | None = "text") -> TextSource:
    """Turn what a request says into a text that exists and is not empty.

    Args:
        reference: A shipped text's name, or the path of a .txt or .jsonl file.
        allowed_roots: Directories below which a request may name a file.
        field: Spec field to blame.

    Raises:
        InvalidSpec: For an unknown name, another suffix, a missing or empty file, or lines without ``text``.
        PathNotAllowed: For a file outside the allowed roots, also by way of ``..`` or a symbolic link.
    """
    if reference in NAMED_TEXTS:
        return TextSource(name=reference)
    if not reference.startswith(("/", "./", "../", "~")) and "/" not in reference:
        raise InvalidSpec(
            f"There is no text called {reference!r}.",
            field=field,
            value=reference,
            hint=f"Known: {', '.join(sorted(NAMED_TEXTS))}; or give the path of a .txt or .jsonl file.",
        )
    path = _allowed_file(reference, allowed_roots, field)
    source = TextSource(name=path.name, path=path, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    if not read_text(source, field=field).strip():
        raise InvalidSpec(f"The text {reference!r} is empty.", field=field, value=reference)
    return source


def _allowed_file(reference: str, allowed_roots: Sequence[Path], field: str | None) -> Path:
    hint = "Move it below a directory of AIDOCKS_ALLOWED_ROOTS, or use the text 'prose'."
    path = path_below(reference, allowed_roots, field, hint)
    if path.suffix not in (".txt", ".jsonl"):
        raise InvalidSpec(
            f"The text {reference!r} is neither a .txt nor a .jsonl file.", field=field, value=reference
        )
    if not path.is_file():
        raise InvalidSpec(f"The file {reference!r} does not exist.", field=field, value=reference)
    if path.stat().st_size > _MAX_BYTES:
        raise InvalidSpec(
            f"The file {reference!r} is larger than {_MAX_BYTES >> 20} MiB.",
            field=field,
            value=reference,
            hint="A perplexity needs some hundred kilobytes of text.",
        )
    return path


def read_text(source: TextSource, *, field: str | None = "text") -> str:
    """Return the whole text; the records of a .jsonl file are joined by blank lines.

    Raises:
        InvalidSpec: For a name that does not exist, a file that is not UTF-8, or a line without a text.
    """
    path = source.path or NAMED_TEXTS.get(source.name)
    if path is None:
        raise InvalidSpec(
            f"There is no text called {source.name!r}.",
            field=field,
            value=source.name,
            hint=f"Known: {', '.join(sorted(NAMED_TEXTS))}.",
        )
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSpec(f"Cannot read {path.name}: {error}.", field=field, value=source.name) from error
    if path.suffix != ".jsonl":
        return content
    return "\n\n".join(
        _record_text(line, number, path.name, field)
        for number, line in enumerate(content.splitlines(), start=1)
        if line.strip()
    )


def _record_text(line: str, number: int, name: str, field: str | None) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise InvalidSpec(
            f"Line {number} of {name} is not a JSON object with a text.",
            field=field,
            value=name,
            hint='Each line must look like {"text": "..."}.',
        )
    return text


def require_context(reference: str, context: int, length: int) -> None:
    """Refuse chunks that are longer than what a model can see at once.

    Args:
        reference: The model, as the request names it.
        context: Its longest input, in tokens.
        length: Of a chunk, in tokens.

    Raises:
        InvalidSpec: Saying how long they may be.
    """
    if length > context:
        raise InvalidSpec(
            f"A chunk of {length} tokens is longer than the context of {reference!r}.",
            field="seqlen",
            value=length,
            hint=f"At most {context}.",
        )


def require_chunks(model: Path, text: TextSource, split: Split, chunks: int, length: int, seed: int) -> None:
    """Refuse a text that is too short, counted with the model's own tokenizer where that needs no torch.

    Args:
        model: Checkpoint directory.
        length: Of a chunk, in tokens.

    Raises:
        InvalidSpec: Saying how many chunks there are.
    """
    file = model / "tokenizer.json"
    if not file.is_file():
        return
    from tokenizers import Tokenizer

    enough = 2 * chunks * length * _CHARACTERS_PER_TOKEN
    ids = Tokenizer.from_file(str(file)).encode(read_text(text)[:enough], add_special_tokens=False).ids
    choose_chunks(len(ids) // length, split, chunks, seed)


def choose_chunks(available: int, split: Split, chunks: int, seed: int = 0) -> list[int]:
    """Choose which chunks of a tokenised text belong to a split.

    Positions are ordered by a hash; the first half is for searching, the second is held out. So the splits
    never overlap, whatever ``chunks`` is, and asking for more chunks keeps those that a smaller number
    would give.

    Args:
        available: Whole chunks in the text.
        split: Which half.
        chunks: How many chunks to take.
        seed: Chooses another ordering.

    Returns:
        Positions in ascending order.

    Raises:
        InvalidSpec: When the half does not hold so many chunks.
    """
    half = available // 2
    if chunks > half:
        raise InvalidSpec(
            f"The text holds {available} whole chunks, half for each split, but {chunks} are asked for.",
            field="chunks",
            value=chunks,
            hint=f"Use at most {half} chunks, shorter ones (`seqlen`), or a longer text."
            if half
            else "Use a longer text or shorter chunks (`seqlen`).",
        )
    shuffled = sorted(range(available), key=lambda i: hashlib.sha256(f"{seed}/{i}".encode()).digest())
    members = shuffled[:half] if split == "search" else shuffled[half : 2 * half]
    return sorted(members[:chunks])
