"""One data set, read as a whole: rows of one query joined, scores brought to one scale, and all faults counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from aidocks.errors import InvalidSpec
from aidocks.retrieval.data.beir import BeirFolder
from aidocks.retrieval.data.convert import Converter, Passage, Ranking, Scored, digest_of, digest_of_words
from aidocks.retrieval.data.detect import detect
from aidocks.retrieval.data.passages import Passages, Query
from aidocks.specs.train_data import SkippedRows
from aidocks.specs.train_retrieval import RetrievalFormat
from aidocks.training.data.reading import first_rows, place_of, read_rows
from aidocks.training.data.rows import BadRow, DataSource, Faults, describe_skipped
from aidocks.training.retriever import RetrieverKind, RowKind

#: What scores of common data sets go up to; 5 is of STS.
_SCALES = (1.0, 5.0, 10.0, 100.0)


@dataclasses.dataclass
class Collected:
    """What one data set says.

    Attributes:
        source: The data set.
        field: Of the request, that names it.
        format: Form of its rows.
        detected: Whether the form was detected.
        place: What the numbers of rows count: `line` or `row`.
        passages: Distinct ones; none of scored pairs.
        fields: Role -> column.
        unused: Columns that nothing is read from.
        prompts: Those among them that say what is put before a text.
        rows: What the rows are.
        lines: Rows that were read.
        duplicates: Those that were there before, word for word.
        contradictions: Passages that one row calls right and another wrong, of the same query.
        grouped: Whether pairs labelled 0 and 1 were joined to rankings.
        scale: What scores were divided by.
        queries: What tells a query from any other -> the query, of rankings.
        pairs: Scored pairs, each once, scores 0 to 1.
        skipped: Rows that were left out.
    """

    source: DataSource
    field: str
    format: RetrievalFormat
    detected: bool
    place: str
    passages: Passages
    fields: dict[str, str] = dataclasses.field(default_factory=dict)
    unused: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    rows: RowKind = "ranking"
    lines: int = 0
    duplicates: int = 0
    contradictions: int = 0
    grouped: bool = False
    scale: float = 1.0
    queries: dict[bytes, Query] = dataclasses.field(default_factory=dict)
    pairs: list[Scored] = dataclasses.field(default_factory=list)
    skipped: tuple[SkippedRows, ...] = ()

    @property
    def graded(self) -> bool:
        """Whether some passages are more right than others."""
        return any(grade != 1 for query in self.queries.values() for grade in query.positives.values())

    @property
    def scored(self) -> bool:
        """Whether every passage of every query has a better model's score."""
        return bool(self.queries) and all(query.scored for query in self.queries.values())

    @property
    def partly_scored(self) -> bool:
        """Whether some passages have a score, and some have none."""
        return not self.scored and any(query.scores for query in self.queries.values())

    def add(self, number: int, ranking: Ranking, numbers: tuple[int, ...]) -> None:
        """Join one row to the others of its query."""
        key = digest_of(ranking.query)
        if key not in self.queries:
            self.queries[key] = Query(ranking.query, number)
        self.queries[key].add(ranking, numbers)


def collect(
    source: DataSource,
    kind: RetrieverKind,
    passages: Passages,
    *,
    fields: Mapping[str, str] | None = None,
    format: RetrievalFormat = "auto",
    field: str = "dataset",
    limit: int | None = None,
) -> Collected:
    """Read a data set.

    Args:
        source: The data set.
        kind: What is trained on it: pairs that are labelled 0 and 1 are read by that.
        passages: To which its passages are added.
        fields: Role -> column, as the request says; a BEIR folder has no need of it.
        format: As the request says; a folder is BEIR's in any case.
        field: Spec field to blame.
        limit: Rows that are looked at; None for all.

    Raises:
        InvalidSpec: It has no known form, is empty, more than half of it is bad, no query has a right passage, or its
            scores have no known scale.
    """
    if source.beir:
        return _collect_beir(source, passages, field, limit)
    return _Reading(source, kind, passages, fields or {}, format, field, limit).run()


def _collect_beir(source: DataSource, passages: Passages, field: str, limit: int | None) -> Collected:
    folder = BeirFolder(source, field, limit)
    found = Collected(source, field, "beir", True, "line", passages)
    known = {name: passages.add(text) for name, text in folder.passages()}
    for number, ranking, numbers in folder.rankings(known):
        found.add(number, ranking, numbers)
    found.lines, found.duplicates = folder.lines, folder.duplicates
    _settle(found, folder.faults["qrels"], whole=limit is None)
    found.skipped = folder.skipped
    return found


