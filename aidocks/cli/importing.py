"""What `aidocks models import` accepts: the directory of a checkpoint or of an adapter, or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from aidocks.errors import MissingExtra, NotFound

if TYPE_CHECKING:
    from aidocks.models.registry import ModelInfo, Registry


def import_into(registry: Registry, name: str, source: Path, *, code: bool = False) -> ModelInfo:
    """Bring the model at ``source`` into the registry; Python code of its own only where ``code`` allows it.

    Raises:
        NotFound: There is nothing at ``source``.
        NameTaken: The registry has a model of this name.
        MissingExtra: This installation cannot read it.
    """
    source = source.expanduser()
    if not source.exists():
        raise NotFound(
            f"There is nothing at {str(source)!r}.",
            hint="Give a directory in Hugging Face layout, or a .gguf file.",
        )
    if source.suffix.lower() != ".gguf":
        return registry.import_checkpoint(name, source, code=code)
    from aidocks.models.gguf_import import import_gguf

    try:
        return import_gguf(source, registry, name)
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"Reading GGUF files needs {error.name}, which is not installed.",
            hint="Install what runs models: pip install 'aidocks[local]'.",
        ) from error
