"""The data sets of an installation whose nodes share no file system: descriptions in a catalogue, rows on demand.

A directory on a node is a copy where it has a mark, written before anything else. One without is of a time before the
storage was shared, and is never touched.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from aidocks.checkpoints.files import write_bytes
from aidocks.datasets.stored import DATASET_FILE
from aidocks.datasets.upload import data_file
from aidocks.errors import Conflict, CorruptCheckpoint
from aidocks.models.names import is_model_name
from aidocks.storage.files import Entry, SharedFiles

_MARK = "copy-of-shared-storage"


def publish_dataset(here: SharedFiles, directory: Path, name: str) -> bool:
    """Share a staged data set, its file first, then its description; return whether the name was free.

    The directory becomes this node's copy.

    Args:
        here: What is shared.
        directory: With the file and its description.
        name: That it gets.

    Raises:
        Conflict: A data set of that name, which is not shared, is in the way on this node.
        CorruptCheckpoint: The file is not what its description says.
        ServiceUnreachable: The storage does not answer.
    """
    target = here.home / "datasets" / name
    _require_copy(target)
    described = (directory / DATASET_FILE).read_bytes()
    entry, file = _described(described, name)
    here.put(directory / file, entry.sha256)
    (directory / _MARK).touch()
    # Whoever asks for it on this node meanwhile waits, and finds it.
    with here.hold(target):
        if not here.datasets.create(name, described):
            return False
        _drop_copy(target)
        os.rename(directory, target)
    return True


def delete_dataset(here: SharedFiles, name: str) -> None:
    """Remove a data set: out of sight of all nodes at once, then from this one."""
    here.datasets.remove(name)
    directory = here.home / "datasets" / name
    with here.hold(directory):
        _drop_copy(directory)


def _drop_copy(directory: Path) -> None:
    """Remove this node's copy of a data set, if that is one; its mark goes last."""
    if not (directory / _MARK).is_file():
        return
    for path in sorted(directory.iterdir(), key=lambda path: path.name == _MARK):
        path.unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def bring_dataset(here: SharedFiles, name: str) -> Path | None:
    """Bring a data set to this node, unless it is here; return its directory, or None where there is none.

    Raises:
        CorruptCheckpoint, InsufficientDisk, ServiceUnreachable: As :meth:`SharedFiles.fetch`.
    """
    if not is_model_name(name):
        return None
    directory = here.home / "datasets" / name
    with here.hold(directory):
        described = here.datasets.read(name, fresh=True)
        if described is None:
            return None
        entry, file = _described(described, name)
        if not (_reads(directory / DATASET_FILE) == described and _has(directory / file, entry)):
            _require_copy(directory)
            directory.mkdir(parents=True, exist_ok=True)
            (directory / _MARK).touch()
            # The description comes last: who finds it finds the file.
            (directory / DATASET_FILE).unlink(missing_ok=True)
            here.fetch(entry, directory / file)
            write_bytes(directory / DATASET_FILE, described)
    return directory


def _require_copy(directory: Path) -> None:
    if os.path.lexists(directory) and not (directory / _MARK).is_file() and any(directory.iterdir()):
        raise Conflict(
            f"{directory} has a data set that was made before the storage was shared.",
            value=directory.name,
            hint="Move it away and add it again: aidocks datasets add.",
        )


def _described(document: bytes, name: str) -> tuple[Entry, str]:
    try:
        facts = json.loads(document)
        return Entry(bytes=facts["bytes"], sha256=facts["sha256"]), data_file(facts["filename"])
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptCheckpoint(
            f"The description of the data set {name!r} cannot be read.", value=name
        ) from error


def _reads(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _has(path: Path, entry: Entry) -> bool:
    return os.path.isfile(path) and path.stat().st_size == entry.bytes
