"""The distinct passages of a data set, and the queries that are answered by them, by their numbers."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence

from aidocks.retrieval.data.convert import Ranking, digest_of, digest_of_words
from aidocks.training.data.rows_file import RowsFile


def json_line(row: object) -> bytes:
    """Return a row as JSON."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode()


class Passages:
    """Distinct passages, numbered as they come. In memory are two numbers of 16 bytes of each,
    and where it stands in the file.

    Args:
        file: To which they are written; None where they are only counted.

    Attributes:
        characters: Of all of them.
        words: Of each.
    """

    def __init__(self, file: RowsFile | None) -> None:
        self.file = file
        self._numbers: dict[bytes, int] = {}
        self._spelled: dict[bytes, int] = {}
        self._ends = array("Q", [0])
        self.characters = 0
        self.words = array("L")

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, text: str) -> int:
        """Return the number of a passage, new if nothing like it was there before."""
        # Passages come again and again, mostly word for word: that is told sooner than what else counts as the same.
        words = digest_of_words(text)
        known = self._spelled.get(words)
        if known is not None:
            return known
        number = self._numbers.setdefault(digest_of(text), len(self._numbers))
        self._spelled[words] = number
        if number == len(self.words):
            self.characters += len(text)
            self.words.append(len(text.split()))
            if self.file is not None:
                self.file.write(json_line({"text": text}))
                self._ends.append(self.file.bytes)
        return number

    def number_of(self, text: str) -> int | None:
        """Return the number of the passage that is like a text; None where none is."""
        return self._numbers.get(digest_of(text))

    def text(self, number: int) -> str:
        """Return a passage as it was written first."""
        assert self.file is not None, "passages that are only counted are not read"
        text: str = json.loads(self.line(number))["text"]
        return text

    def line(self, number: int) -> bytes:
        """Return the row of a passage in the file."""
        assert self.file is not None, "passages that are only counted are not read"
        return self.file.line_at(self._ends[number], self._ends[number + 1])

    @property
    def digests(self) -> list[bytes]:
        """What tells each passage from any other."""
        return list(self._numbers)


class Query:
    """A query, of all rows that have it.

    Attributes:
        text: As it was written first.
        number: Of its first row.
        positives: Number of a right passage -> its grade.
        negatives: Numbers of the passages that a row calls wrong; what another row calls right is none of them after
            :meth:`settle`.
        scores: Number of a passage -> a better model's score.
    """

    __slots__ = ("negatives", "number", "positives", "scores", "text")

    def __init__(self, text: str, number: int) -> None:
        self.text, self.number = text, number
        self.positives: dict[int, float] = {}
        self.negatives: dict[int, None] = {}
        self.scores: dict[int, float] = {}

    def add(self, ranking: Ranking, numbers: Sequence[int]) -> None:
        """Join a row of the same query to it.

        Args:
            ranking: The row.
            numbers: Of its passages.
        """
        for passage, number in zip(ranking.passages, numbers, strict=True):
            if passage.grade:
                self.positives[number] = max(passage.grade, self.positives.get(number, 0.0))
            else:
                self.negatives[number] = None
            if passage.score is not None:
                self.scores.setdefault(number, passage.score)

    def settle(self) -> int:
        """Take what is right in any row out of what is wrong; return how many passages these were."""
        both = self.negatives.keys() & self.positives.keys()
        for number in both:
            del self.negatives[number]
        return len(both)

    @property
    def scored(self) -> bool:
        """Whether every passage has a score."""
        return all(number in self.scores for number in (*self.positives, *self.negatives))
