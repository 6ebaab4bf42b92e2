"""The rows of a training as its loss takes them: every text once, and rows that name texts by their numbers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch.utils.data import Dataset

from aidocks.training.retriever import EmbeddingLoss, RerankerLoss
from aidocks.training.run import Rows

#: How an example looks: a query beside its passages, each a column; two texts; or a query and a list of passages.
Layout = Literal["columns", "pairs", "lists"]
#: Of the passages of an example: no value, the grades of people, or the scores of a better model.
Values = Literal["none", "grades", "scores"]

#: Columns of texts that are looked for; all others are what is found, or its value.
QUERY_COLUMNS = ("query", "anchor", "first")
LABEL, _LABELS = "label", "labels"
#: Random passages that are looked at before the data are taken to have no other.
_TRIES = 100


@dataclass(frozen=True)
class Shape:
    """What a loss takes.

    Attributes:
        layout: How an example looks.
        values: What it says of its passages.
        negatives: Of an example; -1: as many as the request says.
        least: How many it cannot do without.
    """

    layout: Layout
    values: Values = "none"
    negatives: int = -1
    least: int = 0


_LISTS = Shape("lists", "grades", least=1)
SHAPES: Mapping[tuple[str, EmbeddingLoss | RerankerLoss], Shape] = {
    ("embedding", "mnrl"): Shape("columns"),
    ("embedding", "cached_mnrl"): Shape("columns"),
    ("embedding", "triplet"): Shape("columns", negatives=1, least=1),
    ("embedding", "cosent"): Shape("pairs", "grades", least=1),
    ("embedding", "angle"): Shape("pairs", "grades", least=1),
    ("embedding", "cosine"): Shape("pairs", "grades", least=1),
    ("embedding", "margin_mse"): Shape("columns", "scores", least=1),
    ("embedding", "distill_kl"): Shape("columns", "scores", least=1),
    ("reranker", "bce"): Shape("pairs", "grades", least=1),
    ("reranker", "mse"): Shape("pairs", "scores"),
    ("reranker", "mnrl"): Shape("columns"),
    ("reranker", "margin_mse"): Shape("columns", "scores", least=1),
    ("reranker", "lambda"): _LISTS,
    ("reranker", "ranknet"): _LISTS,
    ("reranker", "listnet"): _LISTS,
    ("reranker", "listmle"): _LISTS,
    ("reranker", "plistmle"): _LISTS,
}


@dataclass(frozen=True, slots=True)
class Example:
    """A query (or a first text), passages, and their values, none or one each (of pairs: one)."""

    query: int
    passages: tuple[int, ...]
    values: tuple[float, ...] = ()


class Examples(Dataset[dict[str, Any]]):
    """Examples as the collators of sentence-transformers take them: a dictionary of columns.

    Args:
        layout: How an example looks.
        texts: Every text once.
        examples: At least one, of numbers of texts. Of the layout ``columns`` all have as many passages.
        answers: Query -> all its right passages, also those that are not in the same example.
        given: Rows that they were made of.
        unused: How many of these had nothing that the loss could learn from.
        before_passages: What is put before every passage. (What is put before queries, the collators are told.)
    """

    def __init__(
        self,
        layout: Layout,
        texts: Sequence[str],
        examples: Sequence[Example],
        answers: Mapping[int, frozenset[int]],
        given: int,
        unused: int,
        before_passages: str = "",
    ) -> None:
        self.texts = texts
        self.examples = examples
        self.answers = answers
        self._layout = layout
        self._given = given
        self._unused = unused
        self._before = before_passages
        self.column_names = list(self[0])

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[index]
        query, passages = self.texts[example.query], [self._before + self.texts[n] for n in example.passages]
        if self._layout == "lists":
            return {"query": query, "passages": passages, _LABELS: list(example.values)}
        if self._layout == "pairs":
            return {"first": query, "second": passages[0], LABEL: example.values[0]}
        named = {"anchor": query, "positive": passages[0]}
        named |= {f"negative_{number}": text for number, text in enumerate(passages[1:], 1)}
        return named | ({LABEL: list(example.values)} if example.values else {})

    def length(self, index: int) -> int:
        """Return the characters of an example."""
        example = self.examples[index]
        return len(self.texts[example.query]) + sum(len(self.texts[each]) for each in example.passages)

    def left_out(self, what: str) -> str:
        """Say how many rows are no examples; nothing where all of them are."""
        if not self._unused:
            return ""
        return f"{self._unused} of {self._given} rows {what}: they have nothing that this loss learns from."

    def some_texts(self, most: int) -> tuple[list[str], list[str]]:
        """Return the first queries, and as many first passages, at most ``most`` of each."""
        chosen = self.examples[:most]
        passages = [self._before + self.texts[one.passages[0]] for one in chosen]
        return [self.texts[one.query] for one in chosen], passages


def load_examples(
    rows: Rows,
    kind: Literal["embedding", "reranker"],
    loss: EmbeddingLoss | RerankerLoss,
    negatives: int,
    seed: int,
    before_passages: str = "",
) -> Examples | None:
    """Read rows as examples of a loss. See `aidocks.training.retriever.RetrieverTraining` for their fields.

    Args:
        rows: The JSONL file.
        kind: What is trained.
        loss: Of the training.
        negatives: Hard negatives of an example, at most.
        seed: Of the random passages that stand in for negatives that a row lacks.
        before_passages: As in :class:`Examples`.

    Returns:
        None where no row has what the loss learns from.
    """
    shape = SHAPES[kind, loss]
    reader = _Reader(shape, negatives, seed)
    for record in _records(rows):
        reader.add(record)
    examples, unused = reader.finish()
    if not examples:
        return None
    return Examples(
        shape.layout, reader.texts, examples, reader.answers, reader.given, unused, before_passages
    )


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of the kind ``ranking``, in numbers of texts."""

    query: int
    positives: tuple[int, ...]
    negatives: tuple[int, ...]
    grades: tuple[float, ...]
    scores: tuple[float, ...]


