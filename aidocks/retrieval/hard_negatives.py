"""The unit that finds the hard negatives of some queries: looks, judges, and chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from aidocks.checkpoints.files import OutputFile
from aidocks.evaluate.memory import memory_to_load
from aidocks.plan import Unit, UnitContext
from aidocks.retrieval.data.convert import digest_of
from aidocks.retrieval.embedding import VectorFiles, Vectors, find_nearest, open_array, write_array
from aidocks.retrieval.parts import WrittenPart, read_lines, texts_of, write_part
from aidocks.specs.train_retrieval import NegativesFields
from aidocks.training.measuring import read_rows
from aidocks.training.retriever import Retriever
from aidocks.training.run import Rows

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

#: Candidates that a reranker judges at a time, for each negative that is still wanted.
_JUDGED = 2


class KeyedPassages(BaseModel):
    """Keys of passages: equal for texts that count as the same."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: OutputFile


class KeyPassages(Unit[KeyedPassages]):
    """A key of every passage, uint64 [N], by which positives are found among them."""

    result_type: ClassVar[type[BaseModel]] = KeyedPassages

    corpus: Rows
    of: str = Field(description="The data set, as people know it.")
    path: Path

    @property
    def label(self) -> str:
        return f"keys of {self.corpus.count} passages of {self.of}"

    @property
    def weight(self) -> float:
        return self.corpus.count / 1000

    @property
    def computes(self) -> bool:
        return False

    def run(self, context: UnitContext) -> KeyedPassages:
        import numpy as np

        keys = np.fromiter((key_of(text) for text in texts_of(self.corpus)), dtype=np.uint64)
        return KeyedPassages(file=write_array(self.path, keys))

    def outputs(self, result: KeyedPassages) -> Sequence[OutputFile]:
        return (result.file,)


def key_of(text: str) -> int:
    """Return 64 bits that are equal for texts that count as the same."""
    return int.from_bytes(digest_of(text)[:8], "little")


class Searches(BaseModel):
    """What searches in one corpus need.

    Attributes:
        corpus: Rows of ``text``.
        keys: Of its passages.
        query_vectors: Of all training rows, whichever corpus they look in; none without a model.
        passage_vectors: Of the corpus.
        words: Index of the corpus; None where BM25 does not look.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    corpus: Rows
    keys: OutputFile
    query_vectors: tuple[Vectors, ...] = ()
    passage_vectors: tuple[Vectors, ...] = ()
    words: Path | None = None


class MinedPart(BaseModel):
    """Some training rows with negatives; its numbers mean the same as those of all parts together (``mining``).

    ``ranks`` are those of the best positive of each row that has one among the passages, int64, in NumPy's format.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: WrittenPart
    ranks: OutputFile
    negatives: int
    without: int
    too_alike: int
    kept: int
    unplaced: int


@dataclass
class _Row:
    """A training row on its way: what is known of it, and what has been chosen so far.

    Attributes:
        number: In the file of all rows.
        values: As they stand there.
        positives: Lines of the corpus.
        best: Score of the best positive, by the model or the judge; None where nothing is known.
        candidates: Lines of the corpus that may be negatives, the first to be taken first.
        alike: Of each candidate, its similarity by the model; empty without one.
        chosen: Lines that were taken.
        looked: Candidates that were looked at.
    """

    number: int
    values: dict[str, Any]
    positives: list[int]
    best: float | None = None
    rank: int | None = None
    candidates: list[int] = field(default_factory=list)
    alike: dict[int, float] = field(default_factory=dict)
    chosen: list[int] = field(default_factory=list)
    looked: int = 0
    too_alike: int = 0


