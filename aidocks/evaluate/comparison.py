"""Models beside one another: what was measured of each, as numbers, as text and as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from aidocks.evaluate.domains import DomainResults
from aidocks.evaluate.texts import Domain
from aidocks.models.manifest import Section, Table
from aidocks.specs.perplexities import DomainPerplexity, ModelPerplexity

#: Columns of a table on the model card, at most; the rest is in the report's files.
MOST_COLUMNS = 12


def shown(reference: str) -> str:
    """Return a model reference without the directories of this machine: reports are made to be published."""
    is_path = reference.startswith(("/", ".", "~"))
    return (Path(reference).name or reference) if is_path else reference


def model_perplexities(
    subjects: Sequence[tuple[str, str]], results: Sequence[DomainResults], domains: Sequence[Domain]
) -> tuple[ModelPerplexity, ...]:
    """Bring what was measured into the form of the result.

    Args:
        subjects: (which model it is, its reference) of every model; see :class:`ModelPerplexity`.
        results: Of every model, in the same order.
        domains: Those that each of them was measured on.
    """
    return tuple(
        ModelPerplexity(
            model=model,
            reference=reference,
            domains=tuple(
                DomainPerplexity(
                    domain=domain.name,
                    perplexity=measured.perplexity,
                    standard_error=measured.standard_error,
                    tokens=measured.total_tokens,
                )
                for domain, measured in zip(domains, found.results, strict=True)
            ),
        )
        for (model, reference), found in zip(subjects, results, strict=True)
    )


def plus_minus(measured: DomainPerplexity) -> str:
    """Return `8.640 ± 0.31`."""
    if measured.perplexity is None:
        return "not finite"
    error = "" if measured.standard_error is None else f" ± {significant(measured.standard_error, 2)}"
    return significant(measured.perplexity, 4) + error


def significant(value: float, digits: int) -> str:
    """Return a number that is not negative with so many digits that count, as people write it: `10.00`, `29,720`."""
    if value >= 1e9:
        return f"{value:.{digits - 1}e}"
    whole = math.floor(math.log10(value)) + 1 if value > 0 else 1
    return f"{round(value, digits - whole):,.{max(0, digits - whole)}f}"


def ranges(numbers: Iterable[int]) -> str:
    """Return numbers in short: `0-3, 7`."""
    ordered = sorted(set(numbers))
    starts = [number for before, number in pairwise((-2, *ordered)) if number != before + 1]
    ends = [number for number, after in pairwise((*ordered, -2)) if after != number + 1]
    pairs = zip(starts, ends, strict=True)
    return ", ".join(str(start) if start == end else f"{start}-{end}" for start, end in pairs)


def perplexity_section(
    models: Sequence[ModelPerplexity],
    titles: Sequence[str],
    texts: Sequence[str],
    remarks: Sequence[str] = (),
) -> Section:
    """Return the table of perplexities for the model card, the best of each column bold.

    Args:
        models: All with the same domains.
        titles: What people call each of them.
        texts: What people call each domain.
        remarks: Further paragraphs above the table.
    """
    columns = range(min(len(texts), MOST_COLUMNS))
    best = set()
    for column in columns:
        values = [model.domains[column].perplexity for model in models]
        known = [value for value in values if value is not None]
        best |= {(row, column + 1) for row, value in enumerate(values) if known and value == min(known)}
    text = [
        "Lower is better; ± is the standard error over chunks of held-out text. The best of a column is bold."
    ]
    if len(texts) > len(columns):
        text.append(f"{len(texts) - len(columns)} more texts are in report/report.json.")
    return Section(
        title="Perplexity",
        text=(*text, *remarks),
        table=Table(
            header=("model", *(texts[column] for column in columns)),
            rows=tuple(
                (title, *(plus_minus(model.domains[column]) for column in columns))
                for title, model in zip(titles, models, strict=True)
            ),
            strong=tuple(sorted(best)),
        ),
    )
