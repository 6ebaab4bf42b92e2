"""Removing what nobody names any more: contents in the storage, and what jobs have left on a node."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from aidocks.errors import AIDocksError, CorruptCheckpoint
from aidocks.storage.files import UNNAMED_S, SharedFiles

#: How often, at most, one process looks through the storage, and through this node.
CONTENTS_EVERY_S = 6 * 3600.0
NODE_EVERY_S = 600.0
#: A workspace of a job that has nothing in the storage is somebody's for so long.
_STALE_S = 3600.0

_log = logging.getLogger(__name__)
_last: dict[str, float] = {}
_looking = threading.Lock()


def sweep_contents(here: SharedFiles, *, older_than_s: float = UNNAMED_S) -> int:
    """Remove contents that nothing names and that are old; return how many.

    Whoever names a content has made sure that it is there, and not half as old as this, shortly before; so what is
    old and unnamed when all names are read after the contents is not about to be named.

    Args:
        here: What is shared.
        older_than_s: Younger contents stay; a file may be uploaded for long before it is named.

    Raises:
        ServiceUnreachable: The storage does not answer.
        CorruptCheckpoint: Something that may name contents cannot be read: nothing is removed.
    """
    until = time.time() - older_than_s
    here.store.remove_unfinished(older_than_s)
    old = [row.key for row in here.store.list("objects") if row.changed_s < until]
    if not old:
        return 0
    named = set(_named(here))
    unnamed = [key for key in old if key.rpartition("/")[2] not in named]

    def remove(key: str) -> None:
        # Whoever has named it meanwhile has made it young before.
        found = here.store.look(key)
        if found is not None and found.changed_s < until:
            here.store.remove(key)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(remove, unnamed))
    if unnamed:
        _log.info("removed %d contents of the shared storage that nothing names", len(unnamed))
    return len(unnamed)


def sweep_node(here: SharedFiles) -> int:
    """Remove this node's copies of what jobs that have ended wrote, and what was left of removals; return how many.

    Such a job has nothing in the storage any more, nobody on this node holds its workspace, and nothing was written
    there for long.
    """
    removed = 0
    for kind in ("workspaces", "checkpoints"):
        for directory in sorted((here.home / kind).glob("job-*")):
            with here.hold(here.home / "workspaces" / directory.name, wait=False) as free:
                if free and _is_stale(directory) and not here.is_shared(directory):
                    shutil.rmtree(directory, ignore_errors=True)
                    removed += 1
    for left in (here.home / "models" / ".trash").glob("*"):
        shutil.rmtree(left, ignore_errors=True)
    here.remove_locks(UNNAMED_S)
    return removed


def sweep_now_and_then(here: SharedFiles, *, contents: bool = False) -> None:
    """Do that, if it is time for it. Where it fails, the log says so: nobody waits for it.

    Args:
        here: What is shared.
        contents: Whether contents in the storage are looked through, too.
    """
    try:
        if _is_due("node", NODE_EVERY_S):
            sweep_node(here)
        if contents and _is_due("contents", CONTENTS_EVERY_S):
            sweep_contents(here)
    except (AIDocksError, OSError) as error:
        _log.warning("nothing was swept: %s", error)


def _is_due(what: str, every_s: float) -> bool:
    """Tell whether it is time for something that this process does now and then; whoever is told does it."""
    with _looking:
        now = time.monotonic()
        if what in _last and now - _last[what] < every_s:
            return False
        _last[what] = now
        return True


def _named(here: SharedFiles) -> Iterator[str]:
    """Yield the hashes of all contents that anything names.

    Names of jobs first: what goes from there goes to a model that is there before.
    """
    for kind in ("files", "trees", "datasets", "models"):
        keys = [row.key for row in here.store.list(kind)]
        with ThreadPoolExecutor(8) as pool:
            for key, content in zip(keys, pool.map(here.store.read, keys), strict=True):
                if content is None:
                    continue
                try:
                    yield from _hashes(json.loads(content))
                except ValueError as error:
                    raise CorruptCheckpoint(
                        f"{key} of the shared storage cannot be read.", value=key
                    ) from error


def _hashes(document: Any) -> Iterator[str]:
    """Yield whatever could be a content's hash; of a request in a manifest, rather too much than too little."""
    if isinstance(document, str) and len(document) == 64:
        yield document
    elif isinstance(document, dict):
        for value in document.values():
            yield from _hashes(value)
    elif isinstance(document, list):
        for value in document:
            yield from _hashes(value)


def _is_stale(workspace: Path) -> bool:
    latest = max((path.lstat().st_mtime for path in (workspace, *workspace.rglob("*"))), default=0.0)
    return time.time() - latest > _STALE_S