class _Reading:
    """The reading of one data set of rows."""

    def __init__(
        self,
        source: DataSource,
        kind: RetrieverKind,
        passages: Passages,
        fields: Mapping[str, str],
        format: RetrievalFormat,
        field: str,
        limit: int | None,
    ) -> None:
        self._source, self._kind, self._passages, self._limit = source, kind, passages, limit
        place = place_of(source)
        self._faults = Faults(source.name, place, field)
        samples = first_rows(source, field=field)
        if not samples:
            self._refuse_unreadable(field)
        self._layout = detect(samples, fields=fields, format=format, field=field)
        self._converter = Converter(self._layout)
        self._found = Collected(
            source,
            field,
            self._layout.format,
            self._layout.detected,
            place,
            passages,
            fields=self._layout.named,
            unused=self._layout.unused,
            prompts=self._layout.prompts,
        )

    def run(self) -> Collected:
        found = self._found
        pairs: list[tuple[int, Scored]] = []
        seen: set[bytes] = set()
        for number, row in self._rows():
            texts = row[:2] if isinstance(row, Scored) else (row.query, *(one.text for one in row.passages))
            rest = row.score if isinstance(row, Scored) else tuple(one[1:] for one in row.passages)
            key = digest_of_words(*texts, repr(rest))
            if key in seen:
                found.duplicates += 1
                continue
            seen.add(key)
            if isinstance(row, Scored):
                pairs.append((number, row))
            else:
                self._join(number, row)
        self._faults.require_enough(found.lines)
        if pairs:
            self._settle_pairs(pairs)
        if found.rows == "ranking":
            _settle(found, self._faults, whole=self._limit is None)
        found.skipped = self._faults.summary()
        return found

    def _rows(self) -> Iterator[tuple[int, Ranking | Scored]]:
        for raw in read_rows(self._source, field=self._found.field):
            if self._found.lines == self._limit:
                break
            self._found.lines += 1
            try:
                if raw.fault is not None or raw.values is None:
                    raise raw.fault or BadRow("it cannot be read")
                row = self._converter.convert(raw.values)
            except BadRow as fault:
                self._faults.add(raw.number, fault)
                continue
            if row is None:
                self._faults.leave_out(
                    raw.number, f"{self._layout.answers} is empty: the passage does not answer the query"
                )
            else:
                yield raw.number, row

    def _join(self, number: int, row: Ranking) -> None:
        self._found.add(number, row, tuple(self._passages.add(one.text) for one in row.passages))

    def _settle_pairs(self, pairs: list[tuple[int, Scored]]) -> None:
        """Bring scores to 0 to 1, or make rankings of pairs that are labelled 0 and 1."""
        values = {pair.score for _, pair in pairs}
        firsts = {digest_of(pair.first) for _, pair in pairs}
        alone = len(firsts) == len(pairs)
        # Pairs that are all alike teach no scores: they are right passages.
        if values <= {0.0, 1.0} and (self._kind == "reranker" or not alone or values == {1.0}):
            self._found.grouped = True
            for number, pair in pairs:
                self._join(number, Ranking(pair.first, (Passage(pair.second, pair.score),)))
            return
        found = self._found
        found.rows, found.scale = "scored", _scale(values, self._source.name, found)
        found.pairs = [pair._replace(score=pair.score / found.scale) for _, pair in pairs]

    def _refuse_unreadable(self, field: str) -> None:
        count = 0
        for raw in read_rows(self._source, field=field):
            count += 1
            self._faults.add(raw.number, raw.fault or BadRow("it cannot be read"))
        self._faults.require_enough(count)


def _scale(values: set[float], name: str, found: Collected) -> float:
    lowest, highest = min(values), max(values)
    scale = next((one for one in _SCALES if highest <= one), None)
    if lowest >= 0 and scale is not None:
        return scale
    raise InvalidSpec(
        f"The scores of {name} go from {lowest:g} to {highest:g}, which is no known scale.",
        field=found.field,
        value=name,
        hint="Scores are from 0 to 1, 5, 10 or 100. If they are something else, and all pairs belong together, say "
        f'format: pair with fields: {{"query": "{found.fields["first"]}", "positive": "{found.fields["second"]}"}}.',
    )


def _settle(found: Collected, faults: Faults, *, whole: bool) -> None:
    """Leave out queries without a right passage; what is right anywhere is wrong nowhere."""
    without = [key for key, query in found.queries.items() if not query.positives]
    for key in without:
        faults.leave_out(found.queries.pop(key).number, "its query has no right passage")
    found.contradictions = sum(query.settle() for query in found.queries.values())
    if not found.queries and whole:
        raise InvalidSpec(
            f"No query of {found.source.name} has a right passage.",
            field=found.field,
            value=found.source.name,
            hint=describe_skipped(faults.summary(), found.place)
            or "Labels of right passages are 1 and more.",
        )
