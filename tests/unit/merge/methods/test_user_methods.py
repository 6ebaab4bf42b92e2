"""A method of one's own, in ten lines: declared by the decorator, found in a package by its entry point."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from aidocks.errors import InvalidSpec
from aidocks.merge import method as methods
from aidocks.merge.in_memory import merge_tensors

MIDPOINT = '''
"""Between base and model, by value."""
from aidocks.merge.method import Parameter, merge_method


@merge_method(
    "towards", Parameter("share", float, 0.5, scope="model", at_least=0, at_most=1), base="required", models=(1, 1)
)
def towards(inputs, share):
    """A share of the way from the base to the model."""
    return inputs.map(lambda block: block.base.lerp(block.models[0], share[0]))
'''


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Methods that a test declares are forgotten after it."""
    methods.known_methods()
    monkeypatch.setattr(methods, "_methods", dict(methods._methods))
    methods.known_methods.cache_clear()
    yield
    methods.known_methods.cache_clear()


@pytest.mark.usefixtures("registry")
def test_a_decorated_function_is_a_method() -> None:
    exec(MIDPOINT, {"__name__": "somewhere"})
    assert merge_tensors("towards", [torch.zeros(3), torch.ones(3)], 0).tolist() == [0.5] * 3
    assert merge_tensors("towards", [torch.zeros(3), torch.ones(3)], 0, {"share": 1}).tolist() == [1] * 3
    assert methods.find_method("towards").summary == "A share of the way from the base to the model."
    with pytest.raises(InvalidSpec, match="a number from 0 to 1"):
        merge_tensors("towards", [torch.zeros(3), torch.ones(3)], 0, {"share": 2})


@pytest.mark.usefixtures("registry")
def test_an_installed_package_declares_its_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_merges.py").write_text(MIDPOINT)
    information = tmp_path / "their_merges-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: their-merges\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[aidocks.merge_methods]\ntowards = their_merges\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "their_merges", raising=False)
    assert methods.find_method("towards").base == "required"
    assert "slerp" in methods.known_methods()


def test_an_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(InvalidSpec, match=r"Did you mean 'slerp'.*task_arithmetic, ties") as error:
        methods.find_method("slrp")
    assert error.value.field == "merge_method"
