"""Field maps of requests: which column is what, where a training does not find it by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from aidocks.errors import InvalidSpec


def check_fields(
    given: Mapping[str, str], roles: Sequence[str], columns: Sequence[str], *, further: bool = False
) -> None:
    """Refuse a field map that speaks of what is not there.

    Args:
        given: Role -> column, as the request says.
        roles: That there are.
        columns: Of the data set.
        further: Whether other names than roles may be mapped, too.

    Raises:
        InvalidSpec: Naming the role or the column, and the nearest one that there is.
    """
    for role, column in given.items():
        if role not in roles and not further:
            raise InvalidSpec(
                f"A field map has no role {role!r}.",
                field=f"fields.{role}",
                value=role,
                hint=nearest(role, roles) or f"Roles are {', '.join(roles)}.",
            )
        if column not in columns:
            raise InvalidSpec(
                f"The data set has no column {column!r}.",
                field=f"fields.{role}",
                value=column,
                hint=nearest(column, columns) or f"Its columns are {', '.join(columns)[:300]}.",
            )


def nearest(name: str, known: Sequence[str]) -> str | None:
    """Ask for the nearest of the names that there are; None where none is near."""
    close = get_close_matches(name, known, n=1)
    return f"Did you mean {close[0]!r}?" if close else None
