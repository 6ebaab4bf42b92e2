"""What a unit measures on: a metric, its data, and which of four disjoint parts of them serves what.

*Calibration* is for what is learned (second moments, gradients), *search* for what is chosen, *held out* for whether
the choice stands, *report* for the figures that are told. The search half of a text holds the first two, the other
half the last two. A text of many records is dealt by records, so that no record has tokens in two parts; of a text of
few, the chunks of each half are dealt. A set's records are dealt by the hash of what they ask.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from aidocks.errors import InvalidSpec
from aidocks.evaluate.questions import read_set, resolve_set
from aidocks.evaluate.texts import (
    CHARACTERS_PER_TOKEN,
    Split,
    TextSource,
    count_whole,
    divide_in_four,
    order_chunks,
    resolve_text,
)
from aidocks.specs.objective import Metric, Objective

Part = Literal["calibration", "search", "held_out", "report"]
PARTS: tuple[Part, ...] = get_args(Part)

#: Fewer items tell nothing: a search and a calibration of a text take at least so many.
LEAST_ITEMS = 8
#: Items of the parts of a text, where the request leaves their number open and the text has so many.
_CHUNKS: dict[Part, int] = {"calibration": 96, "search": 128, "held_out": 128, "report": 128}
#: Where the records of a set go: shares, in the order in which their hashes fall into them.
_SHARES: dict[Part, float] = {"calibration": 0.2, "search": 0.3, "held_out": 0.25, "report": 0.25}
#: What calibration has of a text's search half, and the held-out part of its other half.
_SHARES_OF_HALVES = (0.4, 0.5)
#: A gradient or a second moment gains nothing from more.
_MOST_CALIBRATION = 256


class ObjectiveSource(BaseModel):
    """An objective as units carry it.

    Attributes:
        metric: What is measured.
        text: The text, or the set of questions or preferences.
        seq_length: Tokens of a chunk of a text; a set's records are as long as they are.
        seed: Deals chunks and records of a set among the parts in another way. To which part a record of a text
            belongs is the same for all seeds.
        sizes: Items of each part: chunks of a text, records of a set. Empty before :func:`size_objective`.
        characters: Of each piece of a text (see :func:`pieces_of`), at most so many are read; None for all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: Metric
    text: TextSource
    seq_length: int = Field(128, ge=2)
    seed: int = 0
    sizes: dict[Part, int] = Field(default_factory=dict)
    characters: int | None = None

    @property
    def label(self) -> str:
        return f"{self.metric.replace('_', '-')} on {self.text.name}"


def resolve_objective(
    objective: Objective,
    allowed_roots: Sequence[Path],
    *,
    seq_length: int = 128,
    seed: int = 0,
    chunks: int | None = None,
    field: str = "objective",
) -> ObjectiveSource:
    """Turn what a request says into data that exist and suit the metric; how many they are is not known yet.

    Args:
        objective: As requested.
        allowed_roots: Directories below which a request may name a file.
        seq_length: Tokens of a chunk of a text.
        seed: See :class:`ObjectiveSource`.
        chunks: Chunks of the search, if the request says.
        field: Spec field to blame.

    Raises:
        InvalidSpec: For data that are missing, empty, of a wrong form, or not of the metric's kind.
        PathNotAllowed: For a file outside the allowed roots.
    """
    if objective.metric == "perplexity":
        text = resolve_text(objective.data, allowed_roots, field=field)
        _require_enough(chunks)
    else:
        text = resolve_set(objective.data, allowed_roots, field=field)
        preferences = read_set(text, field=field).are_preferences
        if preferences != (objective.metric == "preference"):
            raise InvalidSpec(
                f"{objective.data!r} holds {'preferences' if preferences else 'questions'}, "
                f"of which there is no {objective.metric}.",
                field=field,
                value=str(objective),
                hint="Use the metric 'preference'." if preferences else "Use 'accuracy' or 'log_likelihood'.",
            )
    return ObjectiveSource(metric=objective.metric, text=text, seq_length=seq_length, seed=seed)


