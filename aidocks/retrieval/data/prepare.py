"""The unit that prepares the data of a training of what finds texts: reads, joins by query, divides, writes JSONL."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from aidocks.checkpoints.files import OutputFile
from aidocks.errors import InvalidSpec
from aidocks.plan import Unit, UnitContext
from aidocks.retrieval.data.check import check_retrieval_data, require_one_kind, retrieval_source
from aidocks.retrieval.data.collect import Collected, collect
from aidocks.retrieval.data.describe import describe, summarise
from aidocks.retrieval.data.divide import divide, limited
from aidocks.retrieval.data.eval_files import passages_to_search, ranking_rows, training_row
from aidocks.retrieval.data.passages import Passages, json_line
from aidocks.retrieval.eval_set import EvalSet
from aidocks.specs.train_data import INLINE, held_out_count
from aidocks.specs.train_retrieval import RetrievalFormat
from aidocks.specs.train_retrieval_result import RankingData
from aidocks.training.data.rows import DataSource, describe_skipped
from aidocks.training.data.rows_file import rows_file
from aidocks.training.retriever import RetrieverKind, RowKind
from aidocks.training.run import Rows

__all__ = [
    "PrepareRetrievalData",
    "PreparedRetrieval",
    "check_retrieval_data",
    "require_one_kind",
    "retrieval_source",
]

TRAIN_FILE, HELD_OUT_FILE = "train.jsonl", "held_out.jsonl"


class PreparedRetrieval(BaseModel):
    """The data of a training.

    Attributes:
        rows: What is trained on; each of ``sets`` says itself what it has.
        train: In the training format of ``RetrieverTraining``; rankings carry also ``set``, the number of their data
            set in the order of the request, which is that of ``corpora``.
        held_out: The held-out queries (or pairs) of the trained data sets, in the same format; None without any.
        corpora: Of each data set that is trained on, ``text`` of its distinct passages, in which negatives are looked
            for; empty for scored pairs.
        sets: What is measured on: of each trained data set that has held-out queries, then each of the others.
        data: What was found in each data set, those that are trained on first.
        sentences: The same for people, one each.
        files: All that was written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: RowKind
    train: Rows
    held_out: Rows | None
    corpora: tuple[Rows, ...]
    sets: tuple[EvalSet, ...]
    data: tuple[RankingData, ...]
    sentences: tuple[str, ...]
    files: tuple[OutputFile, ...]


class PrepareRetrievalData(Unit[PreparedRetrieval]):
    """Prepares the data of a training of what finds texts. See the top of this module."""

    result_type: ClassVar[type[BaseModel]] = PreparedRetrieval

    kind: RetrieverKind
    datasets: dict[str, DataSource] = Field(min_length=1, description="Field of the request -> data set.")
    eval_datasets: dict[str, DataSource] = Field(
        default_factory=dict, description="The same of those that are only measured on."
    )
    format: RetrievalFormat = "auto"
    fields: dict[str, str] = Field(default_factory=dict, description="Role -> column.")
    eval_split: float | int | None = Field(None, description="As in the request.")
    seed: int = 0
    most_queries: int = Field(1000, ge=1, description="Of what is measured on, of one data set.")
    most_passages: int = Field(100_000, ge=1, description="In which the queries of one data set look.")
    directory: Path = Field(description="Where the files are written.")

    @property
    def label(self) -> str:
        return ", ".join(source.name for source in self.datasets.values())

    def outputs(self, result: PreparedRetrieval) -> Sequence[OutputFile]:
        return result.files

    def run(self, context: UnitContext) -> PreparedRetrieval:
        with ExitStack() as files:
            return _Preparation(self, files).run()


