"""Specs are what all doors read: they lean on nothing but one another, and the data that a training resolves to."""

from __future__ import annotations

import ast
from pathlib import Path

import aidocks.specs
import aidocks.training.methods
import aidocks.training.retriever
import aidocks.training.run

RESOLVED = (aidocks.training.run, aidocks.training.methods, aidocks.training.retriever)
KNOWN = ("aidocks.specs", "aidocks.errors", *(module.__name__ for module in RESOLVED))


def test_specs_import_no_operation() -> None:
    specs = Path(str(aidocks.specs.__file__)).parent.glob("*.py")
    for path in (*specs, *(Path(str(module.__file__)) for module in RESOLVED)):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            strange = [name for name in names if name.startswith("aidocks") and not name.startswith(KNOWN)]
            assert not strange, f"{path.name} imports {strange[0]}"
