"""Results as tables, from the shape of the data alone: a new operation needs nothing here.

Rules: ``x`` with a sibling ``x_standard_error`` reads ``x ± se``; names tell units (``seconds``, ``_s``, ``bytes``);
an object is one line of its facts; a list of objects is a table of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aidocks.client.wording import duration, size

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_ERROR_SUFFIX = "_standard_error"
_FIRST = ("model", "path")
_ROWS = 12
#: Numbers that are names: not grouped.
_IDENTIFIERS = ("pid", "port", "seed")


def result_view(result: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Yield what to print for a result: one table of facts, then a table for each list of objects."""
    facts: dict[str, Any] = {}
    lists: dict[str, Any] = {}
    for name in sorted(result, key=lambda name: (name not in _FIRST, name == "seconds")):
        value = result[name]
        (lists if _is_list_of_objects(value) else facts)[name] = value
    # Long lists first: the summary stays on the screen.
    for name, rows in lists.items():
        yield table_of(rows, title=f"{_words(name)}: {len(rows)}", limit=_ROWS)
    yield fact_table(facts)


def fact_table(facts: Mapping[str, Any]) -> Table:
    """Return a two-column table of names and values; what is None is left out."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _facts(facts):
        table.add_row(_words(name), Text(text))
    return table


def table_of(rows: Sequence[Mapping[str, Any]], title: str | None = None, limit: int | None = None) -> Table:
    """Return a table with a column for each name of the rows."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    names = list(dict.fromkeys(name for row in rows for name, _ in _facts(row)))
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        numeric = any(isinstance(row.get(name), int | float) for row in rows)
        table.add_column(_words(name), justify="right" if numeric else "left", overflow="fold")
    for row in rows[:limit]:
        cells = dict(_facts(row))
        table.add_row(*(Text(cells.get(name, "")) for name in names))
    if limit is not None and len(rows) > limit:
        table.caption = f"and {len(rows) - limit} more (--json shows all)"
        table.caption_justify = "left"
    return table


def _facts(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if value is None or value in ({}, [], ()) or (name.endswith(_ERROR_SUFFIX) and _base(name) in values):
            continue
        text = value_text(name, value)
        error = values.get(f"{name}{_ERROR_SUFFIX}")
        yield name, text if error is None else f"{text} ± {value_text(name, error)}"


def value_text(name: str, value: Any) -> str:
    """Format one value; the name tells its unit."""
    match value:
        case bool():
            return "yes" if value else "no"
        case int() | float() if name == "seconds" or name.endswith(("_s", "_seconds")):
            return duration(value)
        case int() if name == "bytes" or name.endswith("_bytes"):
            return size(value)
        case int():
            return f"{value:,}" if abs(value) >= 10_000 and name not in _IDENTIFIERS else str(value)
        case float():
            return f"{value:.4g}"
        case str():
            return value
        case Mapping():
            return ", ".join(f"{_words(key)} {text}" for key, text in _facts(value))
        case Sequence():
            return ", ".join(value_text(name, item) for item in value)
        case _:
            return str(value)


def _base(name: str) -> str:
    return name.removesuffix(_ERROR_SUFFIX)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(item, Mapping) for item in value)
