"""Texts to measure on: the shipped prose, a user's file or example texts, and how they split into two disjoint halves.

One half, *search*, is for everything that learns or chooses; the other, *held out*, is for what is reported. A text of
many records is divided by records, so that no record has tokens on both sides; one long text is divided by chunks.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from aidocks.errors import InvalidSpec
from aidocks.models.resolve import path_below

Split = Literal["search", "held_out"]

_SHIPPED = Path(__file__).parent / "texts"
NAMED_TEXTS = {"prose": _SHIPPED / "prose.txt"}
_SUFFIXES = (".txt", ".jsonl")
_MAX_BYTES = 1 << 30
#: Tokens are at most so many characters long on average in any text that is worth measuring on.
CHARACTERS_PER_TOKEN = 16
#: A deal of records is fair where its shares of the characters are off by at most this.
_TOLERANCE = 0.15
_BETWEEN_RECORDS = "\n\n"


class TextSource(BaseModel):
    """A text, as a unit names it: by the name of a shipped one, by path and content hash, or by its records."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="`prose`, the file's name, or what `records` are called.")
    path: Path | None = Field(None, description="The file; None for a shipped text and for mere records.")
    sha256: str | None = Field(None, description="Hash of the file, so that changed content is other work.")
    records: tuple[str, ...] = Field((), description="Texts of a request, beside those of the file.")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given


#: Name of the domain that no expert is for.
COMMON = "text"


