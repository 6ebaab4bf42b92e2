"""The unit that adds the passages of a file to those of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, Field

from aidocks.checkpoints.files import OutputFile
from aidocks.errors import InvalidSpec
from aidocks.plan import Unit, UnitContext
from aidocks.retrieval.data.passages import Passages
from aidocks.retrieval.parts import JoinedRows, texts_of
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
_TITLE = "title"


class GatherPassages(Unit[JoinedRows]):
    """The distinct passages of a data set and of a file, those of the data set first.

    A column called `title` is put before the text, as BEIR's corpora are read.
    """

    result_type: ClassVar[type[BaseModel]] = JoinedRows

    own: Rows = Field(description="Rows of `text`.")
    further: DataSource
    path: Path = Field(description="Where the rows are written.")

    @property
    def label(self) -> str:
        return self.further.name

    @property
    def computes(self) -> bool:
        return False

    def outputs(self, result: JoinedRows) -> Sequence[OutputFile]:
        return (result.file,)

    def run(self, context: UnitContext) -> JoinedRows:
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
                    passages.add(_passage(row.values, column))
                except BadRow as fault:
                    faults.add(row.number, fault)
            faults.require_enough(count)
            rows, written = file.publish()
        return JoinedRows(rows=rows, file=written)

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


def _passage(values: Mapping[str, Any], column: str) -> str:
    text, title = values.get(column), values.get(_TITLE)
    if not isinstance(text, str) or not text.strip():
        raise BadRow("it has no text", field=column)
    return f"{title} {text}".strip() if isinstance(title, str) else text