def size_objective(
    source: ObjectiveSource, model_dir: Path, *, chunks: int | None = None, field: str = "objective"
) -> ObjectiveSource:
    """Return the source with the sizes of its parts; a text's tokens are counted without torch.

    Of a long text only so much of each piece is counted, and read later on, as surely holds enough.

    Args:
        source: As :func:`resolve_objective` returns it.
        model_dir: Checkpoint directory, whose tokenizer counts.
        chunks: Chunks of the search part of a text; None for as many as are useful. Without effect on a set.
        field: Spec field to blame for data that are too few.

    Raises:
        InvalidSpec: For data that are too few for four parts; of ``chunks``, where that asks for too many or too few.
    """
    if source.metric == "perplexity":
        _require_enough(chunks)
        pieces = divide_in_four(source.text, _SHARES_OF_HALVES)
        enough = max(2 * _CHUNKS["report"], (chunks or 0) + max(chunks or 0, _CHUNKS["calibration"]))
        characters = 2 * enough * source.seq_length * CHARACTERS_PER_TOKEN // len(pieces)
        source = source.model_copy(update={"characters": characters})
        pieces = tuple(piece[:characters] for piece in pieces)
        counts = count_whole(model_dir, pieces, source.seq_length)
        if counts is None:  # a tokenizer that only loading the model would reach
            counts = [len(piece) // (source.seq_length * CHARACTERS_PER_TOKEN) for piece in pieces]
        sizes = _size_text(source, counts, chunks)
    else:
        dealt = deal([record.asked for record in read_set(source.text, field=field).records], source.seed)
        sizes = {part: len(dealt[part]) for part in PARTS}
    if sizes["search"] < LEAST_ITEMS or min(sizes.values()) < 1:
        what = f"chunks of {source.seq_length} tokens" if source.metric == "perplexity" else "records"
        held = ", ".join(f"{size} for {part.replace('_', '-')}" for part, size in sizes.items())
        raise InvalidSpec(
            f"{source.text.name!r} holds too few {what} for four parts: {held}.",
            field=field,
            value=source.text.name,
            hint=f"The search needs {LEAST_ITEMS} or more"
            + (
                ": use a longer text, or shorter chunks (`seqlen`)." if "chunks" in what else "; add records."
            ),
        )
    return source.model_copy(update={"sizes": sizes})


def _size_text(source: ObjectiveSource, counts: Sequence[int], chunks: int | None) -> dict[Part, int]:
    """Return the sizes of the parts of a text whose pieces hold so many chunks: by records where these suffice."""
    held = dict(zip(PARTS, counts, strict=True)) if len(counts) == len(PARTS) else dict.fromkeys(PARTS, 0)
    searching, telling = _halves(counts)
    wanted = _CHUNKS["search"] if chunks is None else chunks
    told = min(wanted, _CHUNKS["report"])
    if held["calibration"] >= LEAST_ITEMS and held["search"] >= (chunks or LEAST_ITEMS):
        calibration = min(_CHUNKS["calibration"], held["calibration"])
        search = min(wanted, held["search"])
    elif chunks is None:
        calibration = min(_CHUNKS["calibration"], int(_SHARES_OF_HALVES[0] * searching))
        search = min(wanted, searching - calibration)
    elif chunks <= searching - LEAST_ITEMS:
        calibration, search = min(_CHUNKS["calibration"], searching - chunks), chunks
    else:
        raise InvalidSpec(
            f"Half of {source.text.name!r} holds {searching} whole chunks of {source.seq_length} tokens, "
            f"but {chunks} are asked for beside {LEAST_ITEMS} for calibration.",
            field="chunks",
            value=chunks,
            hint=f"Use at most {searching - LEAST_ITEMS} chunks, shorter ones (`seqlen`), or a longer text."
            if searching >= 2 * LEAST_ITEMS
            else "Use a longer text or shorter chunks (`seqlen`).",
        )
    least = min(held["held_out"], held["report"])
    told = min(told, least if least >= LEAST_ITEMS else telling // 2)
    return {"calibration": calibration, "search": search, "held_out": told, "report": told}


def _halves(counts: Sequence[int]) -> tuple[int, int]:
    """Return how many chunks both halves of a text have, from those of its pieces."""
    if len(counts) == 1:
        return counts[0] // 2, counts[0] // 2
    return counts[0] + counts[1], counts[2] + counts[3]


def _require_enough(chunks: int | None) -> None:
    if chunks is not None and chunks < LEAST_ITEMS:
        raise InvalidSpec(
            f"A search on {chunks} chunks cannot tell anything.",
            field="chunks",
            value=chunks,
            hint=f"Use {LEAST_ITEMS} or more.",
        )


def pieces_of(source: ObjectiveSource) -> list[str]:
    """Return the pieces of a text that are tokenised one by one: one for each part, or one for all.

    Raises:
        InvalidSpec: As :func:`~aidocks.evaluate.texts.read_records`.
    """
    return [piece[: source.characters] for piece in divide_in_four(source.text, _SHARES_OF_HALVES)]


def chunks_of_part(source: ObjectiveSource, part: Part, counts: Sequence[int]) -> list[int]:
    """Return the positions of a part's chunks in a tokenised text, in hashed order.

    Args:
        source: Of a text, with sizes.
        part: Which.
        counts: Whole chunks in each of the text's pieces, whose positions follow one another.

    Raises:
        InvalidSpec: When the text does not hold so many.
    """
    place = PARTS.index(part)
    split: Split = "search" if place < 2 else "held_out"
    boundary = counts[0] + counts[1] if len(counts) > 1 else None
    members = order_chunks(sum(counts), split, source.seed, boundary)
    half = slice(0, 2) if place < 2 else slice(2, 4)
    if len(counts) > 1 and all(
        source.sizes[one] <= held for one, held in zip(PARTS[half], counts[half], strict=True)
    ):
        # Both parts of this half have enough chunks of records of their own.
        first = sum(counts[:place])
        members = [position for position in members if first <= position < first + counts[place]]
        return members[: source.sizes[part]]
    begin = 0 if part == split else source.sizes[split]
    end = begin + source.sizes[part]
    if end > len(members):
        raise InvalidSpec(
            f"Half of {source.text.name!r} holds {len(members)} whole chunks of {source.seq_length} tokens, "
            f"but {end} are needed.",
            field="chunks",
            value=source.sizes[part],
            hint="Use fewer or shorter chunks (`seqlen`), or a longer text.",
        )
    return members[begin:end]


def deal(asked: Sequence[str], seed: int) -> dict[Part, list[int]]:
    """Deal records among the parts by the hash of what they ask; equal questions are never in two parts.

    Returns:
        Positions of each part's records, in hashed order.
    """
    hashes = {text: hashlib.sha256(f"{seed}/{text}".encode("utf-8", "replace")).digest() for text in asked}
    # Kept in the order of their hashes, so that any first few of a part are a sample of it.
    order = sorted(range(len(asked)), key=lambda i: (hashes[asked[i]], i))
    ranks = {text: rank for rank, text in enumerate(sorted(hashes, key=lambda text: hashes[text]))}
    dealt: dict[Part, list[int]] = {part: [] for part in PARTS}
    for position in order:
        place = (ranks[asked[position]] + 0.5) / len(ranks)
        dealt[_part_at(place)].append(position)
    dealt["calibration"] = dealt["calibration"][:_MOST_CALIBRATION]
    return dealt


def _part_at(place: float) -> Part:
    """Return the part that a place in [0, 1) falls into."""
    for part, share in _SHARES.items():
        if place < share:
            return part
        place -= share
    return "report"
