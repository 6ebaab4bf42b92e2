"""The files of what is measured on: queries of one data set, and the passages in which they look."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from aidocks.retrieval.data.collect import Collected
from aidocks.retrieval.data.passages import Passages, Query

#: Grade as it is written: a whole number where it is one, in every row alike.
Grade = Callable[[float], float]


def passages_to_search(data: Collected, places: Sequence[int], most: int) -> list[int] | None:
    """Return the numbers of the passages in which queries look; None for all.

    Those that a query's own rows name are always among them; the others are chosen by their content, so that one more
    passage in the data moves no other.

    Args:
        data: The data set.
        places: Of its queries that are measured on.
        most: Passages at most; what the queries' own rows name may be more.
    """
    if len(data.passages) <= most:
        return None
    queries = list(data.queries.values())
    named = {number for place in places for number in (*queries[place].positives, *queries[place].negatives)}
    digests = data.passages.digests
    others = sorted((n for n in range(len(digests)) if n not in named), key=digests.__getitem__)
    return sorted(named | set(others[: max(0, most - len(named))]))


def ranking_rows(
    data: Collected, places: Sequence[int], searched: Sequence[int] | None, grade: Grade
) -> list[dict[str, Any]]:
    """Return the queries in the form of :class:`aidocks.retrieval.eval_set.EvalSet`.

    Args:
        data: The data set.
        places: Of its queries that are measured on.
        searched: Passages in which they look, as :func:`passages_to_search` returns them.
        grade: As grades are written.
    """
    lines = None if searched is None else {number: line for line, number in enumerate(searched)}
    queries = list(data.queries.values())
    digests = data.passages.digests
    rows = []
    for place in places:
        row = _ranking_row(queries[place], lines, digests, grade)
        itself = data.passages.number_of(queries[place].text)
        at = itself if lines is None or itself is None else lines.get(itself)
        # The question itself, among the passages, answers nothing, unless the data say so.
        rows.append(row if at is None or str(at) in row["relevant"] else row | {"itself": at})
    return rows


def _ranking_row(
    query: Query, lines: dict[int, int] | None, digests: Sequence[bytes], grade: Grade
) -> dict[str, Any]:
    line: Callable[[int], int] = (lambda number: number) if lines is None else lines.__getitem__
    # In an order that says nothing: with the right ones first, a model that gives all the same score would seem good.
    named = sorted((*query.positives, *query.negatives), key=digests.__getitem__)
    return {
        "query": query.text,
        "relevant": {str(line(number)): grade(value) for number, value in sorted(query.positives.items())},
        "candidates": [line(number) for number in named],
    }


def training_row(
    query: Query, passages: Passages, number: int, grade: Grade | None, *, scored: bool
) -> dict[str, Any]:
    """Return a query in the training format of ``RetrieverTraining``.

    Args:
        query: With its passages' numbers.
        passages: Of its data set.
        number: Of the data set.
        grade: As grades are written; None to leave them out.
        scored: Whether a better model's scores are written.
    """
    row: dict[str, Any] = {
        "query": query.text,
        "positives": [passages.text(one) for one in query.positives],
        "negatives": [passages.text(one) for one in query.negatives],
    }
    if grade is not None:
        row["grades"] = [grade(value) for value in query.positives.values()]
    if scored:
        row["scores"] = [query.scores[one] for one in (*query.positives, *query.negatives)]
    return row | {"set": number}
