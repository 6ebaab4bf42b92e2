"""The unit that adds the passages of a file to those of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, Field

from aidocks.checkpoints.files import OutputFile
from aidocks.errors import InvalidSpec
from aidocks.plan import Unit, UnitContext
from aidocks.retrieval.data.convert import checked_text, with_title
from aidocks.retrieval.data.passages import Passages
from aidocks.retrieval.parts import JoinedRows, texts_of
from aidocks.specs.train_data import SkippedRows
from aidocks.training.data.reading import first_rows, place_of, read_rows
from aidocks.training.data.rows import BadRow, DataSource, Faults
from aidocks.training.data.rows_file import rows_file
from aidocks.training.run import Rows

#: Names of the column of texts; the first one that is there.
_COLUMNS = (
    "text",
    "passage",
    "document",
    "doc",
    "content",
    "contents",
    "body",
    "paragraph",
    "chunk",
    "context",
)


class GatheredPassages(JoinedRows):
    """Passages, and what of the file was left out."""

    skipped: tuple[SkippedRows, ...]


class GatherPassages(Unit[GatheredPassages]):
    """The distinct passages of a data set and of a file, those of the data set first.

    A column called `title` is put before the text, as BEIR's corpora are read.
    """

    result_type: ClassVar[type[BaseModel]] = GatheredPassages

    own: Rows = Field(description="Rows of `text`.")
    further: DataSource
    path: Path = Field(description="Where the rows are written.")

    @property
    def label(self) -> str:
        return self.further.name

    @property
    def computes(self) -> bool:
        return False

    def outputs(self, result: GatheredPassages) -> Sequence[OutputFile]:
        return (result.file,)

    def run(self, context: UnitContext) -> GatheredPassages:
        column = self._column()
        faults = Faults(self.further.name, place_of(self.further), "corpus")
        with rows_file(self.path) as file:
            passages = Passages(file)
            for text in texts_of(self.own):
                passages.add(text)
            count = 0
            for row in read_rows(self.further, field="corpus"):
                count += 1
                try:
                    if row.values is None:
                        raise row.fault or BadRow("it cannot be read")
                    passages.add(checked_text(with_title(row.values, column), column))
                except BadRow as fault:
                    faults.add(row.number, fault)
            faults.require_enough(count)
            rows, written = file.publish()
        return GatheredPassages(rows=rows, file=written, skipped=faults.summary())

    def _column(self) -> str:
        seen = {column for row in first_rows(self.further, field="corpus") for column in row}
        found = next((column for column in _COLUMNS if column in seen), None)
        if found is None:
            raise InvalidSpec(
                f"{self.further.name} has no column of texts.",
                field="corpus",
                value=self.further.name,
                hint=f"Name it one of {', '.join(_COLUMNS)}. It has: {', '.join(sorted(seen)) or 'no columns'}.",
            )
        return found
