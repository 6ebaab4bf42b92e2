"""Results as tables, from the shape of the data alone: a new operation needs nothing here.

Rules: ``x`` with a sibling ``x_standard_error`` (or followed by ``standard_error``) reads ``x ± se``; names
tell units (``seconds``, ``_s``, ``bytes``, ``_at``; ``_per_s`` is a rate); ``x`` with ``x_low`` and ``x_high`` (or
followed by ``low`` and ``high``) reads ``x [low, high]``; an object is one line of its facts; a list of objects is a
table, and so are several objects of the same facts. In a row of a table, numbers by name are columns of these names,
and so are objects of a name and a number; objects with ``before`` and ``after`` are rows of their own.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from aidocks.client.wording import duration, size

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_FIRST = ("model", "path")
_ROWS = 12
#: Of a longer text only the first half of so many lines is shown.
_LINES = 12
#: The first column tells what a row is; a job's id has 24 characters.
_ID_WIDTH = 24
#: Texts in a wide table are broken beyond it.
_TEXT_WIDTH = 60
#: Numbers that are names: not grouped.
_IDENTIFIERS = ("pid", "port", "seed")


def result_view(result: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Yield what to print for a result: one table of facts, then a table for each list of objects."""
    facts: dict[str, Any] = {}
    lists: dict[str, Any] = {}
    for name in sorted(result, key=lambda name: (name not in _FIRST, name == "seconds")):
        value = result[name]
        (lists if _is_list_of_objects(value) else facts)[name] = value
    _gather(facts, lists)
    # Long lists first: the summary stays on the screen.
    for name, rows in lists.items():
        figures = [figure for row in rows for figure in _compared(row)]
        limit = _ROWS if len(figures) == len(rows) else None
        yield table_of(figures, title=f"{_words(name)}: {len(rows)}", limit=limit)
        yield ""
    yield fact_table(facts)


def _gather(facts: dict[str, Any], lists: dict[str, Any]) -> None:
    """Make one list of several objects that tell the same facts, and of the lists of such objects."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping) and value:
            groups.setdefault(tuple(value), []).append(name)
    for keys, names in groups.items():
        alike = [name for name, rows in lists.items() if tuple(rows[0]) == keys]
        if len(names) > 1:
            rows = [facts.pop(name) for name in names] + [row for name in alike for row in lists.pop(name)]
            lists[", ".join([*names, *alike])] = rows


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
    from rich.table import Table
    from rich.text import Text

    rows = [_spread(row) for row in rows]
    names = list(dict.fromkeys(name for row in rows for name, _ in _facts(row)))
    table = Table(
        title=title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False
    )
    cells = [dict(_facts(row)) for row in rows]
    widths = {name: max([len(_words(name)), *(len(row.get(name, "")) for row in cells)]) for name in names}
    for number, name in enumerate(names):
        numeric = any(isinstance(row.get(name), int | float) for row in rows)
        table.add_column(
            _words(name),
            justify="right" if numeric else "left",
            overflow="fold",
            no_wrap=numeric or widths[name] <= (_ID_WIDTH if number == 0 else _ID_WIDTH // 2),
        )
    needed = sum(min(width, _TEXT_WIDTH) + 2 for width in widths.values())
    if needed > shutil.get_terminal_size().columns:
        # Lines that the terminal breaks are easier to read than columns of three letters.
        table.width = needed
    for row in cells[:limit]:
        table.add_row(*(Text(row.get(name, "")) for name in names))
    if limit is not None and len(rows) > limit:
        table.caption = f"and {len(rows) - limit} more (--json shows all)"
        table.caption_justify = "left"
    return table


def _compared(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row, or one for each figure where it has a list of figures before and after."""
    for name, value in row.items():
        if _is_list_of_objects(value) and {"before", "after"} <= set(value[0]):
            rest = {other: fact for other, fact in row.items() if other != name}
            return [rest | item for item in value]
    return [dict(row)]


def _spread(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with what is measured of several things as a column for each of them."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping) and value and all(isinstance(n, int | float) for n in value.values()):
            flat |= value
        elif _is_list_of_objects(value) and all(isinstance(next(iter(item.values())), str) for item in value):
            for item in value:
                (_, title), *facts = _facts(item)
                numbers = [fact for fact in facts if isinstance(item[fact[0]], int | float)]
                flat |= {title: (numbers or facts)[0][1]} if facts else {}
        else:
            flat[name] = value
    return flat


def _facts(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    errors, intervals = dict(_standard_errors(values)), dict(_intervals(values))
    beside = {*errors.values(), *(end for ends in intervals.values() for end in ends)}
    for name, value in values.items():
        if value is None or value in ({}, [], ()) or name in beside:
            continue
        error = values.get(errors.get(name, ""))
        ends = [values[end] for end in intervals.get(name, ())]
        if isinstance(value, int | float) and isinstance(error, int | float):
            yield name, measured_text(value, error)
        elif isinstance(value, float) and ends and all(isinstance(end, int | float) for end in ends):
            yield name, f"{value:.4f} [{ends[0]:.4f}, {ends[1]:.4f}]"
        elif text := value_text(name, value):
            yield name, text


def _standard_errors(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield pairs of a name and the name of its standard error."""
    before = None
    for name in values:
        if name == "standard_error" and before is not None:
            yield before, name
        elif name.endswith("_standard_error") and name.removesuffix("_standard_error") in values:
            yield name.removesuffix("_standard_error"), name
        before = name


def _intervals(values: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield pairs of a name and the names of the ends of its interval."""
    before = None
    for name in values:
        if name == "low" and "high" in values and before is not None:
            yield before, ("low", "high")
        elif f"{name}_low" in values and f"{name}_high" in values:
            yield name, (f"{name}_low", f"{name}_high")
        before = name


def measured_text(value: float, error: float) -> str:
    """Format a measured value: two digits of the error, and as many of the value as it warrants."""
    if not (math.isfinite(value) and math.isfinite(error) and error > 0):
        return f"{value:.4g} ± {error:.2g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    if decimals > 5:
        return f"{value:.3g} ± {error:.2g}"
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def value_text(name: str, value: Any) -> str:
    """Format one value; the name tells its unit."""
    match value:
        case bool():
            return "yes" if value else "no"
        case int() | float() if name.endswith("_per_s"):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        case int() | float() if name == "seconds" or name.endswith(("_s", "_seconds")):
            return duration(value)
        case int() if name == "bytes" or name.endswith("_bytes"):
            return size(value)
        case int():
            return f"{value:,}" if abs(value) >= 10_000 and name not in _IDENTIFIERS else str(value)
        case float():
            return f"{value:.4g}"
        case str() if name.endswith("_at"):
            return f"{datetime.fromisoformat(value).astimezone():%Y-%m-%d %H:%M:%S}"
        case str() if name.endswith(("hash", "sha256")):
            return value[:12]
        case str() if value.count("\n") > _LINES:
            lines = value.splitlines()
            return "\n".join(
                [*lines[: _LINES // 2], f"and {len(lines) - _LINES // 2} more lines (--json shows all)"]
            )
        case str():
            return value
        case Mapping():
            return ", ".join(f"{_words(key)} {text}" for key, text in _facts(value))
        case Sequence() if len(value) > _ROWS and not isinstance(value[0], Mapping):
            return f"{len(value)} (--json shows them)"
        case Sequence():
            texts = [value_text(name, item) for item in value]
            # Sentences stand in lines of their own, words in one.
            return ("\n" if any(text.endswith(".") and " " in text for text in texts) else ", ").join(texts)
        case _:
            return str(value)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _is_list_of_objects(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(item, Mapping) for item in value)
    )