class LookForNegatives(Unit[MinedPart]):
    """Finds the hard negatives of some queries. See the top of this module."""

    result_type: ClassVar[type[BaseModel]] = MinedPart

    train: Rows
    begin: int = Field(ge=0)
    end: int = Field(description="Of the rows: from `begin` to before this one.")
    searches: tuple[Searches, ...] = Field(description="Of each corpus.")
    settings: NegativesFields
    judge: Retriever | None
    seed: int
    name: str = Field(description="Of what looks, for people.")
    directory: Path = Field(description="Where the rows are written.")

    @property
    def label(self) -> str:
        return f"{self.name}: negatives for queries {self.begin + 1} to {self.end}"

    @property
    def memory(self) -> int | None:
        return None if self.judge is None else memory_to_load(self.judge.model)

    @property
    def weight(self) -> float:
        return float(self.end - self.begin)

    def outputs(self, result: MinedPart) -> Sequence[OutputFile]:
        return (result.rows.file, result.ranks)

    def run(self, context: UnitContext) -> MinedPart:
        import numpy as np

        given = read_rows(self.train.path, self.begin, self.end)
        made = {place: dict(values) for place, values in enumerate(given)}
        mined: list[_Row] = []
        for number in range(len(self.searches)):
            places = [
                place
                for place, values in enumerate(given)
                if int(values.get("set", 0)) == number and not values.get("scores")
            ]
            rows = _Look(self, self.searches[number], context).run({place: given[place] for place in places})
            made |= {place: row.values for place, row in zip(places, rows, strict=True)}
            mined += rows
        ranks = np.asarray([row.rank for row in mined if row.rank is not None], dtype=np.int64)
        return MinedPart(
            rows=write_part(self.directory / f"rows-{self.begin:08d}.jsonl", made.values()),
            ranks=write_array(self.directory / f"ranks-{self.begin:08d}.npy", ranks),
            negatives=sum(len(row.chosen) for row in mined),
            without=sum(not row.chosen for row in mined),
            too_alike=sum(row.too_alike for row in mined),
            kept=len(given) - len(mined),
            unplaced=sum(not row.positives for row in mined),
        )