class _Reader:
    """Numbers the texts of rows, and makes examples of these when all texts are known."""

    def __init__(self, shape: Shape, negatives: int, seed: int) -> None:
        self._shape = shape
        wanted = negatives if shape.negatives < 0 else shape.negatives
        self._most = max(shape.least, wanted)
        #: Examples of one positive, where each has but one of the negatives.
        self._each = max(1, negatives) if shape.negatives == 1 else 1
        self._seed = seed
        self._numbers: dict[str, int] = {}
        self._rows: list[_Row] = []
        self._pairs: list[Example] = []
        self.texts: list[str] = []
        self.answers: dict[int, frozenset[int]] = {}
        self.given = 0

    def add(self, record: Mapping[str, Any]) -> None:
        self.given += 1
        if "first" in record:
            first, second = self._number(record["first"]), self._number(record["second"])
            self._pairs.append(Example(first, (second,), (float(record["score"]),)))
            return
        positives = tuple(dict.fromkeys(self._number(text) for text in record["positives"]))
        negatives = tuple(dict.fromkeys(self._number(text) for text in record.get("negatives") or ()))
        grades = tuple(float(grade) for grade in record.get("grades") or ()) or (1.0,) * len(positives)
        scores = tuple(float(score) for score in record.get("scores") or ())
        row = _Row(self._number(record["query"]), positives, negatives, grades, scores)
        self.answers[row.query] = self.answers.get(row.query, frozenset()) | frozenset(positives)
        self._rows.append(row)

    def finish(self) -> tuple[list[Example], int]:
        """Return the examples, and how many rows are none."""
        passages = sorted({each for row in self._rows for each in (*row.positives, *row.negatives)})
        examples, unused = list(self._pairs), 0
        for number, row in enumerate(self._rows):
            found = self._examples(row, passages, random.Random(f"{self._seed}:{number}"))
            examples += found
            unused += not found
        return examples, unused

    def _number(self, text: str) -> int:
        found = self._numbers.setdefault(text, len(self.texts))
        if found == len(self.texts):
            self.texts.append(text)
        return found

    def _examples(self, row: _Row, passages: Sequence[int], chance: random.Random) -> list[Example]:
        if not row.positives:
            return []
        if self._shape.values == "scores":
            return self._scored(row)
        if self._shape.layout == "columns":
            return self._columns(row, passages, chance)
        wrong = row.negatives[: self._most] or tuple(self._others(row, passages, chance, self._shape.least))
        if not wrong:
            return []
        # The losses that look at the order take the best first.
        right = sorted(zip(row.grades, row.positives, strict=True), key=lambda each: -each[0])
        if self._shape.layout == "pairs":
            return [Example(row.query, (each,), (1.0,)) for _, each in right] + [
                Example(row.query, (each,), (0.0,)) for each in wrong
            ]
        values = (*(grade for grade, _ in right), *(0.0 for _ in wrong))
        return [Example(row.query, (*(each for _, each in right), *wrong), values)]

    def _columns(self, row: _Row, passages: Sequence[int], chance: random.Random) -> list[Example]:
        """Return an example of every positive; those of one row take turns at its negatives."""
        found, place = [], 0
        for positive in row.positives:
            for _ in range(min(self._each, max(1, len(row.negatives)))):
                own = min(self._most, len(row.negatives))
                wrong = [row.negatives[(place + step) % len(row.negatives)] for step in range(own)]
                place += own
                wrong += self._others(row, passages, chance, self._most - own)
                if len(wrong) == self._most:
                    found.append(Example(row.query, (positive, *wrong)))
        return found

    def _scored(self, row: _Row) -> list[Example]:
        known = (*row.positives, *row.negatives)
        if len(row.scores) != len(known):
            return []
        scores = dict(zip(known, row.scores, strict=True))
        if self._shape.layout == "pairs":
            chosen = (*row.positives, *row.negatives[: max(1, self._most)])
            return [Example(row.query, (each,), (scores[each],)) for each in chosen]
        if not row.negatives:
            return []
        found = []
        for number, positive in enumerate(row.positives):
            # What nobody has scored cannot stand in; a row with few of them takes some twice.
            begin = number * self._most
            turns = (row.negatives[(begin + step) % len(row.negatives)] for step in range(self._most))
            chosen = (positive, *turns)
            found.append(Example(row.query, chosen, tuple(scores[each] for each in chosen)))
        return found

    def _others(self, row: _Row, passages: Sequence[int], chance: random.Random, count: int) -> Iterator[int]:
        """Yield random passages that are no answer to the query, as many as there are."""
        seen = self.answers[row.query] | frozenset(row.negatives)
        for _ in range(count):
            for _ in range(_TRIES):
                other = chance.choice(passages)
                if other not in seen:
                    seen |= {other}
                    yield other
                    break


def _records(rows: Rows) -> Iterator[dict[str, Any]]:
    with rows.path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)
