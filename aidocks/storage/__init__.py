"""Storage by URL: what makes one installation of nodes that share no file system.

Where ``AIDOCKS_STORAGE_URL`` is set, the URL has the models, the data sets and what jobs have written, and the data
directory of each node is a cache of it, under the same path everywhere. Where it is not set, nothing here does
anything: the data directory is the truth, and all nodes see it. See docs/storage.md.

What is shared is asked for by a path, not handed around: units name directories, and the URL is a matter of the
process that they run in, as credentials are.
"""

from __future__ import annotations

import logging
import os
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aidocks.settings import Settings
    from aidocks.storage.files import SharedFiles

_opened: dict[tuple[str, Path], SharedFiles] = {}
_opening = threading.Lock()
_log = logging.getLogger(__name__)


def shared(path: Path) -> SharedFiles | None:
    """Return what shares a path with the other nodes; None where all see the same file system, or it is not ours.

    Args:
        path: Absolute.

    Raises:
        MissingExtra, InvalidSpec: The URL cannot be used here.
    """
    url = os.environ.get("AIDOCKS_STORAGE_URL")
    if not url:
        return None
    home = _home(os.environ.get("AIDOCKS_HOME"))
    return _open(url, home) if path.is_relative_to(home) else None


def open_shared(settings: Settings) -> SharedFiles | None:
    """Return what an installation shares; None where it has no URL. Raises as :func:`shared` does."""
    return _open(settings.storage_url, settings.home) if settings.storage_url else None


def _open(url: str, home: Path) -> SharedFiles:
    from aidocks.storage.files import SharedFiles
    from aidocks.storage.objects import open_store

    with _opening:
        if (url, home) not in _opened:
            _opened[url, home] = SharedFiles(home, open_store(url))
        return _opened[url, home]


@cache
def _home(_of: str | None) -> Path:
    """Return the data directory; asked often, and read from the environment once for each value there."""
    from aidocks.settings import Settings

    return Settings().home


def check(settings: Settings) -> str | None:
    """Return what is wrong with the storage of an installation, in words; None where nothing is, or none is set."""
    import uuid

    from aidocks.errors import AIDocksError

    key = f"checks/{uuid.uuid4().hex}"
    try:
        here = open_shared(settings)
        if here is None:
            return None
        here.store.write(key, b"aidocks")
        if here.store.read(key) != b"aidocks":
            return f"The shared storage {here.store.url} does not return what was written to it."
        if [row.key for row in here.store.list("checks") if row.key == key] != [key]:
            return f"The shared storage {here.store.url} does not list what was written to it."
        if here.store.create(key, b"another"):
            return f"The shared storage {here.store.url} writes over what is there where it must not."
        here.store.remove(key)
    except AIDocksError as error:
        return str(error)
    return None


def bring_back(workspace: Path) -> None:
    """Bring what units on other nodes have written into a job's workspace, but for large files of its result.

    Raises:
        CorruptCheckpoint, InsufficientDisk, ServiceUnreachable: It cannot be brought.
    """
    here = shared(workspace)
    if here is not None:
        from aidocks.storage.units import bring_workspace

        bring_workspace(here, workspace, ())


def forget(directory: Path) -> None:
    """Remove what is shared of a directory of a job: its workspace, or its checkpoints.

    A storage that does not answer keeps no job from its end: what is left there is said in the log.
    """
    from aidocks.errors import AIDocksError

    try:
        here = shared(directory)
        if here is not None:
            here.forget(directory)
    except AIDocksError as error:
        _log.warning("what is shared of %s stays: %s", directory, error)


def is_kept(path: Path, size: int, sha256: str) -> bool:
    """Tell whether a file that is not on this node is in the shared storage, with this content."""
    here = shared(path)
    if here is None:
        return False
    entry = here.entry(path)
    return entry is not None and (entry.bytes, entry.sha256) == (size, sha256) and here.has(sha256, size)


def bring_file(path: Path) -> None:
    """Bring one file of a job's, or all below a directory, where it was shared; one that is newer here is shared.

    So what is told on this node of a training on another one is in the story that goes on there.
    """
    here = shared(path)
    if here is None:
        return
    entry = here.entry(path)
    if path.is_file() and (entry is None or path.stat().st_mtime_ns > entry.changed_ns):
        here.keep([path])
    else:
        here.bring({path: entry} if entry is not None else here.entries(path))


def sizes_of(directory: Path) -> dict[str, int]:
    """Return name -> bytes of the files in a directory, of a model or of a job, on whatever node they are.

    Raises:
        CorruptCheckpoint, ServiceUnreachable: The storage cannot say.
    """
    here = shared(directory)
    found: dict[Path, int] = {}
    if here is not None and directory.parent == here.home / "models":
        from aidocks.storage.models import SharedModels

        found = SharedModels(here, directory.parent).sizes(directory.name)
    elif here is not None:
        found = {path: entry.bytes for path, entry in here.entries(directory).items()}
    for path in directory.glob("*"):
        with suppress(FileNotFoundError):
            found[path] = path.stat().st_size
    return {path.name: size for path, size in found.items() if path.parent == directory}


def identity_of(directory: Path) -> str:
    """Return what changes when a model's files do, and is the same on every node.

    Where nodes share no file system, inodes and times of change say nothing; names and sizes do, and of a model of the
    registry its manifest, which has the hash of every file.
    """
    from aidocks.checkpoints.files import state_of

    if not os.environ.get("AIDOCKS_STORAGE_URL"):
        return state_of(directory)
    import hashlib

    from aidocks.models.manifest import MANIFEST_FILE

    files = sorted(
        (entry.name, entry.stat().st_size) for entry in os.scandir(directory) if not entry.is_dir()
    )
    manifest = directory / MANIFEST_FILE
    known = hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else ""
    return hashlib.sha256(repr((files, known)).encode()).hexdigest()[:16]
