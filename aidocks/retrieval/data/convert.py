"""From a row as it stands in a data set to a query with passages, or to a pair of texts with a score."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Mapping
from typing import Any, NamedTuple

from aidocks.retrieval.data.detect import RetrievalLayout, number_of, texts_in
from aidocks.specs.train_retrieval import RetrievalRole
from aidocks.training.data.formats import as_list
from aidocks.training.data.rows import BadRow

#: Gains of larger ones could not be added up.
_HIGHEST_GRADE = 1000.0


class Passage(NamedTuple):
    """A passage that a row names.

    Attributes:
        grade: How right it is, 1 and more; 0 for a wrong one.
        score: A better model's, of query and passage; None without one.
    """

    text: str
    grade: float
    score: float | None = None


class Ranking(NamedTuple):
    """A query with right and wrong passages."""

    query: str
    passages: tuple[Passage, ...]


class Scored(NamedTuple):
    """Two texts, and how alike they are, in the data's own unit."""

    first: str
    second: str
    score: float


def normalised(text: str) -> str:
    """Return what two texts have in common that count as the same: NFKC, case folded, white space made one space."""
    folded = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return " ".join(folded.casefold().split())


def digest_of(text: str) -> bytes:
    """Return 16 bytes that are equal for texts that count as the same (:func:`normalised`)."""
    return digest_of_words(normalised(text))


def digest_of_words(*texts: str) -> bytes:
    """Return 16 bytes that are equal for the same texts, word for word."""
    joined = "\x1f".join(texts)
    return hashlib.blake2b(joined.encode("utf-8", "replace"), digest_size=16).digest()


