"""Which form the rows of a data set have, told by their columns, and which column is what.

Each method learns from a few forms; the first of them for which all columns are there is it. A field map of the request
counts more than any name, and what cannot be decided is refused with the line that would decide it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field

from aidocks.errors import InvalidSpec
from aidocks.specs.train_data import DataFormat, Role
from aidocks.training.data.field_map import check_fields
from aidocks.training.data.forms import EXPLAINED, FORMS, METHOD_FORMS
from aidocks.training.run import ONLINE_METHODS, Method


class Layout(BaseModel):
    """How the rows of one data set are read.

    Attributes:
        fields: Role -> column.
        kept: Name in the canonical row -> column, of what the rewards of an online method compare with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: DataFormat
    detected: bool
    fields: dict[Role, str]
    kept: dict[str, str] = Field(default_factory=dict)
    columns: tuple[str, ...]

    @property
    def unused(self) -> tuple[str, ...]:
        """Columns that nothing is read from."""
        used = {*self.fields.values(), *self.kept.values()}
        return tuple(column for column in self.columns if column not in used)


def detect(
    samples: Sequence[Mapping[str, Any]],
    method: Method,
    *,
    fields: Mapping[str, str] | None = None,
    format: DataFormat = "auto",
) -> Layout:
    """Tell how rows are read.

    Args:
        samples: The first rows.
        method: That shall learn from them.
        fields: Role -> column, as the request says; for online methods also new name -> column.
        format: As the request says.

    Raises:
        InvalidSpec: When the rows have no form that the method learns from, when several columns could be the same
            thing, or for a role or column that does not exist.
    """
    columns = tuple(dict.fromkeys(str(name) for row in samples for name in row))
    given = dict(fields or {})
    check_fields(given, get_args(Role), columns, further=method in ONLINE_METHODS)
    allowed = METHOD_FORMS[method] if format == "auto" else (format,)
    if format != "auto" and format not in METHOD_FORMS[method]:
        raise InvalidSpec(
            f"{method} cannot learn from {FORMS[format].title}.",
            field="format",
            value=format,
            hint=EXPLAINED,
        )
    binders = [_Binder(name, columns, samples, given, method) for name in allowed]
    found = next((binder for binder in binders if binder.complete), None)
    if found is None:
        raise _no_form(binders, columns, method, samples)
    bound = found.bind()
    if method == "sft":
        _refuse_judgements(found.form, bound, columns, samples)
    kept: dict[str, str] = {}
    if method in ONLINE_METHODS:
        asked: dict[Role, str] = {role: column for role, column in bound.items() if role != "completion"}
        named = {name: column for name, column in given.items() if name not in asked}
        if "completion" in bound:
            named.setdefault("answer", bound["completion"])
        bound, kept = asked, _kept(columns, asked, named)
    name = _told_apart(found.form, samples, bound) if format == "auto" else found.form
    return Layout(format=name, detected=format == "auto", fields=bound, kept=kept, columns=columns)


class _Binder:
    """Tries to find the columns of one form."""

    def __init__(
        self,
        form: DataFormat,
        columns: Sequence[str],
        samples: Sequence[Mapping[str, Any]],
        given: Mapping[str, str],
        method: Method,
    ) -> None:
        self.form = form
        self._roles = FORMS[form].roles
        self._given = {role: given[role] for role in self._roles if role in given}
        strange = [role for role in given if role not in self._roles and role in get_args(Role)]
        #: Roles of the field map that this form has not.
        self.strange = [role for role in strange if role != "answer" or method not in ONLINE_METHODS]
        free = [column for column in columns if column not in given.values()]
        self._candidates = {
            role: [self._given[role]] if role in self._given else _candidates(role, names, free, samples)
            for role, names in self._roles.items()
        }

    @property
    def missing(self) -> list[Role]:
        """Roles that must be there and have no column."""
        needs = FORMS[self.form].needs
        found = {column for role in needs for column in self._candidates[role]}
        absent = [role for role in needs if not self._candidates[role]]
        # Two roles cannot be read from one column.
        return absent or ([] if len(found) >= len(needs) else [list(needs)[-1]])

    @property
    def complete(self) -> bool:
        """Whether all is there, and the field map speaks of nothing else."""
        return not self.missing and not self.strange

    @property
    def distance(self) -> tuple[float, int, bool]:
        """How far the data set is from this form. Alpaca's is prompt and completion to whoever has neither."""
        return len(self.missing) / len(FORMS[self.form].needs), len(self.strange), self.form == "alpaca"

    @property
    def columns(self) -> set[str]:
        """Columns that could have a role."""
        return {column for role in self._roles for column in self._candidates[role]}

    def bind(self) -> dict[Role, str]:
        """Return role -> column.

        Raises:
            InvalidSpec: When several columns could be the same.
        """
        bound: dict[Role, str] = {}
        needs = FORMS[self.form].needs
        for role, names in self._roles.items():
            taken = set(bound.values())
            columns = [column for column in self._candidates[role] if column not in taken]
            own = [column for column in columns if column == names[0]]
            if len(columns) > 1 and not own and role in needs:
                raise InvalidSpec(
                    f"The columns {' and '.join(columns)} could both be the {role}.",
                    field="dataset",
                    value=", ".join(columns),
                    hint=f'Say which: fields: {{"{role}": "{columns[0]}"}}.',
                )
            if columns:
                bound[role] = (own or columns)[0]
        return bound


