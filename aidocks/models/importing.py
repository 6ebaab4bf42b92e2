"""Gathering the files of a checkpoint, or of an adapter, for the registry."""

from __future__ import annotations

import os
import uuid
from collections import Counter
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path

from aidocks._version import __version__
from aidocks.checkpoints.files import copy_file, hash_file
from aidocks.checkpoints.hashes import combine_hashes
from aidocks.checkpoints.header import TensorEntry, read_header
from aidocks.checkpoints.layout import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CONFIG_FILE,
    is_adapter,
    metadata_files,
    module_files,
)
from aidocks.checkpoints.reader import Checkpoint
from aidocks.checkpoints.space import require_space
from aidocks.checkpoints.writer import INDEX_FILE, SINGLE_FILE
from aidocks.models.card import read_license
from aidocks.models.manifest import IMPORT, Manifest, ManifestFile, Parent


def gather(checkpoint: Checkpoint, staged: Path, *, copy: bool, code: bool = False) -> list[ManifestFile]:
    """Bring weights, index, configuration and what travels with them into ``staged``; ``code``, if that is asked for.

    Raises:
        InsufficientDisk: Before anything is copied.
    """
    sources = [checkpoint.path / CONFIG_FILE, *checkpoint.weight_files, *checkpoint.metadata_files()]
    if checkpoint.weight_files != (checkpoint.path / SINGLE_FILE,):
        sources.append(checkpoint.path / INDEX_FILE)
    sources += module_files(checkpoint.path)
    if code and checkpoint.config.get("auto_map"):
        sources += sorted(checkpoint.path.glob("*.py"))
    if copy:
        require_space(staged, sum(source.stat().st_size for source in sources))
    staged.mkdir(parents=True)
    return [_bring(source, checkpoint.path, staged, copy=copy) for source in sources]


def import_manifest(
    name: str,
    source: Path,
    staged: Path,
    *,
    copy: bool,
    parents: tuple[Parent, ...] = (),
    code: bool = False,
) -> Manifest:
    """Bring the files of a model, or of an adapter, into ``staged``, and return what is known of it.

    Python code of a model's own is left behind, unless ``code`` says that an admin allows it.

    Raises:
        UnknownModel, UnsafeCheckpoint, CorruptCheckpoint, IncompatibleModels: It is neither.
        InsufficientDisk: Before anything is copied.
    """
    source = source.absolute()
    if is_adapter(source):
        return _import_adapter(name, source, staged, copy=copy, parents=parents)
    checkpoint = Checkpoint(source)
    files = gather(checkpoint, staged, copy=copy, code=code)
    named = checkpoint.config.get("architectures")
    is_list = isinstance(named, Sequence) and not isinstance(named, str) and bool(named)
    return _manifest(
        name,
        source,
        files,
        parents or (describe_source(checkpoint, files),),
        entries=checkpoint.entries.values(),
        architecture=str(named[0]) if named and is_list else None,
    )


def _import_adapter(
    name: str, source: Path, staged: Path, *, copy: bool, parents: tuple[Parent, ...]
) -> Manifest:
    from aidocks.merge.adapter import read_adapter

    adapter = read_adapter(source)
    sources = [*adapter.files, *metadata_files(source), *module_files(source)]
    if copy:
        require_space(staged, sum(path.stat().st_size for path in sources))
    staged.mkdir(parents=True)
    files = [_bring(path, source, staged, copy=copy) for path in sources]
    hashes = {file.path: file.sha256 for file in files if file.path in (ADAPTER_CONFIG_FILE, ADAPTER_FILE)}
    parent = Parent(
        field="source",
        reference=source.name,
        content_hash=combine_hashes(hashes),
        path_name=source.name,
        license=read_license(source),
    )
    entries, _ = read_header(source / ADAPTER_FILE)
    made_for = (
        f" for {adapter.base_model}" if adapter.base_model and "/" in adapter.base_model.strip("/") else ""
    )
    return _manifest(
        name, source, files, parents or (parent,), entries=entries.values(), architecture=f"LoRA{made_for}"
    )


def _manifest(
    name: str,
    source: Path,
    files: list[ManifestFile],
    parents: tuple[Parent, ...],
    *,
    entries: Collection[TensorEntry],
    architecture: str | None,
) -> Manifest:
    dtypes: Counter[str] = Counter()
    for entry in entries:
        dtypes[entry.dtype] += entry.nbytes
    return Manifest(
        name=name,
        created_at=datetime.now(UTC),
        operation=IMPORT,
        job_id=f"import-{uuid.uuid4().hex}",
        spec={"source": source.name},
        parents=parents,
        code_version=__version__,
        files=tuple(files),
        parameters=sum(entry.numel for entry in entries),
        dtype=next((dtype for dtype, _ in dtypes.most_common(1)), None),
        architecture=architecture,
    )


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


def _bring(path: Path, origin: Path, staged: Path, *, copy: bool) -> ManifestFile:
    """Bring a file to the place in ``staged`` that it has in ``origin``, links followed."""
    relative = path.relative_to(origin)
    source, target = path.resolve(), staged / relative
    target.parent.mkdir(exist_ok=True)
    if not copy:
        try:
            os.link(source, target)
            return ManifestFile(
                path=relative.as_posix(), bytes=target.stat().st_size, sha256=hash_file(target)
            )
        except OSError:
            pass  # another file system, or one without links
    output = copy_file(source, target)
    return ManifestFile(path=relative.as_posix(), bytes=output.bytes, sha256=output.sha256)
