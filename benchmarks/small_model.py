"""The real model that benchmarks use: SmolLM2-135M-Instruct, imported once into a temporary registry."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aidocks.models.gguf_import import import_gguf, locate_smollm2
from aidocks.models.registry import Registry


@contextmanager
def smollm2() -> Iterator[tuple[Path, Path]]:
    """Yield a scratch directory and the checkpoint's directory in it; both vanish afterwards."""
    with tempfile.TemporaryDirectory(prefix="aidocks-bench-") as scratch:
        registry = Registry(Path(scratch) / "models")
        yield Path(scratch), import_gguf(locate_smollm2(), registry, "smollm2-135m-instruct").path