def _candidates(
    role: Role, names: Iterable[str], columns: Sequence[str], samples: Sequence[Mapping[str, Any]]
) -> list[str]:
    lower = {column.lower(): column for column in reversed(columns)}
    found = [lower[name] for name in names if name in lower]
    if role == "prompt" and "instruction" in lower:
        # Where there is an instruction, an input is what it is applied to.
        found = [column for column in found if column != lower.get("input")]
    return [column for column in found if _plausible(role, [row.get(column) for row in samples])]


def _plausible(role: Role, values: Sequence[Any]) -> bool:
    """Tell whether values can be what a role stands for; a column that is empty in all first rows cannot."""
    present = [value for value in values if value is not None]
    if role == "messages":
        return any(as_list(value) is not None for value in present)
    if role == "label":
        return any(truth(value) is not None for value in present)
    return bool(present)


def as_list(value: Any) -> list[Any] | None:
    """Return a list, also where a table holds it as JSON; None for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, list) else None


def truth(value: Any) -> bool | None:
    """Return whether an answer is wanted; None for what is no label."""
    if isinstance(value, bool):
        return value
    known = {"true": True, "false": False, "1": True, "0": False, "-1": False, "1.0": True, "0.0": False}
    return known.get(str(value).strip().lower()) if isinstance(value, str | int | float) else None


def _told_apart(
    form: DataFormat, samples: Sequence[Mapping[str, Any]], bound: Mapping[Role, str]
) -> DataFormat:
    """Return whether a conversation is ShareGPT's or OpenAI's: their columns are called alike."""
    if form not in ("messages", "sharegpt"):
        return form
    turns = (as_list(row.get(bound["messages"])) or [] for row in samples)
    first = next((turn for turn in turns if turn), [None])[0]
    return "sharegpt" if isinstance(first, dict) and "from" in first else "messages"


#: What the trainers of online methods take for something else.
_RESERVED = {
    "completion": "answer",
    "completions": "answers",
    "completion_ids": "answer_ids",
    "prompt": "prompt_",
    "prompts": "prompts_",
}


def _kept(columns: Sequence[str], bound: Mapping[Role, str], given: Mapping[str, str]) -> dict[str, str]:
    """Return what is kept beside the prompt, under names that the trainers hand on to rewards."""
    kept = dict(given)
    for column in columns:
        if column not in (*bound.values(), *given.values(), "image", "images"):
            kept.setdefault(_RESERVED.get(column, column), column)
    return kept


def _refuse_judgements(
    form: DataFormat, bound: Mapping[Role, str], columns: Sequence[str], samples: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse to teach answers that a column says are bad."""
    labels = [column for column in columns if column in FORMS["unpaired"].needs["label"]]
    if form != "prompt_completion" or not labels or labels[0] in bound.values():
        return
    if all(isinstance(row.get(labels[0]), bool) for row in samples):
        raise InvalidSpec(
            f"The column {labels[0]!r} says which completions are wanted, and sft would learn all of them.",
            field="dataset",
            value=labels[0],
            hint="Use the method kto, or leave out the rows that are not wanted, and the column.",
        )


def _no_form(
    binders: Sequence[_Binder], columns: Sequence[str], method: Method, samples: Sequence[Mapping[str, Any]]
) -> InvalidSpec:
    """Return the error that says what is there, what is needed, and how to map it."""
    nearest = min(binders, key=lambda binder: binder.distance)
    if not nearest.missing:
        role = nearest.strange[0]
        return InvalidSpec(
            f"{method} reads no {role} from rows of {FORMS[nearest.form].title}.",
            field=f"fields.{role}",
            value=role,
            hint=f"Roles here are {', '.join(FORMS[nearest.form].roles)}. {EXPLAINED}",
        )
    needs = FORMS[nearest.form].needs
    free = [column for column in columns if column not in nearest.columns]
    mapped = {}
    for missing in nearest.missing:
        close = [c for name in needs[missing] for c in get_close_matches(name, free, n=1, cutoff=0.5)]
        mapped[missing] = (close or free or ["…"])[0]
        free = [column for column in free if column != mapped[missing]]
    hint = f"{method} needs {' and '.join(needs)}."
    if mapped:
        hint += f" Name the columns: fields: {json.dumps(mapped, ensure_ascii=False)}."
    others = [
        other
        for other, forms in METHOD_FORMS.items()
        if other != method and any(_Binder(name, columns, samples, {}, other).complete for name in forms)
    ]
    if others:
        hint += f" As they are, they suit {', '.join(others)}."
    return InvalidSpec(
        f"The rows have the columns {', '.join(columns) or '(none)'}: none of them is {method}'s "
        f"{' or '.join(nearest.missing)}.",
        field="dataset",
        value=", ".join(columns)[:200],
        hint=hint,
    )


def describe_layout(layout: Layout, rows: int) -> str:
    """Say in one sentence what was found: ``Alpaca: instruction + input -> prompt, output -> completion; 881 rows``."""
    fields = layout.fields
    asked = " + ".join(
        fields[role] for role in ("system", "instruction", "prompt", "input") if role in fields
    )
    parts = [asked if asked == "prompt" else f"{asked} -> prompt"] if asked else []
    for role in ("messages", "text", "completion", "chosen", "rejected", "label", "tools"):
        if role in fields:
            parts.append(fields[role] if fields[role] == role else f"{fields[role]} -> {role}")
    kept = [name if name == column else f"{column} -> {name}" for name, column in layout.kept.items()]
    if kept:
        parts.append(f"for rewards: {', '.join(kept)}")
    title = FORMS[layout.format].title
    return f"{title[0].upper()}{title[1:]}: {', '.join(parts)}; {rows} row{'' if rows == 1 else 's'}"
