"""BEIR folders (Thakur et al., 2021): ``corpus.jsonl``, ``queries.jsonl``, and judgements in ``qrels/<split>.tsv``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aidocks.errors import InvalidSpec
from aidocks.evaluate.texts import allowed_file
from aidocks.retrieval.data.convert import Passage, Ranking, checked_grade, checked_text, with_title
from aidocks.retrieval.data.detect import number_of
from aidocks.specs.train_data import SkippedRows
from aidocks.training.data.hub import parse_split
from aidocks.training.data.reading import read_rows, taken
from aidocks.training.data.rows import BadRow, DataFile, DataSource, Faults, source_of_files

CORPUS, QUERIES, QRELS = "corpus.jsonl", "queries.jsonl", "qrels"
#: As in `aidocks.training.data.reading`: what is in memory are ids, not texts.
_MOST_BYTES = 1 << 40


class Judgement(NamedTuple):
    """One line of the judgements."""

    number: int
    query: str
    passage: str
    grade: float


def beir_source(directory: Path, name: str, split: str, roots: Sequence[Path], field: str) -> DataSource:
    """Return the data set that one split of a BEIR folder is.

    Args:
        directory: Real path of the folder.
        name: As in the request.
        split: Name of the judgements' file, with a part of its queries: ``test``, ``train[:1000]``.
        roots: Directories below which a request may name files.
        field: Spec field to blame.

    Raises:
        InvalidSpec: It is no BEIR folder, or has no such split.
        PathNotAllowed: A file of it is a link that leads elsewhere.
    """
    wanted, part = parse_split(split, f"{field.partition('[')[0]}_split")
    missing = [one for one in (CORPUS, QUERIES) if not (directory / one).is_file()]
    if not (directory / QRELS).is_dir():
        missing.append(f"{QRELS}/")
    if missing:
        raise InvalidSpec(
            f"The folder {name!r} is no BEIR folder: it has no {' and no '.join(missing)}.",
            field=field,
            value=name,
            hint="Name a file of rows, or a folder with corpus.jsonl, queries.jsonl and qrels/<split>.tsv.",
        )
    known = sorted(path.stem for path in (directory / QRELS).glob("*.tsv"))
    if wanted not in known:
        raise InvalidSpec(
            f"The BEIR folder {name!r} has no split {wanted!r}.",
            field=f"{field.partition('[')[0]}_split",
            value=split,
            hint=f"It has {', '.join(known) or 'none'}.",
        )
    names = (CORPUS, QUERIES, f"{QRELS}/{wanted}.tsv")
    suffixes = (".jsonl", ".tsv")
    paths = [
        allowed_file(
            str(directory / one), roots, field, what="data set", suffixes=suffixes, most_bytes=_MOST_BYTES
        )
        for one in names
    ]
    return source_of_files(name, paths).model_copy(update={"part": part, "beir": True})


class BeirFolder:
    """Reads one split of a BEIR folder.

    Args:
        source: As :func:`beir_source` makes it.
        field: Spec field to blame.
        limit: Rows of each file that are looked at; None for all.

    Attributes:
        lines: Judgements that were read.
        duplicates: Those among them that were there before.
        faults: Of each file, by its name.
    """

    def __init__(self, source: DataSource, field: str, limit: int | None = None) -> None:
        self._source, self._field, self._limit = source, field, limit
        self._files = dict(zip(("corpus", "queries", "qrels"), source.files, strict=True))
        self.faults = {
            role: Faults(f"{source.name}/{file.path.name}", "line", field)
            for role, file in self._files.items()
        }
        self.lines = self.duplicates = 0
        self._rows = dict.fromkeys(self._files, 0)

    @property
    def skipped(self) -> tuple[SkippedRows, ...]:
        """Lines that were left out, with the name of their file."""
        return tuple(
            one.model_copy(update={"reason": f"in {self._files[role].path.name}, {one.reason}"})
            for role, faults in self.faults.items()
            for one in faults.summary()
        )

    def passages(self) -> Iterator[tuple[str, str]]:
        """Yield id and text of each passage: title and text, as BEIR's own models read it.

        Raises:
            InvalidSpec: At the end, when more than half of the lines were bad.
        """
        seen: set[str] = set()
        for number, values in self._read("corpus"):
            try:
                name = _id(values, "_id")
                whole = checked_text(with_title(values), "text")
                if name in seen:
                    raise BadRow("its _id was there before", field="_id", detail=name)
            except BadRow as fault:
                self._blame("corpus", number, fault)
                continue
            seen.add(name)
            yield name, whole
        self._require_enough("corpus")

    def rankings(self, known: Mapping[str, int]) -> Iterator[tuple[int, Ranking, tuple[int, ...]]]:
        """Yield the judged queries in the order of the judgements: line, query with passages, passages' numbers.

        The texts of the passages are left empty: their numbers stand for them.

        Args:
            known: Id -> number, of all passages.

        Raises:
            InvalidSpec: When more than half of the lines of a file were bad, or the split's part is none.
        """
        texts = self._queries()
        judged: dict[str, list[Judgement]] = {}
        seen: set[tuple[str, str]] = set()
        for one in self._judgements():
            if (one.query, one.passage) in seen:
                self.duplicates += 1
            elif one.query not in texts:
                self._miss(one, "its query-id is not in queries.jsonl", "query-id", one.query)
            elif one.passage not in known:
                self._miss(one, "its corpus-id is not in corpus.jsonl", "corpus-id", one.passage)
            else:
                judged.setdefault(one.query, []).append(one)
            seen.add((one.query, one.passage))
        if self._limit is None:
            self._require_enough("qrels")
        for name in taken(self._source.part, lambda: judged):
            passages = tuple(Passage("", one.grade) for one in judged[name])
            numbers = tuple(known[one.passage] for one in judged[name])
            yield judged[name][0].number, Ranking(texts[name], passages), numbers

    def _queries(self) -> dict[str, str]:
        texts: dict[str, str] = {}
        for number, values in self._read("queries"):
            try:
                name, text = _id(values, "_id"), checked_text(values.get("text"), "text")
                if name in texts:
                    raise BadRow("its _id was there before", field="_id", detail=name)
            except BadRow as fault:
                self._blame("queries", number, fault)
                continue
            texts[name] = text
        self._require_enough("queries")
        return texts

    def _judgements(self) -> Iterator[Judgement]:
        for number, values in self._read("qrels"):
            self.lines += 1
            try:
                grade = number_of(values.get("score"))
                if grade is None:
                    raise BadRow("score is no number", field="score", detail=repr(values.get("score"))[:40])
                query, passage = _id(values, "query-id"), _id(values, "corpus-id")
                yield Judgement(number, query, passage, checked_grade(grade, "score"))
            except BadRow as fault:
                self._blame("qrels", number, fault)

    def _read(self, role: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yield line and values of the rows of a file that can be read."""
        file: DataFile = self._files[role]
        alone = DataSource(name=f"{self._source.name}/{file.path.name}", files=(file,))
        for raw in read_rows(alone, field=self._field):
            if self._rows[role] == self._limit:
                break
            self._rows[role] += 1
            if raw.fault is not None or raw.values is None:
                self._blame(role, raw.number, raw.fault or BadRow("it cannot be read"))
            else:
                yield raw.number, raw.values

    def _blame(self, role: str, number: int, fault: BadRow) -> None:
        self.faults[role].add(number, fault)

    def _miss(self, one: Judgement, reason: str, column: str, name: str) -> None:
        # Of a folder that is looked at in part, what is named may lie further on.
        if self._limit is None:
            self._blame("qrels", one.number, BadRow(reason, field=column, detail=name[:80]))

    def _require_enough(self, role: str) -> None:
        self.faults[role].require_enough(self._rows[role])


def _id(values: Mapping[str, Any], column: str) -> str:
    value = values.get(column)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise BadRow(f"{column} is missing" if value in (None, "") else f"{column} is no id", field=column)
    return str(value)
