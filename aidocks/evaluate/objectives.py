"""What a unit measures on: a metric, its data, and which of four disjoint parts of them serves what.

*Calibration* is for what is learned (second moments, gradients), *search* for what is chosen, *held out* for whether
the choice stands, *report* for the figures that are told. The search half of a text holds the first two, the other
half the last two; a set's records are dealt by the hash of what they ask.
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
    Halves,
    Split,
    TextSource,
    count_chunks,
    order_chunks,
    read_text,
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
#: A gradient or a second moment gains nothing from more.
_MOST_CALIBRATION = 256
#: Of a tokenizer that only loading the model would reach: a token is at most so many characters long on average.
_CHARACTERS_PER_TOKEN = 16


class ObjectiveSource(BaseModel):
    """An objective as units carry it.

    Attributes:
        metric: What is measured.
        text: The text, or the set of questions or preferences.
        seq_length: Tokens of a chunk of a text; a set's records are as long as they are.
        seed: Deals the data among the parts in another way.
        sizes: Items of each part: chunks of a text, records of a set. Empty before :func:`size_objective`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: Metric
    text: TextSource
    seq_length: int = Field(128, ge=2)
    seed: int = 0
    sizes: dict[Part, int] = Field(default_factory=dict)

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

    Args:
        source: As :func:`resolve_objective` returns it.
        model_dir: Checkpoint directory, whose tokenizer counts.
        chunks: Chunks of the search part of a text; None for as many as are useful. Without effect on a set.
        field: Spec field to blame for data that are too few.

    Raises:
        InvalidSpec: For data that are too few for four parts; of ``chunks``, where that asks for too many or too few.
    """
    if source.metric == "perplexity":
        sizes = _size_text(source, model_dir, chunks)
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


def _size_text(source: ObjectiveSource, model_dir: Path, chunks: int | None) -> dict[Part, int]:
    _require_enough(chunks)
    enough = max(2 * _CHUNKS["report"], (chunks or 0) + max(chunks or 0, _CHUNKS["calibration"]))
    halves = count_chunks(model_dir, source.text, source.seq_length, at_most=enough)
    if halves is None:
        half = len(read_text(source.text)) // (2 * source.seq_length * _CHARACTERS_PER_TOKEN)
        halves = Halves(half, half)
    if chunks is None:
        calibration = min(_CHUNKS["calibration"], int(0.4 * halves.search))
        search = min(_CHUNKS["search"], halves.search - calibration)
        told = min(_CHUNKS["report"], halves.held_out // 2)
    else:
        if chunks > halves.search - LEAST_ITEMS:
            raise InvalidSpec(
                f"Half of {source.text.name!r} holds {halves.search} whole chunks of {source.seq_length} tokens, "
                f"but {chunks} are asked for beside {LEAST_ITEMS} for calibration.",
                field="chunks",
                value=chunks,
                hint=f"Use at most {halves.search - LEAST_ITEMS} chunks, shorter ones (`seqlen`), or a longer text."
                if halves.search >= 2 * LEAST_ITEMS
                else "Use a longer text or shorter chunks (`seqlen`).",
            )
        calibration, search = min(_CHUNKS["calibration"], halves.search - chunks), chunks
        told = min(chunks, _CHUNKS["report"], halves.held_out // 2)
    return {"calibration": calibration, "search": search, "held_out": told, "report": told}


def _require_enough(chunks: int | None) -> None:
    if chunks is not None and chunks < LEAST_ITEMS:
        raise InvalidSpec(
            f"A search on {chunks} chunks cannot tell anything.",
            field="chunks",
            value=chunks,
            hint=f"Use {LEAST_ITEMS} or more.",
        )


def chunks_of_part(
    source: ObjectiveSource, part: Part, available: int, boundary: int | None = None
) -> list[int]:
    """Return the positions of a part's chunks in a tokenised text, in hashed order.

    Args:
        source: Of a text, with sizes.
        part: Which.
        available: Whole chunks in the text.
        boundary: As for :func:`aidocks.evaluate.texts.choose_chunks`.

    Raises:
        InvalidSpec: When the text does not hold so many.
    """
    half: tuple[Split, Part] = (
        ("search", "search") if part in ("calibration", "search") else ("held_out", "held_out")
    )
    split, first = half
    members = order_chunks(available, split, source.seed, boundary)
    begin = 0 if part == first else source.sizes[first]
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
