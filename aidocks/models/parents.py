"""Describing the models that a new one is made of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from aidocks.models.card import read_license
from aidocks.models.manifest import Parent

if TYPE_CHECKING:
    from aidocks.checkpoints.reader import Checkpoint


def describe_parent(
    field: str, reference: str, checkpoint: Checkpoint, cache_dir: Path | None = None
) -> Parent:
    """Describe one parent for a manifest: which field named it, the hash of its content, its licence.

    Args:
        field: Path of the spec's field.
        reference: As it was given.
        checkpoint: The parent, opened.
        cache_dir: Where hashes of large files are kept; see :meth:`Checkpoint.content_hash`.
    """
    return Parent(
        field=field,
        reference=reference,
        content_hash=checkpoint.content_hash(cache_dir),
        path_name=checkpoint.path.name,
        license=read_license(checkpoint.path),
    )
