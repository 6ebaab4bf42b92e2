"""A look at the data of a request before any work: where they are, and whether they are what can be learnt from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from aidocks.errors import InvalidSpec
from aidocks.models.resolve import is_path, path_below
from aidocks.plan import PlanContext
from aidocks.retrieval.data.beir import beir_source
from aidocks.retrieval.data.collect import collect
from aidocks.retrieval.data.passages import Passages
from aidocks.specs.train_data import SkippedRows
from aidocks.specs.train_retrieval import RetrievalFormat
from aidocks.training.data.examples import CHECKED_BYTES, CHECKED_ROWS
from aidocks.training.data.rows import DataSource
from aidocks.training.references import data_source
from aidocks.training.retriever import RetrieverKind, RowKind

_OUTSIDE = "Move it below a directory of AIDOCKS_ALLOWED_ROOTS, or upload its rows as a data set."


class CheckedRetrieval(NamedTuple):
    """What a look at a data set found.

    Attributes:
        format: Form of the rows.
        rows: What they are.
        lines: Rows that were looked at.
        complete: Whether these are all.
        queries: Different queries among them (scored pairs: pairs).
        positives: Right passages of these.
        negatives: Wrong passages that the rows name.
        scored: Whether a better model's scores are there, of every passage.
        characters: Of all texts together, of what was looked at.
        skipped: Rows that will be left out.
    """

    format: RetrievalFormat
    rows: RowKind
    lines: int
    complete: bool
    queries: int
    positives: int
    negatives: int
    scored: bool
    characters: int
    skipped: tuple[SkippedRows, ...]


def retrieval_source(
    reference: str | Sequence[Mapping[str, Any]], context: PlanContext, field: str, split: str
) -> DataSource | None:
    """Return the data set that a request names; None for one of the hub, whose form alone is checked.

    Args:
        reference: As for :func:`aidocks.training.references.data_source`, or the path of a BEIR folder.
        context: Of the plan.
        field: Spec field to blame.
        split: Of a BEIR folder.

    Raises:
        InvalidSpec: Nothing is there, it is no data file, or no BEIR folder, or that has no such split.
        PathNotAllowed: A path outside the allowed roots.
    """
    if isinstance(reference, str) and is_path(reference):
        roots = context.resolver.allowed_roots
        path = path_below(reference, roots, field, _OUTSIDE)
        if path.is_dir():
            return beir_source(path, reference, split, roots, field)
    return data_source(reference, context, field)


def check_retrieval_data(
    source: DataSource,
    kind: RetrieverKind,
    *,
    fields: Mapping[str, str] | None = None,
    format: RetrievalFormat = "auto",
    field: str = "dataset",
) -> CheckedRetrieval:
    """Look at a data set before any work: all of it, or the first rows of a large one. No torch is needed.

    Args:
        source: As :func:`retrieval_source` returns it.
        kind: What is to be trained on it.
        fields: Role -> column, as the request says.
        format: As the request says.
        field: Spec field to blame.

    Raises:
        InvalidSpec: As for :func:`aidocks.retrieval.data.collect.collect`, with the line and the column.
    """
    whole = source.bytes <= CHECKED_BYTES
    passages = Passages(None)
    found = collect(
        source,
        kind,
        passages,
        fields=fields,
        format=format,
        field=field,
        limit=None if whole else CHECKED_ROWS,
    )
    queries = found.queries.values()
    texts = sum(len(query.text) for query in queries) + passages.characters
    return CheckedRetrieval(
        format=found.format,
        rows=found.rows,
        lines=found.lines,
        complete=whole,
        queries=len(queries) or len(found.pairs),
        positives=sum(len(query.positives) for query in queries),
        negatives=sum(len(query.negatives) for query in queries),
        scored=found.scored,
        characters=texts + sum(len(pair.first) + len(pair.second) for pair in found.pairs),
        skipped=found.skipped,
    )


def require_one_kind(found: Mapping[str, tuple[str, RowKind]]) -> RowKind:
    """Return what the rows are that a request trains on. What it only measures on may be of another kind.

    Args:
        found: Field of the request -> name of the data set, and what its rows are; at least one.

    Raises:
        InvalidSpec: They are not all the same.
    """
    names: dict[RowKind, str] = {"ranking": "queries with passages", "scored": "pairs with scores"}
    first, rows = next(iter(found.values()))
    for field, (name, other) in list(found.items())[1:]:
        if other != rows:
            raise InvalidSpec(
                f"{first} has {names[rows]}, {name} has {names[other]}.",
                field=field,
                value=name,
                hint="A training learns from one of both. The other may be measured on: name it in `eval_dataset`.",
            )
    return rows
