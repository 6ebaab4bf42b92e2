"""Which form the rows of a data set have, told by their columns and what these hold, and which column is what."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, cast, get_args

from pydantic import BaseModel, ConfigDict

from aidocks.errors import InvalidSpec
from aidocks.retrieval.data.forms import EXPLAINED, FORMS, NUMBERED_NEGATIVE, PROMPT_COLUMNS, Names
from aidocks.specs.train_retrieval import RetrievalFormat, RetrievalRole
from aidocks.training.data.field_map import check_fields
from aidocks.training.data.formats import as_list

#: Column in which data sets of the form of SQuAD say the answers, as ``{"text": [...]}``.
_ANSWERS = "answers"


class RetrievalLayout(BaseModel):
    """How the rows of one data set are read.

    Attributes:
        fields: Role -> column.
        negatives: Columns of negatives, if there are several.
        answers: Column that says, by being empty, that the passage does not answer the query.
        columns: All of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: RetrievalFormat
    detected: bool
    fields: dict[RetrievalRole, str]
    negatives: tuple[str, ...] = ()
    answers: str | None = None
    columns: tuple[str, ...]

    @property
    def named(self) -> dict[str, str]:
        """Role -> column, with a role for each further column of negatives."""
        named: dict[str, str] = {str(role): column for role, column in self.fields.items()}
        for number, column in enumerate(self.negatives, start=1):
            named["negative" if number == 1 else f"negative_{number}"] = column
        return named

    @property
    def unused(self) -> tuple[str, ...]:
        """Columns that nothing is read from."""
        used = {*self.fields.values(), *self.negatives, self.answers}
        return tuple(column for column in self.columns if column not in used)

    @property
    def prompts(self) -> tuple[str, ...]:
        """Columns that say what is put before a text, and are not heeded."""
        return tuple(column for column in self.unused if column.lower() in PROMPT_COLUMNS)


def detect(
    samples: Sequence[Mapping[str, Any]],
    *,
    fields: Mapping[str, str] | None = None,
    format: RetrievalFormat = "auto",
    field: str = "dataset",
) -> RetrievalLayout:
    """Tell how rows are read.

    Args:
        samples: The first rows.
        fields: Role -> column, as the request says.
        format: As the request says.
        field: Spec field to blame.

    Raises:
        InvalidSpec: When the rows have no known form, when several columns could be the same thing, or for a role or
            column that does not exist.
    """
    columns = tuple(dict.fromkeys(str(name) for row in samples for name in row))
    given = _checked(dict(fields or {}), columns)
    if format == "beir":
        raise InvalidSpec(
            "BEIR is a folder, and this is a file or rows.",
            field="format",
            value=format,
            hint="Name the folder in which corpus.jsonl, queries.jsonl and qrels/ are.",
        )
    allowed = list(FORMS) if format == "auto" else [format]
    binders = [_Binder(name, columns, samples, given, told=format != "auto") for name in allowed]
    found = next((binder for binder in binders if binder.fits), None)
    if found is None:
        raise _no_form(binders, columns, field)
    bound = found.bind(field)
    negatives = found.numbered if {"positive", "negative"} & set(FORMS[found.form].roles) else ()
    if "negative" in bound and negatives:
        negatives = (bound["negative"], *negatives)
    answers = next((column for column in columns if column.lower() == _ANSWERS), None)
    return RetrievalLayout(
        format=found.form,
        detected=format == "auto",
        fields=bound,
        negatives=negatives,
        answers=answers if "positive" in bound and answers not in bound.values() else None,
        columns=columns,
    )


