"""Data sets of trainings: how a request names them, and what a training tells about what it found in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

#: Forms of rows that are known. `auto` looks at the first rows; the field names of the others are in `Rows`.
DataFormat = Literal[
    "auto",
    "alpaca",
    "sharegpt",
    "messages",
    "prompt_completion",
    "preference",
    "unpaired",
    "text",
    "prompt",
]

#: What a column can be to a training: the keys of a field map.
Role = Literal[
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "label",
    "messages",
    "tools",
    "text",
    "instruction",
    "input",
    "system",
    "answer",
]

#: How splits of hub data sets are written: `train`, `train[:1000]`, `train[10%:20%]`.
SPLIT_PATTERN = r"^[A-Za-z0-9_.-]+(\[-?[0-9]*%?:-?[0-9]*%?\])?$"

#: What people call the rows of a request itself.
INLINE = "inline"

#: Rows that a request may carry itself; more belong into a file.
MOST_INLINE_ROWS = 10_000

#: The default part of the rows that is held out: a tenth, but enough for a standard error and no more than is needed.
HELD_OUT_SHARE = 0.1
LEAST_HELD_OUT, MOST_HELD_OUT = 8, 500

DatasetRef = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=4096),
    Field(
        description="A data set of the registry, an uploaded file (`file-…`), a hub data set "
        "`org/name[:config][@revision]`, or the path of a .jsonl, .json, .csv or .parquet file below an allowed root.",
        examples=["domain-math", "file-3f9c1b", "openai/gsm8k:main"],
    ),
]


def _several(rows: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    if not 2 <= len(rows) <= MOST_INLINE_ROWS:
        raise ValueError(f"{len(rows)} rows are given; a request carries 2 to {MOST_INLINE_ROWS}")
    return rows


InlineRows = Annotated[
    tuple[dict[str, Any], ...], AfterValidator(_several), Field(description="The rows themselves.")
]


def held_out_count(rows: int, eval_split: float | int | None) -> int:
    """Return how many of a data set's rows are held out.

    Args:
        rows: Usable ones.
        eval_split: A share below 1, or a number of rows; None for the default, a tenth, at least 8 and at most 500.
            Half of the rows at most, in all cases: a training without rows is none.
    """
    if eval_split is None:
        wanted = min(max(round(rows * HELD_OUT_SHARE), LEAST_HELD_OUT), MOST_HELD_OUT)
    elif eval_split == 0:
        wanted = 0
    elif eval_split < 1:
        wanted = max(round(rows * eval_split), 1)
    else:
        wanted = int(eval_split)
    return min(wanted, rows // 2)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SkippedRows(_Part):
    """Rows that were left out for one reason."""

    reason: str = Field(description="Such as `completion is empty`.")
    field: str | None = Field(None, description="Column that is to blame.")
    count: int
    lines: tuple[int, ...] = Field(
        description="Where the first of them are: lines of a text file, else rows, counted from 1."
    )


class LengthSummary(_Part):
    """Lengths of examples, in tokens, before anything is cut."""

    median: int
    p95: int = Field(description="95 of 100 examples are at most as long.")
    longest: int


class DataSummary(_Part):
    """What was found in a data set, and what was made of it."""

    dataset: str = Field(description="As the request names it; `inline` for rows within the request.")
    format: DataFormat = Field(description="Form of the rows, detected or told.")
    detected: bool = Field(description="Whether the form was detected; else the request said it.")
    fields: dict[str, str] = Field(description="Role -> column that it is read from.")
    unused: tuple[str, ...] = Field((), description="Columns that nothing is read from.")
    rows: int = Field(description="Rows of the data set.")
    train: int = Field(description="Rows that are trained on.")
    held_out: int = Field(description="Rows that are only measured on.")
    eval_dataset: str | None = Field(
        None, description="Where the held-out rows are from, if not from `dataset`."
    )
    skipped: tuple[SkippedRows, ...] = Field((), description="Rows that were left out, by reason.")
    duplicates: int = Field(0, description="Rows that occur more than once, counted from the second on.")
    tokens: int = Field(description="Of all rows that are trained on, after cutting; an epoch.")
    loss_tokens: int | None = Field(None, description="Those among them that the loss is on.")
    truncated: int = Field(description="Rows that are longer than `max_length`, and are cut.")
    lengths: LengthSummary
    sha256: str = Field(description="Of the rows that are trained on, as the trainers read them.")
    revision: str | None = Field(None, description="Revision of a hub data set.")

    @property
    def left_out(self) -> int:
        """Rows that were left out, for all reasons."""
        return sum(skipped.count for skipped in self.skipped)


def named_rows(dataset: str | tuple[Mapping[str, Any], ...]) -> str:
    """Return what people call a data set of a request."""
    return dataset if isinstance(dataset, str) else INLINE