class _Look:
    """The search in one corpus.

    Args:
        unit: Whose rows they are.
        searches: Of the corpus.
        context: Of the unit.
    """

    def __init__(self, unit: LookForNegatives, searches: Searches, context: UnitContext) -> None:
        self._unit, self._searches, self._context = unit, searches, context
        self._settings = unit.settings
        self._queries = VectorFiles(searches.query_vectors)
        self._passages = VectorFiles(searches.passage_vectors)

    def run(self, given: dict[int, dict[str, Any]]) -> list[_Row]:
        """Return the rows with negatives.

        Args:
            given: Place in the part -> row.
        """
        if not given:
            return []
        rows, known = self._placed(given)
        rankings = [self._by_vectors(rows)] if self._searches.passage_vectors else []
        if self._searches.words is not None:
            rankings.append(self._by_words(rows))
        for place, row in enumerate(rows):
            self._line_up(row, [ranking[place] for ranking in rankings], known[place])
        if self._searches.passage_vectors:
            self._compare(rows)
        self._choose(rows)
        texts = self._texts(chain.from_iterable(row.chosen for row in rows))
        for row in rows:
            negatives = [*(row.values.get("negatives") or []), *(texts[line] for line in row.chosen)]
            row.values = {**row.values, "negatives": negatives}
        return rows

    def _placed(self, given: dict[int, dict[str, Any]]) -> tuple[list[_Row], list[set[int]]]:
        """Return the rows with the lines of their positives, and the lines that are no candidates of each."""
        import numpy as np

        keys = np.asarray(open_array(self._searches.keys.path))
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]

        def lines(texts: Iterable[str]) -> list[int]:
            wanted = np.asarray([key_of(text) for text in texts], dtype=np.uint64)
            ends = zip(
                np.searchsorted(ordered, wanted, "left"),
                np.searchsorted(ordered, wanted, "right"),
                strict=True,
            )
            return [int(line) for begin, end in ends for line in order[begin:end]]

        rows, known = [], []
        for place, values in given.items():
            positives = lines(values["positives"])
            rows.append(_Row(self._unit.begin + place, values, positives))
            # A passage that is the query itself answers nothing.
            others = lines([*(values.get("negatives") or []), str(values["query"])])
            known.append({*positives, *others})
        return rows, known

    def _by_vectors(self, rows: list[_Row]) -> list[list[int]]:
        """Return the passages of each query by the model, and note how its best positive stands among them."""
        import numpy as np

        queries = self._queries.take([row.number for row in rows])
        bars = np.full(len(rows), np.inf, dtype=np.float32)
        for place, row in enumerate(rows):
            if row.positives:
                bars[place] = max(self._passages.take(row.positives) @ queries[place])
        depth = self._settings.depth + max(len(row.positives) for row in rows)
        # A little higher than the positive itself, which the block product may round otherwise.
        found = find_nearest(queries, self._passages, depth, self._context.device, bars + 1e-6)
        for place, row in enumerate(rows):
            if row.positives:
                row.best, row.rank = float(bars[place]), int(found.above[place]) + 1
        return [[int(line) for line in lines] for lines in found.lines]

    def _by_words(self, rows: list[_Row]) -> list[list[int]]:
        from aidocks.retrieval.bm25 import open_index

        assert self._searches.words is not None, "there is an index"
        index = open_index(self._searches.words, self._context)
        return [
            index.find(str(row.values["query"]), self._settings.depth + len(row.positives)) for row in rows
        ]

    def _line_up(self, row: _Row, rankings: list[list[int]], known: set[int]) -> None:
        """Put the candidates of all rankings in the order in which they are taken."""
        skip, depth = self._settings.skip, self._settings.depth
        positives = set(row.positives)
        others = [[line for line in ranking if line not in positives][:depth][skip:] for ranking in rankings]
        # One of each ranking in turn: the scores of two rankings cannot be compared, their ranks can.
        in_turn = chain.from_iterable(zip_longest(*others))
        row.candidates = [line for line in dict.fromkeys(in_turn) if line is not None and line not in known]
        if self._settings.sampling == "random":
            import numpy as np

            # By the row, so that it does not matter which part it is in.
            chance = np.random.default_rng((self._unit.seed, row.number))
            row.candidates = [row.candidates[place] for place in chance.permutation(len(row.candidates))]

    def _compare(self, rows: list[_Row]) -> None:
        """Note how alike the model finds every candidate and its query."""
        queries = self._queries.take([row.number for row in rows])
        for row, query in zip(rows, queries, strict=True):
            alike = self._passages.take(row.candidates) @ query
            row.alike = dict(zip(row.candidates, map(float, alike), strict=True))

    def _choose(self, rows: list[_Row]) -> None:
        """Take candidates of every row, in their order, until there are enough."""
        judge = self._judge() if self._unit.judge is not None and self._settings.margin is not None else None
        if judge is not None:
            pairs = [(row, line) for row in rows for line in row.positives]
            best: dict[int, float] = {}
            for (row, _), judged in zip(pairs, judge(pairs), strict=True):
                best[row.number] = max(judged, best.get(row.number, 0.0))
            for row in rows:
                row.best = best.get(row.number)
        wanted = self._settings.per_query
        while open_rows := [
            row for row in rows if len(row.chosen) < wanted and row.looked < len(row.candidates)
        ]:
            looked = []
            for row in open_rows:
                # Without a judge nothing is saved by looking at few.
                most = _JUDGED * (wanted - len(row.chosen)) if judge is not None else len(row.candidates)
                looked += [(row, line) for line in row.candidates[row.looked : row.looked + most]]
                row.looked += most
            scores = judge(looked) if judge is not None else [row.alike.get(line) for row, line in looked]
            for (row, line), score in zip(looked, scores, strict=True):
                if len(row.chosen) < wanted:
                    self._take(row, line, score)

    def _take(self, row: _Row, line: int, score: float | None) -> None:
        """Take a candidate, unless it is too much like an answer."""
        margin, most = self._settings.margin, self._settings.max_score
        alike = row.alike.get(line)
        above = most is not None and alike is not None and alike > most
        if margin is not None and score is not None and row.best is not None:
            # As a share of the positive's score; below 0 that share would be above the score itself.
            above = above or score >= row.best - margin * abs(row.best)
        if above:
            row.too_alike += 1
        else:
            row.chosen.append(line)

    def _judge(self) -> Callable[[Sequence[tuple[_Row, int]]], list[float]]:
        """Return what gives rows and lines a reranker's scores, from 0 to 1: else a share of one would say nothing."""
        from aidocks.retrieval.reranker import open_reranker

        assert self._unit.judge is not None, "there is a judge"
        model = open_reranker(self._unit.judge, self._context)

        def scores(pairs: Sequence[tuple[_Row, int]]) -> list[float]:
            texts = self._texts(line for _, line in pairs)
            found = model.scores([(str(row.values["query"]), texts[line]) for row, line in pairs])
            return [_share(float(score)) for score in found]

        return scores

    def _texts(self, lines: Iterable[int]) -> dict[int, str]:
        found = read_lines(self._searches.corpus.path, set(lines))
        return {line: str(row["text"]) for line, row in found.items()}


def _share(score: float) -> float:
    """Return the logistic function of a score."""
    return 1 / (1 + exp(-score)) if score >= 0 else exp(score) / (1 + exp(score))
