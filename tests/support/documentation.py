"""The fenced blocks of the project's pages."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

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