class Domain(BaseModel):
    """One text of an evaluation, and how much of it is taken."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="`experts[i]` for that expert's example texts, `text` for the common text.")
    text: TextSource
    chunks: int = Field(ge=1, description="Chunks to take of one half of the text.")


class Halves(NamedTuple):
    """How many whole chunks each half of a text holds."""

    search: int
    held_out: int


def resolve_text(reference: str, allowed_roots: Sequence[Path], *, field: str | None = "text") -> TextSource:
    """Turn what a request says into a text that exists and is not empty.

    Args:
        reference: A shipped text's name, or the path of a .txt or .jsonl file; a bare file name is a path too.
        allowed_roots: Directories below which a request may name a file.
        field: Spec field to blame.

    Raises:
        InvalidSpec: For an unknown name, another suffix, a missing or empty file, or lines without ``text``.
        PathNotAllowed: For a file outside the allowed roots, also by way of ``..`` or a symbolic link.
    """
    if reference in NAMED_TEXTS:
        return TextSource(name=reference)
    if not reference.startswith("~") and "/" not in reference and not reference.endswith(_SUFFIXES):
        raise InvalidSpec(
            f"There is no text called {reference!r}.",
            field=field,
            value=reference,
            hint=f"Known: {', '.join(sorted(NAMED_TEXTS))}; or give the path of a .txt or .jsonl file.",
        )
    path = allowed_file(reference, allowed_roots, field)
    source = TextSource(name=path.name, path=path, sha256=hash_of(path))
    if not read_text(source, field=field).strip():
        raise InvalidSpec(f"The text {reference!r} is empty.", field=field, value=reference)
    return source


def allowed_file(
    reference: str,
    allowed_roots: Sequence[Path],
    field: str | None,
    *,
    what: str = "text",
    shipped: str = "prose",
    suffixes: Sequence[str] = _SUFFIXES,
    most_bytes: int = _MAX_BYTES,
) -> Path:
    """Return the path of a file that a request names.

    Args:
        reference: As in the request.
        allowed_roots: Directories below which a request may name a file.
        field: Spec field to blame.
        what: What the file is, for people.
        shipped: Name of one that is shipped, to be used instead.
        suffixes: Of such files.
        most_bytes: Size of such files at most.

    Raises:
        InvalidSpec: For another suffix, a missing file, or one that is too large.
        PathNotAllowed: For a file outside the allowed roots, also by way of ``..`` or a symbolic link.
    """
    hint = f"Move it below a directory of AIDOCKS_ALLOWED_ROOTS, or use the {what} '{shipped}'."
    path = path_below(reference, allowed_roots, field, hint)
    if path.suffix not in suffixes:
        raise InvalidSpec(
            f"The {what} {reference!r} is {_no_such_file(suffixes)}.", field=field, value=reference
        )
    if not path.is_file():
        raise InvalidSpec(f"The file {reference!r} does not exist.", field=field, value=reference)
    if path.stat().st_size > most_bytes:
        raise InvalidSpec(
            f"The file {reference!r} is larger than {most_bytes >> 20} MiB.",
            field=field,
            value=reference,
            hint="Some hundred kilobytes are enough to measure on.",
        )
    return path


def hash_of(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_of(path: Path, source: TextSource, field: str | None) -> str:
    """Return what the file of a text or set holds, with every line's end as a line feed.

    Raises:
        InvalidSpec: For a file that cannot be read, is not UTF-8, or is not what it was when it got its hash.
    """
    try:
        content = path.read_bytes()
        text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8").read()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSpec(f"Cannot read {path.name}: {error}.", field=field, value=source.name) from error
    if source.sha256 is not None and hashlib.sha256(content).hexdigest() != source.sha256:
        raise InvalidSpec(
            f"The file {path.name} has changed since the job was submitted.",
            field=field,
            value=source.name,
            hint="Submit the job again, and leave its files as they are until it ends.",
        )
    return text


def _no_such_file(suffixes: Sequence[str]) -> str:
    if len(suffixes) == 1:
        return f"no {suffixes[0]} file"
    return f"neither a {' nor a '.join(suffixes)} file"


def read_text(source: TextSource, *, field: str | None = "text") -> str:
    """Return the whole text; its records are joined by blank lines. Raises as :func:`read_records`."""
    return _BETWEEN_RECORDS.join(read_records(source, field=field))


def read_records(source: TextSource, *, field: str | None = "text") -> list[str]:
    """Return the records of a text in order: the lines of a .jsonl file, a whole .txt file as one, and its own.

    Raises:
        InvalidSpec: For a name that does not exist, a line without a text, and as :func:`content_of`.
    """
    path = source.path or (None if source.records else NAMED_TEXTS.get(source.name))
    if path is None and not source.records:
        raise InvalidSpec(
            f"There is no text called {source.name!r}.",
            field=field,
            value=source.name,
            hint=f"Known: {', '.join(sorted(NAMED_TEXTS))}.",
        )
    return [*(_read_file(path, source, field) if path else ()), *source.records]


def _read_file(path: Path, source: TextSource, field: str | None) -> list[str]:
    content = content_of(path, source, field)
    if path.suffix != ".jsonl":
        return [content]
    return [
        _record_text(line, number, path.name, field)
        for number, line in enumerate(content.splitlines(), start=1)
        if line.strip()
    ]


def divide(source: TextSource) -> tuple[str, ...]:
    """Return a text in two parts, search and held out, of whole records; or in one where records are too few.

    Records are dealt by the hash of what they say, so one that occurs twice is never on both sides, and the two parts
    are the same for every seed and every model. Where no such deal gives both parts a fair share of the characters (a
    single long text, for instance), the text stays whole and :func:`choose_chunks` divides its chunks.

    Raises:
        InvalidSpec: As :func:`read_records`.
    """
    records = read_records(source, field=None)
    return tuple(map(_BETWEEN_RECORDS.join, _deal(records, 0.5) or (records,)))


def divide_in_four(source: TextSource, shares: tuple[float, float]) -> tuple[str, ...]:
    """Return a text in four parts that share no record: the halves of :func:`divide`, each divided in the same way.

    Args:
        source: The text.
        shares: What the first part has of each half's characters.

    Returns:
        The four parts, of which the first of a half is empty where the half's records are too few to divide it; or the
        whole text alone, where :func:`divide` does not divide it.

    Raises:
        InvalidSpec: As :func:`read_records`.
    """
    records = read_records(source, field=None)
    halves = _deal(records, 0.5)
    if halves is None:
        return (_BETWEEN_RECORDS.join(records),)
    parts = (_deal(half, share) or ([], half) for half, share in zip(halves, shares, strict=True))
    return tuple(_BETWEEN_RECORDS.join(part) for pair in parts for part in pair)


def _deal(records: Sequence[str], share: float) -> tuple[list[str], list[str]] | None:
    """Deal records by their hash so that the first part has about this share of the characters; None if none can."""
    sizes = {record: count * len(record) for record, count in Counter(records).items()}
    total = sum(sizes.values())
    filled, chosen = 0.0, set()
    for record in sorted(sizes, key=lambda text: hashlib.sha256(text.encode("utf-8", "replace")).digest()):
        if filled + sizes[record] / 2 <= share * total:
            chosen.add(record)
            filled += sizes[record]
    if not total or not share - _TOLERANCE <= filled / total <= share + _TOLERANCE:
        return None
    return [r for r in records if r in chosen], [r for r in records if r not in chosen]


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
    counted = _count_parts(model, text, length, chunks)
    if counted is not None:
        choose_chunks(sum(counted), split, chunks, seed, counted[0] if len(counted) > 1 else None)


def count_chunks(model: Path, text: TextSource, length: int, *, at_most: int | None = None) -> Halves | None:
    """Count the whole chunks in both halves of a text, with the model's own tokenizer and without torch.

    Args:
        model: Checkpoint directory.
        length: Of a chunk, in tokens.
        at_most: Stop somewhere above so many chunks of each half: of a long text only its beginning is read then.

    Returns:
        The counts; None when the model has no ``tokenizer.json``, so that only loading it would tell.
    """
    counted = _count_parts(model, text, length, at_most)
    if counted is None:
        return None
    return Halves(counted[0] // 2, counted[0] // 2) if len(counted) == 1 else Halves(*counted)


def _count_parts(model: Path, text: TextSource, length: int, at_most: int | None) -> list[int] | None:
    parts = divide(text)
    enough = None if at_most is None else 2 * at_most * length * CHARACTERS_PER_TOKEN // len(parts)
    return count_whole(model, [part[:enough] for part in parts], length)


def count_whole(model: Path, parts: Sequence[str], length: int) -> list[int] | None:
    """Count the whole chunks in each of several texts. Arguments and None as for :func:`count_chunks`."""
    file = model / "tokenizer.json"
    if not file.is_file():
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    # Some tools leave the settings of their last batch in the file.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return [len(tokenizer.encode(part, add_special_tokens=False).ids) // length for part in parts]


def choose_chunks(
    available: int, split: Split, chunks: int, seed: int = 0, boundary: int | None = None
) -> list[int]:
    """Choose which chunks of a tokenised text to take of a split.

    Chunks are ordered by a hash. Of a text in one part the first half is for searching and the second is held out; so
    the splits of one seed never overlap, whatever ``chunks`` is. Of a text that :func:`divide` divided, each part's
    chunks are its split's, whatever the seed. Asking for more chunks keeps those that a smaller number would give.

    Args:
        available: Whole chunks in the text.
        split: Which half.
        chunks: How many chunks to take.
        seed: Chooses another ordering.
        boundary: Of a divided text, how many of the chunks, the first ones, are of its first part.

    Returns:
        Positions in ascending order.

    Raises:
        InvalidSpec: When the half does not hold so many chunks.
    """
    members = order_chunks(available, split, seed, boundary)
    if boundary is None:
        held = f"The text holds {available} whole chunks, half for each split"
    else:
        held = f"The {split.replace('_', '-')} half of the text's records holds {len(members)} whole chunks"
    if chunks > len(members):
        raise InvalidSpec(
            f"{held}, but {chunks} are asked for.",
            field="chunks",
            value=chunks,
            hint=f"Use at most {len(members)} chunks, shorter ones (`seqlen`), or a longer text."
            if members
            else "Use a longer text or shorter chunks (`seqlen`).",
        )
    return sorted(members[:chunks])


def order_chunks(available: int, split: Split, seed: int = 0, boundary: int | None = None) -> list[int]:
    """Return the positions of all chunks of a split, ordered by a hash. Arguments as for :func:`choose_chunks`.

    Whatever is taken from the beginning and whatever is taken after it are disjoint, and samples of the split alike.
    """
    shuffled = sorted(range(available), key=lambda i: hashlib.sha256(f"{seed}/{i}".encode()).digest())
    if boundary is None:
        half = available // 2
        return shuffled[:half] if split == "search" else shuffled[half : 2 * half]
    return [position for position in shuffled if (position < boundary) == (split == "search")]