class Converter:
    """Makes queries with passages, or scored pairs, of the rows of one data set.

    Args:
        layout: How its rows are read.
    """

    def __init__(self, layout: RetrievalLayout) -> None:
        self._layout, self._fields = layout, layout.fields

    def convert(self, values: Mapping[str, Any]) -> Ranking | Scored | None:
        """Return what a row says; None where it says itself that the passage does not answer the query.

        Raises:
            BadRow: Saying what is wrong in which column.
        """
        if self._layout.format == "scored_pair":
            return self._scored(values)
        if self._layout.format == "labelled_documents":
            return self._labelled(values)
        query = self._text(values, "query")
        if self._unanswered(values):
            return None
        positives = self._passages(values, self._fields["positive"])
        if not positives:
            raise self._absent(values, self._fields["positive"])
        right = self._with_scores(values, positives, "positive", grade=1.0)
        columns = self._layout.negatives or tuple(
            self._fields[role] for role in ("negative",) if role in self._fields
        )
        wrong = [text for column in columns for text in self._passages(values, column)]
        if not wrong and self._layout.format == "triplet":
            raise self._absent(values, columns[0])
        return Ranking(query, (*right, *self._with_scores(values, wrong, "negative", grade=0.0)))

    def _scored(self, values: Mapping[str, Any]) -> Scored:
        first, second = self._text(values, "first"), self._text(values, "second")
        column = self._fields["score"]
        score = number_of(values.get(column))
        if score is None:
            if values.get(column) in (None, ""):
                raise self._absent(values, column)
            raise BadRow(f"{column} is no number", field=column, detail=repr(values[column])[:40])
        return Scored(first, second, score)

    def _labelled(self, values: Mapping[str, Any]) -> Ranking:
        query = self._text(values, "query")
        documents = self._passages(values, self._fields["documents"])
        if not documents:
            raise self._absent(values, self._fields["documents"])
        labels = self._numbers(values, "labels", len(documents), self._fields["documents"])
        grades = [checked_grade(label, self._fields["labels"]) for label in labels]
        return Ranking(query, tuple(map(Passage, documents, grades)))

    def _with_scores(
        self, values: Mapping[str, Any], texts: list[str], role: str, grade: float
    ) -> tuple[Passage, ...]:
        scores: RetrievalRole = "positive_scores" if role == "positive" else "negative_scores"
        if scores not in self._fields or values.get(self._fields[scores]) in (None, "", []):
            return tuple(Passage(text, grade) for text in texts)
        column = self._fields["positive"] if role == "positive" else self._fields.get("negative", "negative")
        found = self._numbers(values, scores, len(texts), column)
        return tuple(Passage(text, grade, score) for text, score in zip(texts, found, strict=True))

    def _numbers(self, values: Mapping[str, Any], role: RetrievalRole, count: int, of: str) -> list[float]:
        column = self._fields[role]
        given = values.get(column)
        listed = as_list(given)
        if listed is None:
            listed = [given]
        if len(listed) != count:
            raise BadRow(
                f"{column} has not as many values as {of}", field=column, detail=f"{len(listed)} of {count}"
            )
        numbers = [number_of(value) for value in listed]
        if None in numbers:
            strange = listed[numbers.index(None)]
            raise BadRow(f"{column} has a value that is no number", field=column, detail=repr(strange)[:40])
        return [number for number in numbers if number is not None]

    def _text(self, values: Mapping[str, Any], role: RetrievalRole) -> str:
        column = self._fields[role]
        value = values.get(column)
        return checked_text(value, column) if value not in (None, "") else self._refuse_absent(values, column)

    def _passages(self, values: Mapping[str, Any], column: str) -> list[str]:
        """Return the texts of a column: one text, a list of them, or of objects with `text` (and `title`)."""
        value = values.get(column)
        # Where a row has one passage, a text is that passage, whatever it looks like.
        single = self._layout.format in ("pair", "triplet") and isinstance(value, str)
        listed = None if single else texts_in(value)
        if listed is None:
            listed = [] if value in (None, "") else [value]
        texts = (with_title(item) if isinstance(item, Mapping) else item for item in listed)
        return [checked_text(text, column) for text in texts]

    def _unanswered(self, values: Mapping[str, Any]) -> bool:
        """Return whether a row of SQuAD's form has no answer: its passage is a wrong one, made to mislead."""
        answers = values.get(self._layout.answers) if self._layout.answers is not None else None
        return isinstance(answers, Mapping) and "text" in answers and answers["text"] == []

    def _refuse_absent(self, values: Mapping[str, Any], column: str) -> str:
        raise self._absent(values, column)

    def _absent(self, values: Mapping[str, Any], column: str) -> BadRow:
        return BadRow(f"{column} is empty" if column in values else f"{column} is missing", field=column)


def checked_grade(label: float, column: str) -> float:
    """Return how right a label says that a passage is: 0 for a wrong one, else 1 to 1000.

    Raises:
        BadRow: It is a part of 1, or so large that it is no grade.
    """
    if 0 < label < 1 or label > _HIGHEST_GRADE:
        raise BadRow(
            f"{column} has {'a part of 1' if label < 1 else 'a number above 1000'}: labels are 0 (wrong), "
            "or 1 and more (how right)",
            field=column,
            detail=str(label),
        )
    # TREC's judgements below 0 are wrong ones, too.
    return max(0.0, label)


def with_title(row: Mapping[str, Any], column: str = "text") -> Any:
    """Return what a row has for a text, with its `title` before it: so BEIR's own models read passages."""
    title, text = row.get("title"), row.get(column)
    return f"{title} {text}".strip() if isinstance(title, str) and isinstance(text, str) else text


def checked_text(value: Any, column: str) -> str:
    """Return a text that can be written.

    Raises:
        BadRow: It is none, or there is nothing in it.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadRow(f"{column} is empty", field=column)
    if not isinstance(value, str):
        raise BadRow(f"{column} is not text", field=column, detail=type(value).__name__)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRow(
                f"{column} has half of a character",
                field=column,
                detail=f"{error.object[error.start : error.end]!a}",
            ) from error
    return value
