"""The fenced blocks of the project's pages."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.S
)


@dataclass(frozen=True)
class Block:
    """One fenced block: where it is, its language, the other words of its info string, and its text."""

    page: str
    line: int
    language: str
    marks: tuple[str, ...]
    text: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of_all_pages() -> list[Block]:
    """Return the blocks of README.md, CONTRIBUTING.md and docs/*.md, in order."""
    return [block for page in pages() for block in blocks_of(page)]


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for match in _FENCE.finditer(text):
        language, *marks = match["info"].split() or [""]
        line = text.count("\n", 0, match.start()) + 1
        body = textwrap.dedent(match["text"])
        found.append(Block(str(page.relative_to(ROOT)), line, language, tuple(marks), body))
    return found


def command_on_path(environment: dict[str, str], directory: Path) -> dict[str, str]:
    """Return ``environment`` with an ``aidocks`` command, also where the project is not installed."""
    if shutil.which("aidocks", path=environment["PATH"]):
        return environment
    commands = directory / "bin"
    commands.mkdir(exist_ok=True)
    script = commands / "aidocks"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m aidocks "$@"\n')
    script.chmod(0o755)
    return environment | {"PATH": f"{commands}{os.pathsep}{environment['PATH']}"}


def section(page: str, title: str) -> str:
    """Return what stands below a heading of the second level, up to the next one."""
    found = re.search(rf"^## {re.escape(title)}$(.*?)^## ", page, re.MULTILINE | re.S)
    assert found is not None, title
    return found[1]


def table_rows(text: str) -> list[list[str]]:
    """Return the cells of the rows of tables that begin with code."""
    lines = re.findall(r"^\| (`.*) \|$", text, re.MULTILINE)
    return [[cell.strip() for cell in line.split(" | ")] for line in lines]


def names_in(cell: str) -> list[str]:
    """Return the names that a cell has as code."""
    return re.findall(r"`(\w+)`", cell)


def check_defaults(text: str, fields: Mapping[str, Any], otherwise: Mapping[str, str] | None = None) -> None:
    """Assert that a default that stands as a word or a number in the row of a field is the field's own.

    Args:
        text: With tables of fields, defaults and explanations.
        fields: pydantic's, by name.
        otherwise: Field -> what its row says instead of true or false.
    """
    for first, default, *_ in table_rows(text):
        told = [word.strip().strip("`") for word in default.split(",")]
        if len(told) != len(names_in(first)):
            continue
        for name, word in zip(names_in(first), told, strict=True):
            own = fields[name].default
            if isinstance(own, bool):
                assert word in (str(own).lower(), (otherwise or {}).get(name)), name
            elif isinstance(own, int | float) and re.fullmatch(r"[\d.e-]+", word):
                assert float(word) == own, name
            elif isinstance(own, str) and re.fullmatch(r"`\w+`", default.strip()):
                assert word == own, name
