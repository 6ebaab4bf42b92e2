"""What a request's data sets turned out to be: as figures, and in a sentence for people."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from aidocks.retrieval.data.collect import Collected
from aidocks.retrieval.data.divide import Part
from aidocks.retrieval.data.forms import FORMS
from aidocks.specs.train_data import LengthSummary
from aidocks.specs.train_retrieval_result import RankingData
from aidocks.training.data.rows import describe_skipped


def summarise(data: Collected, part: Part, sha256: str | None) -> RankingData:
    """Return what was found in a data set.

    Args:
        data: The data set.
        part: What is done with it.
        sha256: Of its rows that are trained on; None without any.
    """
    queries = list(data.queries.values())
    train = [queries[place] for place in part.train] if queries else []
    return RankingData(
        dataset=data.source.name,
        format=data.format,
        detected=data.detected,
        rows=data.rows,
        fields=data.fields,
        unused=data.unused,
        lines=data.lines,
        train=len(part.train),
        held_out=len(part.held_out),
        positives=sum(len(query.positives) for query in train),
        negatives=sum(len(query.negatives) for query in train),
        passages=len(data.passages),
        skipped=data.skipped,
        duplicates=data.duplicates,
        leaked=part.leaked,
        shared_passages=part.shared_passages,
        lengths=_lengths(data),
        sha256=sha256,
        revision=data.source.revision,
    )


def describe(data: Collected, summary: RankingData, measured: int, passages: int) -> str:
    """Say in words what was found in a data set, and what was made of it.

    Args:
        data: The data set.
        summary: The same as figures.
        measured: Queries (or pairs) of it that are measured on.
        passages: Passages in which these look.
    """
    title = "BEIR" if data.format == "beir" else FORMS[data.format].title
    fields = [
        column if column == role else f"{column} -> {role}"
        for role, column in list(summary.fields.items())[:8]
    ]
    what = "judgement" if data.format == "beir" else "row"
    one = "query" if data.rows == "ranking" else "pair"
    parts = [f"{data.source.name}: {title}"]
    parts += [f" ({', '.join(fields)})"] if fields else []
    parts.append(f", {_count(data.lines, what)}: ")
    if summary.train or summary.leaked:
        parts.append(f"{_count(summary.train, one)} to train on, {summary.held_out:,} held out")
    else:
        parts.append(f"{_count(summary.held_out, one)}, only measured on")
    if measured < summary.held_out:
        parts.append(f" ({measured:,} of them are measured on)")
    if data.rows == "ranking" and summary.train:
        parts.append(f"; {_count(summary.positives, 'right passage')}")
        parts.append(f" and {_count(summary.negatives, 'wrong one')} to learn from")
    if summary.lengths is not None:
        what = _count(summary.passages, "different passage") if data.rows == "ranking" else "texts"
        parts.append(f"; {what} of {_count(summary.lengths.median, 'word')} in the median")
    parts.append(".")
    return " ".join(["".join(parts), *_notes(data, summary, measured, passages)])


def _notes(data: Collected, summary: RankingData, measured: int, passages: int) -> Iterable[str]:
    if data.grouped:
        yield "The pairs are labelled 0 and 1: those of one query are its right and its wrong passages."
    if data.scale != 1:
        yield f"Scores go up to {data.scale:g}, and are divided by that."
    if measured and passages < summary.passages:
        yield f"Queries that are measured on look in {passages:,} passages, theirs among them."
    if data.contradictions:
        yield (
            f"{_count(data.contradictions, 'passage')} that one row calls wrong and another right, of the same query, "
            f"{'counts' if data.contradictions == 1 else 'count'} as right."
        )
    if data.partly_scored:
        yield "Scores are not used: some passages have none."
    if data.prompts:
        yield (
            f"What the column {' and '.join(data.prompts)} says is not put before texts: that is `query_prompt` and "
            "`passage_prompt`."
        )
    if summary.duplicates:
        yield f"{_count(summary.duplicates, 'row')} occur{'s' if summary.duplicates == 1 else ''} more than once."
    if summary.leaked:
        what = "query" if data.rows == "ranking" else "pair"
        them = "it" if summary.leaked == 1 else "them"
        yield (
            f"{_count(summary.leaked, f'more {what}')} {'is' if summary.leaked == 1 else 'are'} not trained on: "
            f"what is measured on has {them}, too."
        )
    if summary.shared_passages:
        yield (
            f"{_count(summary.shared_passages, 'held-out query')} {'has' if summary.shared_passages == 1 else 'have'} "
            "a right passage in common with a query that is trained on."
        )
    if summary.skipped:
        yield f"Left out: {describe_skipped(summary.skipped, data.place)}"


def _count(number: int, what: str) -> str:
    plural = f"{what[:-1]}ies" if what.endswith("y") else f"{what}s"
    if what.endswith(" one"):
        plural = f"{what}s"
    return f"{number:,} {what if number == 1 else plural}"


def _lengths(data: Collected) -> LengthSummary | None:
    """Return how many words passages have; of scored pairs, texts."""
    import numpy as np

    words = data.passages.words
    if data.rows == "scored":
        words = array("L", (len(text.split()) for pair in data.pairs for text in pair[:2]))
    if not words:
        return None
    counted = np.asarray(words, dtype=np.int64)
    return LengthSummary(
        median=int(np.median(counted)),
        p95=int(np.quantile(counted, 0.95, method="higher")),
        longest=int(counted.max()),
    )
