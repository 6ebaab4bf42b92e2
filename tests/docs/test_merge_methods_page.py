"""The table of merge methods in docs/merge.md is that of the methods there are; CONTRIBUTING's own method works."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

from aidocks.merge import method as methods
from aidocks.merge.in_memory import merge_tensors
from aidocks.merge.method import Method, Parameter, known_methods
from tests.support.documentation import ROOT, blocks_of

PAGE = (ROOT / "docs" / "merge.md").read_text()
BASES = {"required": "yes", "optional": "may", "none": "–"}


def ours() -> dict[str, Method]:
    """Return the methods of this package; an installed one may have declared others."""
    return {
        name: method
        for name, method in known_methods().items()
        if method.function.__module__.startswith("aidocks.")
    }


def rows() -> dict[str, list[str]]:
    section = re.search(r"^## Methods$(.*?)^## ", PAGE, re.MULTILINE | re.S)
    assert section is not None
    lines = re.findall(r"^\| (`.*) \|$", section[1], re.MULTILINE)
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    return {name.strip("`"): rest for name, *rest in cells}


def written(parameter: Parameter) -> str:
    if parameter.default is None:
        return f"`{parameter.name}`"
    if isinstance(parameter.default, bool):
        return f"`{parameter.name}` {'true' if parameter.default else 'false'}"
    return f"`{parameter.name}` {parameter.default:g}".replace("e-0", "e-")


def number_of_models(method: Method) -> str:
    least, most = method.models
    return str(least) if most == least else f"{least}+"


def test_every_method_has_its_row() -> None:
    expected = {
        name: [
            BASES[method.base],
            number_of_models(method),
            ", ".join(map(written, method.parameters)) or "none",
        ]
        for name, method in ours().items()
    }
    assert {name: cells[1:4] for name, cells in rows().items()} == expected


def test_papers_are_those_of_the_docstrings() -> None:
    for name, (_, _, _, _, source) in rows().items():
        text = inspect.getdoc(ours()[name].function) or ""
        for paper in re.findall(r"\d{4}\.\d{5}", source):
            assert paper in text, f"{name}: {paper}"


def test_the_methods_that_draw_random_numbers_are_named() -> None:
    line = re.search(r"^Drawn at random, .*: (`.*`)\.$", PAGE, re.MULTILINE)
    assert line is not None
    assert set(re.findall(r"`(\w+)`", line[1])) == {
        name for name, method in ours().items() if method.is_random
    }


def test_the_page_counts_them() -> None:
    assert len(ours()) == 20
    assert "the twenty methods" in PAGE


def test_the_method_in_contributing_works(monkeypatch: pytest.MonkeyPatch) -> None:
    (shown,) = (block for block in blocks_of(ROOT / "CONTRIBUTING.md") if "@merge_method" in block.text)
    known_methods()
    monkeypatch.setattr(methods, "_methods", dict(methods._methods))
    known_methods.cache_clear()
    try:
        exec(shown.text, {"__name__": "their_merges"})
        merged = merge_tensors("towards", [torch.zeros(3), torch.ones(3)], 0, {"share": 0.25})
        assert merged.tolist() == [0.25] * 3
    finally:
        known_methods.cache_clear()
