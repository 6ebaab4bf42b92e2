"""Gathering the files of a checkpoint for the registry."""

from __future__ import annotations

import os
from pathlib import Path

from aidocks.checkpoints.files import copy_file, hash_file
from aidocks.checkpoints.hashes import combine_hashes
from aidocks.checkpoints.layout import CONFIG_FILE
from aidocks.checkpoints.reader import Checkpoint
from aidocks.checkpoints.space import require_space
from aidocks.checkpoints.writer import INDEX_FILE, SINGLE_FILE
from aidocks.models.card import read_license
from aidocks.models.manifest import ManifestFile, Parent


def gather(checkpoint: Checkpoint, staged: Path, *, copy: bool) -> list[ManifestFile]:
    """Bring weights, index, configuration and what travels with them into ``staged``.

    Raises:
        InsufficientDisk: Before anything is copied.
    """
    sources = [checkpoint.path / CONFIG_FILE, *checkpoint.weight_files, *checkpoint.metadata_files()]
    if checkpoint.weight_files != (checkpoint.path / SINGLE_FILE,):
        sources.append(checkpoint.path / INDEX_FILE)
    if copy:
        require_space(staged, sum(source.stat().st_size for source in sources))
    staged.mkdir(parents=True)
    return [_bring(source.resolve(), staged / source.name, copy=copy) for source in sources]


def describe_source(checkpoint: Checkpoint, files: list[ManifestFile]) -> Parent:
    """Describe the directory that was imported; only its name, since manifests are shown to clients."""
    hashed = {CONFIG_FILE, *(path.name for path in checkpoint.weight_files)}
    return Parent(
        field="source",
        reference=checkpoint.path.name,
        content_hash=combine_hashes({file.path: file.sha256 for file in files if file.path in hashed}),
        path_name=checkpoint.path.name,
        license=read_license(checkpoint.path),
    )


def _bring(source: Path, target: Path, *, copy: bool) -> ManifestFile:
    if not copy:
        try:
            os.link(source, target)
            return ManifestFile(path=target.name, bytes=target.stat().st_size, sha256=hash_file(target))
        except OSError:
            pass  # another file system, or one without links
    output = copy_file(source, target)
    return ManifestFile(path=target.name, bytes=output.bytes, sha256=output.sha256)
