"""Importing AIDocks stays light, whatever is installed beside it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import aidocks

HEAVY = (
    "torch",
    "transformers",
    "ray",
    "sqlalchemy",
    "numpy",
    "safetensors",
    "matplotlib",
    "huggingface_hub",
    "fastapi",
)


def loaded(code: str, names: tuple[str, ...]) -> list[str]:
    script = f"{code}\nimport json, sys\nprint(json.dumps([n for n in {names!r} if n in sys.modules]))"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    result: list[str] = json.loads(ended.stdout)
    return result


def test_the_package_imports_nothing() -> None:
    assert loaded("import aidocks; aidocks.__version__", (*HEAVY, "httpx", "pydantic", "rich", "typer")) == []


def test_the_client_and_its_results_need_no_torch() -> None:
    code = (
        "from aidocks import AsyncClient, Client\n"
        "from aidocks.operations import OPERATIONS\n"
        "for registration in OPERATIONS: registration.load().result_type"
    )
    assert loaded(code, HEAVY) == []


@pytest.mark.parametrize("name", aidocks.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(aidocks, name) is not None
    assert name in dir(aidocks)


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="Cliemt"):
        _ = aidocks.Cliemt