class _Preparation:
    """One run of the unit.

    Args:
        unit: It.
        files: Where what is not published is removed in the end.

    Raises:
        InvalidSpec: A data set cannot be read, or is of another kind than the others that are trained on.
    """

    def __init__(self, unit: PrepareRetrievalData, files: ExitStack) -> None:
        self._unit, self._files = unit, files
        self._written: list[OutputFile] = []
        sources = (*unit.datasets.items(), *unit.eval_datasets.items())
        self._data = [self._collect(field, source, number) for number, (field, source) in enumerate(sources)]
        trained = len(unit.datasets)
        self._trained, measured = self._data[:trained], self._data[trained:]
        self._rows = require_one_kind({data.field: (data.source.name, data.rows) for data in self._trained})
        self._parts = divide(self._trained, measured, self._wanted, unit.seed)
        self._graded = any(data.graded for data in self._trained)
        self._scored = all(data.scored for data in self._trained)
        grades = (
            value for data in self._data for q in data.queries.values() for value in q.positives.values()
        )
        #: Grades are written as whole numbers, or none of them is: a column has one type.
        self._grade = int if all(value.is_integer() for value in grades) else float

    def run(self) -> PreparedRetrieval:
        self._require_rows()
        train, hashes = self._write_rows(TRAIN_FILE, [part.train for part in self._parts])
        held = [part.held_out for part in self._parts[: len(self._trained)]]
        held_out = self._write_rows(HELD_OUT_FILE, held)[0] if any(held) else None
        corpora, sets, data, sentences = [], [], [], []
        for number, one in enumerate(self._data):
            measured, corpus = self._write_set(number, one)
            sets += [measured] if measured is not None else []
            if self._rows == "ranking" and number < len(self._trained):
                corpora.append(corpus)
            summary = summarise(one, self._parts[number], hashes[number])
            queries = measured.queries.count if measured is not None else 0
            searched = measured.corpus.count if measured is not None and measured.corpus is not None else 0
            data.append(summary)
            sentences.append(describe(one, summary, queries, searched))
        return PreparedRetrieval(
            rows=self._rows,
            train=train,
            held_out=held_out,
            corpora=tuple(rows for rows in corpora if rows is not None),
            sets=tuple(sets),
            data=tuple(data),
            sentences=tuple(sentences),
            files=tuple(self._written),
        )

    def _collect(self, field: str, source: DataSource, number: int) -> Collected:
        unit = self._unit
        file = self._files.enter_context(rows_file(unit.directory / f"passages-{number}.jsonl"))
        return collect(source, unit.kind, Passages(file), fields=unit.fields, format=unit.format, field=field)

    def _wanted(self, queries: int) -> int:
        """Return how many queries of a data set are held out: as ``RetrievalTrainSpec.held_out_queries`` says."""
        if self._unit.eval_split is None and self._unit.eval_datasets:
            return 0
        return held_out_count(queries, self._unit.eval_split)

    def _require_rows(self) -> None:
        if any(part.train for part in self._parts):
            return
        held, leaked = (
            sum(len(part.held_out) for part in self._parts[: len(self._trained)]),
            sum(part.leaked for part in self._parts),
        )
        name = ", ".join(data.source.name for data in self._trained)
        skipped = [
            f"{data.source.name}: {describe_skipped(data.skipped, data.place)}" for data in self._trained
        ]
        raise InvalidSpec(
            f"Nothing of {name} is left to train on: {held} queries are held out, and {leaked} are in another data set "
            "that is measured on.",
            field="dataset",
            value=name,
            hint=" ".join(one for one in skipped if not one.endswith(": "))
            or "Give more queries, or hold out fewer.",
        )

    def _write_rows(self, name: str, places: Sequence[Sequence[int]]) -> tuple[Rows, list[str | None]]:
        """Write rows of several data sets into one file; return it, and the SHA-256 of each data set's part."""
        hashes: list[str | None] = []
        with rows_file(self._unit.directory / name) as file:
            for number, chosen in enumerate(places):
                digest = hashlib.sha256()
                for row in self._training_rows(number, chosen):
                    line = json_line(row)
                    file.write(line)
                    digest.update(line + b"\n")
                hashes.append(digest.hexdigest() if chosen else None)
            rows, written = file.publish()
        self._written.append(written)
        return rows, hashes

    def _training_rows(self, number: int, places: Sequence[int]) -> Iterable[dict[str, Any]]:
        data = self._data[number]
        if data.rows == "scored":
            return (data.pairs[place]._asdict() for place in places)
        queries = list(data.queries.values())
        grade = self._grade if self._graded else None
        return (
            training_row(queries[place], data.passages, number, grade, scored=self._scored)
            for place in places
        )

    def _write_set(self, number: int, data: Collected) -> tuple[EvalSet | None, Rows | None]:
        """Write what of a data set is measured on; return it, and all passages if they are needed."""
        unit, part = self._unit, self._parts[number]
        trained = number < len(self._trained)
        places = limited(data, part.held_out, unit.most_queries, unit.seed)
        searched: list[int] | None = None
        rows: Iterable[dict[str, Any]]
        if data.rows == "scored":
            rows = self._training_rows(number, places)
        else:
            searched = passages_to_search(data, places, unit.most_passages)
            rows = ranking_rows(data, places, searched, self._grade)
        corpus = None
        if searched is not None and places:
            lines = (data.passages.line(one) for one in searched)
            corpus = self._publish(f"measured-{number}-passages.jsonl", lines)
        whole = self._publish_passages(data) if trained or searched is None else None
        if not places:
            return None, whole
        # Of a data set of which another split is trained on, something was seen.
        named = {one.source.name for one in self._trained if one.source.name != INLINE}
        seen = trained or data.source.name in named
        made = EvalSet(
            name=data.source.name,
            rows=data.rows,
            trained=seen,
            queries=self._publish(f"measured-{number}.jsonl", map(json_line, rows)),
            corpus=corpus or whole,
        )
        return made, whole

    def _publish(self, name: str, lines: Iterable[bytes]) -> Rows:
        with rows_file(self._unit.directory / name) as file:
            for line in lines:
                file.write(line)
            rows, written = file.publish()
        self._written.append(written)
        return rows

    def _publish_passages(self, data: Collected) -> Rows | None:
        """Bring the passages of a data set to their place; None for scored pairs, which have none."""
        if data.rows == "scored" or data.passages.file is None:
            return None
        rows, written = data.passages.file.publish()
        self._written.append(written)
        return rows