class _Binder:
    """Tries to find the columns of one form."""

    def __init__(
        self,
        form: RetrievalFormat,
        columns: Sequence[str],
        samples: Sequence[Mapping[str, Any]],
        given: Mapping[RetrievalRole, str],
        *,
        told: bool,
    ) -> None:
        self.form, self._told = form, told
        self._form = FORMS[form]
        self._values = {column: [row.get(column) for row in samples] for column in columns}
        named = {self._form.called.get(role, role): column for role, column in given.items()}
        #: Roles of the field map that this form has not.
        self.strange = [role for role in named if role not in self._form.roles]
        self._free = [column for column in columns if column not in named.values()]
        self._candidates = {
            role: [named[role]] if role in named else self._find(role, names)
            for role, names in self._form.roles.items()
        }
        #: Columns `negative_1`, `negative_2` and so on, unless the field map says which one it is.
        self.numbered: tuple[str, ...] = ()
        if "negative" not in named:
            self.numbered = tuple(c for c in self._free if NUMBERED_NEGATIVE.fullmatch(c.lower()))

    @property
    def missing(self) -> list[RetrievalRole]:
        """Roles that must be there and have no column."""
        absent = [role for role in self._form.needs if not self._candidates[role]]
        return [role for role in absent if role != "negative" or not self.numbered]

    @property
    def fits(self) -> bool:
        """Whether all is there, the field map speaks of nothing else, and what the columns hold is of this form."""
        if self.missing or self.strange:
            return False
        if self._told:
            return True
        if not all(
            self._plausible(role, column) for role in self._form.lists for column in self._candidates[role]
        ):
            return False
        if self.form != "query_lists":
            return True
        scores = bool(self._candidates["positive_scores"] or self._candidates["negative_scores"])
        listed = [*self._candidates["positive"][:1], *self._candidates["negative"][:1]]
        return scores or any(texts_in(value) is not None for c in listed for value in self._values[c])

    @property
    def distance(self) -> tuple[float, int, bool]:
        """How far the data set is from this form; pairs are what rows are that are far from all."""
        return len(self.missing) / len(self._form.needs), len(self.strange), self.form != "pair"

    @property
    def columns(self) -> set[str]:
        """Columns that could have a role."""
        return {column for columns in self._candidates.values() for column in columns}

    def bind(self, field: str) -> dict[RetrievalRole, str]:
        """Return role -> column.

        Raises:
            InvalidSpec: When several columns could be the same.
        """
        bound: dict[RetrievalRole, str] = {}
        for role in self._form.roles:
            taken = set(bound.values())
            columns = [column for column in self._candidates[role] if column not in taken]
            own = [column for column in columns if column.lower() == role]
            if len(columns) > 1 and not own:
                raise InvalidSpec(
                    f"The columns {' and '.join(columns)} could both be the {role}.",
                    field=field,
                    value=", ".join(columns),
                    hint=f'Say which: fields: {{"{role}": "{columns[0]}"}}.',
                )
            if columns:
                bound[role] = (own or columns)[0]
        return bound

    def _find(self, role: RetrievalRole, names: Names) -> list[str]:
        """Return the columns that the first group of names finds, of which any is there."""
        lower = {column.lower(): column for column in reversed(self._free)}
        for group in names:
            found = [lower[name] for name in group if name in lower]
            plausible = [column for column in found if self._plausible(role, column)]
            if plausible:
                return plausible
        return []

    def _plausible(self, role: RetrievalRole, column: str) -> bool:
        """Tell whether a column can be what a role stands for; one that is empty in all first rows cannot."""
        present = [value for value in self._values[column] if value not in (None, "")]
        if role in self._form.lists or role in ("positive_scores", "negative_scores"):
            return any(as_list(value) is not None for value in present)
        if role == "score":
            return any(number_of(value) is not None for value in present)
        if role in ("query", "first", "second"):
            return any(isinstance(value, str | int | float) for value in present)
        return any(isinstance(value, str | list | Mapping | int | float) for value in present)


def texts_in(value: Any) -> list[Any] | None:
    """Return a list of texts (or of objects with them), also where a table holds it as JSON; None for anything else.

    What is text, and only looks like a list (`[1]`), stays one text.
    """
    found = as_list(value)
    if isinstance(value, str) and not all(isinstance(item, str | Mapping) for item in found or ()):
        return None
    return found


def number_of(value: Any) -> float | None:
    """Return a number, also where a table holds it as text; None for anything else, infinity and NaN included."""
    if isinstance(value, bool):
        return float(value)
    try:
        number = float(value) if isinstance(value, int | float | str) else None
    except (ValueError, OverflowError):
        return None
    # An infinite number less itself is not zero, and neither is NaN.
    return number if number is not None and number - number == 0 else None


def _checked(given: Mapping[str, str], columns: Sequence[str]) -> dict[RetrievalRole, str]:
    try:
        check_fields(given, get_args(RetrievalRole), columns)
    except InvalidSpec as error:
        error.hint = f"{error.hint} A field map is for all data sets of a request."
        raise
    return {cast("RetrievalRole", role): column for role, column in given.items()}


def _no_form(binders: Sequence[_Binder], columns: Sequence[str], field: str) -> InvalidSpec:
    """Return the error that says what is there, what is needed, and how to map it."""
    nearest = min(binders, key=lambda binder: binder.distance)
    form = FORMS[nearest.form]
    if not nearest.missing:
        role = nearest.strange[0]
        return InvalidSpec(
            f"Rows of {form.title} have no {role}.",
            field=f"fields.{role}",
            value=role,
            hint=f"Their roles are {', '.join(form.roles)}. {EXPLAINED}",
        )
    if {"query-id", "corpus-id"} <= {column.lower() for column in columns}:
        return InvalidSpec(
            "These rows are judgements of a BEIR folder, without its texts.",
            field=field,
            value=", ".join(columns),
            hint="Name the folder in which corpus.jsonl, queries.jsonl and qrels/<split>.tsv are. A data set of the "
            "hub in this form is not read from there: download it, and name its folder.",
        )
    free = [column for column in columns if column not in nearest.columns]
    mapped = {}
    for missing in nearest.missing:
        names = [name for group in form.needs[missing] for name in group]
        close = [column for name in names for column in get_close_matches(name, free, n=1, cutoff=0.7)]
        mapped[missing] = (close or free or ["…"])[0]
        free = [column for column in free if column != mapped[missing]]
    return InvalidSpec(
        f"The rows have the columns {', '.join(columns)[:300] or '(none)'}: none of them is the "
        f"{' or the '.join(nearest.missing)} of {form.title}.",
        field=field,
        value=", ".join(columns)[:200],
        hint=f"Name the columns: fields: {json.dumps(mapped, ensure_ascii=False)}. {EXPLAINED}",
    )
