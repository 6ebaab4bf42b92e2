"""docs/errors.md lists every error there is, with the numbers that it has."""

from __future__ import annotations

import re
from pathlib import Path

from aidocks import errors

PAGE = Path(__file__).resolve().parents[2] / "docs" / "errors.md"


def error_classes() -> list[type[errors.AIDocksError]]:
    found = [errors.AIDocksError]
    for kind in found:
        found.extend(kind.__subclasses__())
    return [kind for kind in found if kind.__module__ == errors.__name__]


def test_every_code_is_listed() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (\d+) \| (\d+) \| (\S.*) \| (\S.*) \|$", PAGE.read_text(), re.MULTILINE
    )
    listed = {code: (int(status), int(exit_code)) for code, status, exit_code, _, _ in rows}
    assert len(rows) == len(listed)
    assert listed == {kind.code: (kind.http_status, kind.exit_code) for kind in error_classes()}


def test_every_exit_code_is_listed() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d+) \| \S", PAGE.read_text(), re.MULTILINE)}
    assert listed == {kind.exit_code for kind in error_classes()} | {0, 2, 130}
