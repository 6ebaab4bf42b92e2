"""The unit that makes a data set of rows with hard negatives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from aidocks.datasets.store import DatasetStore, StoredDataset
from aidocks.errors import NameTaken
from aidocks.plan import Unit, UnitContext
from aidocks.retrieval.data.passages import json_line
from aidocks.retrieval.parts import each_row
from aidocks.training.data.rows_file import rows_file
from aidocks.training.run import Rows


class StoredNegatives(BaseModel):
    """The new data set, and its name: another than was asked for where somebody took that meanwhile."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    name: str


class StoreNegatives(Unit[StoredNegatives]):
    """Rows of ``query``, ``pos`` and ``neg``, the form that trainings of many projects read, as a data set.

    Where some passages are more right than others, of ``query``, ``documents`` and ``labels``: that form has grades.
    """

    result_type: ClassVar[type[BaseModel]] = StoredNegatives

    rows: Rows = Field(description="Rankings in the form of trainings.")
    name: str
    otherwise: str = Field(
        description="Name of it where the other was taken while negatives were looked for."
    )
    datasets: Path = Field(description="Directory of the data sets.")

    @property
    def label(self) -> str:
        return self.name

    @property
    def computes(self) -> bool:
        return False

    def run(self, context: UnitContext) -> StoredNegatives:
        with rows_file(context.workspace / "negatives" / f"{self.name}.jsonl") as file:
            for row in each_row(self.rows):
                file.write(json_line(_public(row)))
            written, _ = file.publish()
        stored = self._store(written)
        written.path.unlink()
        return StoredNegatives(id=stored.id, name=stored.name)

    def _store(self, rows: Rows) -> StoredDataset:
        try:
            return self._add(rows, self.name)
        except NameTaken:
            return self._add(rows, self.otherwise)

    def _add(self, rows: Rows, name: str) -> StoredDataset:
        store = DatasetStore(self.datasets)
        try:
            return store.add(rows.path, name)
        except NameTaken:
            # The same content under the same name: of an earlier attempt, which was stopped right after.
            known = store.resolve(name)
            if known is None or known.sha256 != rows.sha256:
                raise
            return known


def _public(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as trainings of many projects read it; scores and grades keep their passages company."""
    positives, negatives = list(row["positives"]), list(row.get("negatives") or [])
    if row.get("grades"):
        labels = [*row["grades"], *(0 for _ in negatives)]
        return {"query": row["query"], "documents": [*positives, *negatives], "labels": labels}
    public: dict[str, Any] = {"query": row["query"], "pos": positives, "neg": negatives}
    scores = row.get("scores")
    if scores:
        public |= {"pos_scores": scores[: len(positives)], "neg_scores": scores[len(positives) :]}
    return public
