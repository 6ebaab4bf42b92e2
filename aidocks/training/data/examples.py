"""The canonical rows of a data set, one after another, with a count of what had to be left out; no torch is needed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from aidocks.errors import InvalidSpec
from aidocks.specs.train_data import DataFormat, SkippedRows
from aidocks.training.data.convert import Converter, Example
from aidocks.training.data.formats import Layout, detect
from aidocks.training.data.reading import first_rows, place_of, read_rows
from aidocks.training.data.rows import BadRow, DataSource, Faults
from aidocks.training.run import LossOn, Method

#: A file of at most so many bytes is checked as a whole when a request comes in; of a larger one, so many rows.
CHECKED_BYTES = 64 << 20
CHECKED_ROWS = 10_000


class Numbered(NamedTuple):
    """A canonical row.

    Attributes:
        number: Of the row that it was made of, in its data set.
        line: The same as JSON, without a line's end.
    """

    number: int
    example: Example
    line: bytes


class Examples:
    """Reads a data set for a method. Opening it tells its form by its first rows.

    Args:
        source: The data set.
        method: That learns from it.
        fields: Role -> column, as the request says.
        format: As the request says.
        loss_on: Which tokens are learnt.
        template: The tokenizer's chat template; None without one.
        spoken: Whether plain prompts and answers are turns of a conversation, too.
        field: Spec field to blame: ``dataset`` or ``eval_dataset``.

    Raises:
        InvalidSpec: For an empty data set, or one whose form the method cannot learn from.
    """

    def __init__(
        self,
        source: DataSource,
        method: Method,
        *,
        fields: Mapping[str, str] | None = None,
        format: DataFormat = "auto",
        loss_on: LossOn = "completion",
        template: str | None = None,
        spoken: bool = False,
        field: str = "dataset",
    ) -> None:
        self._source, self._field = source, field
        self.place = place_of(source)
        self.faults = Faults(source.name, self.place, field)
        #: Rows that were read so far, bad ones included.
        self.rows = 0
        samples = first_rows(source, field=field)
        if not samples:
            self._refuse_unreadable()
        try:
            self.layout: Layout = detect(samples, method, fields=fields, format=format)
            self._converter = Converter(
                self.layout, method, samples, template=template, loss_on=loss_on, spoken=spoken
            )
        except InvalidSpec as error:
            error.field = field if error.field == "dataset" else error.field
            raise

    @property
    def conversational(self) -> bool:
        """Whether the rows are messages."""
        return self._converter.conversational

    @property
    def skipped(self) -> tuple[SkippedRows, ...]:
        """What was left out so far."""
        return self.faults.summary()

    def read(self, limit: int | None = None) -> Iterator[Numbered]:
        """Yield the canonical rows; bad ones are counted.

        Args:
            limit: Stop after so many rows of the data set.

        Raises:
            InvalidSpec: At the end, when more than half of the rows were bad.
        """
        for raw in read_rows(self._source, field=self._field):
            if self.rows == limit:
                break
            self.rows += 1
            try:
                if raw.fault is not None or raw.values is None:
                    raise raw.fault or BadRow("it cannot be read")
                made = [(example, _line(example)) for example in self._converter.convert(raw.values)]
            except BadRow as fault:
                self.faults.add(raw.number, fault)
                continue
            for example, line in made:
                yield Numbered(raw.number, example, line)
        self.faults.require_enough(self.rows)

    def _refuse_unreadable(self) -> None:
        for raw in read_rows(self._source, field=self._field):
            self.rows += 1
            self.faults.add(raw.number, raw.fault or BadRow("it cannot be read"))
        self.faults.require_enough(self.rows)


def _line(example: Example) -> bytes:
    try:
        return json.dumps(example, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise BadRow(
            "it has half of a character", detail=f"{error.object[error.start : error.end]!a}"
        ) from error
    except TypeError as error:
        raise BadRow("it has a value that JSON does not know", detail=str(error)[:80]) from error
    except ValueError as error:
        raise BadRow("it has a number that JSON does not know", detail="NaN or infinity") from error


class Checked(NamedTuple):
    """What a look at a data set found.

    Attributes:
        layout: How its rows are read.
        rows: That were looked at.
        complete: Whether these are all.
        usable: Canonical rows among them.
        characters: Of the canonical rows as JSON, from which tokens can be guessed.
        skipped: Rows that will be left out.
        conversational: Whether the rows become messages.
    """

    layout: Layout
    rows: int
    complete: bool
    usable: int
    characters: int
    skipped: tuple[SkippedRows, ...]
    conversational: bool


def check_data(
    source: DataSource,
    method: Method,
    *,
    fields: Mapping[str, str] | None = None,
    format: DataFormat = "auto",
    loss_on: LossOn = "completion",
    template: str | None = None,
    spoken: bool = False,
    field: str = "dataset",
) -> Checked:
    """Look at a data set before any work: all of it, or the first rows of a large one.

    Args: as for :class:`Examples`.

    Raises:
        InvalidSpec: For what :class:`Examples` and its rows are refused for, with the line and the column.
    """
    examples = Examples(
        source,
        method,
        fields=fields,
        format=format,
        loss_on=loss_on,
        template=template,
        spoken=spoken,
        field=field,
    )
    whole = source.bytes <= CHECKED_BYTES
    usable = characters = 0
    for row in examples.read(None if whole else CHECKED_ROWS):
        usable += 1
        characters += len(row.line)
    return Checked(
        layout=examples.layout,
        rows=examples.rows,
        complete=whole,
        usable=usable,
        characters=characters,
        skipped=examples.skipped,
        conversational=examples.conversational,
    )
