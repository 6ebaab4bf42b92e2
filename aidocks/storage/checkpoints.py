"""Checkpoints of a training that runs on one of several nodes without a common file system.

They are written on the node of the training, each under its name as soon as it is whole. From there they are shared
one after another while the training goes on, so that it can go on elsewhere when that node is lost.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aidocks.errors import AIDocksError
from aidocks.storage import shared
from aidocks.storage.files import SharedFiles
from aidocks.training.checkpoints import complete_checkpoints, step_of

#: How often it is looked for new ones, and for what the training tells.
LOOK_S = 2.0
#: Stands beside the checkpoints as soon as a training has begun.
_BEGUN = "begun"

_log = logging.getLogger(__name__)


def bring_checkpoints(directory: Path) -> None:
    """Bring the newest checkpoint of a job, and what it is of, to this node. Where nothing is shared, do nothing.

    Args:
        directory: Of the job's checkpoints.

    Raises:
        CorruptCheckpoint, InsufficientDisk, ServiceUnreachable: They cannot be brought.
    """
    here = shared(directory)
    if here is None:
        return
    here.bring(here.entries(directory))
    kept = sorted(here.trees(directory), key=step_of)
    present = complete_checkpoints(directory)
    if kept and (not present or step_of(present[-1]) < step_of(kept[-1])):
        here.bring_tree(kept[-1])


def has_begun(here: SharedFiles, directory: Path) -> bool:
    """Tell whether the training of a job's checkpoints has begun before, on whatever node."""
    return here.entry(directory / _BEGUN) is not None


@contextmanager
def sharing_checkpoints(here: SharedFiles, directory: Path, story: Path | None) -> Iterator[None]:
    """Share a job's checkpoints, and the story of its training, while the block runs, and once more in the end.

    A storage that does not answer for a while stops no training: it is tried again, in the end for good.

    Args:
        here: What is shared.
        directory: Of the job's checkpoints, on this node.
        story: File in which the training tells how it goes.

    Raises:
        ServiceUnreachable: The last ones could not be shared.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _BEGUN).touch()
    here.keep([directory / _BEGUN])
    over = threading.Event()

    def work() -> None:
        while not over.wait(LOOK_S):
            try:
                _share(here, directory, story)
            except (AIDocksError, OSError) as error:  # also: the training has just removed an old one
                _log.warning("checkpoints are shared later: %s", error)

    thread = threading.Thread(target=work, name="aidocks-checkpoints", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        _share(here, directory, story)


def _share(here: SharedFiles, directory: Path, story: Path | None) -> None:
    if story is not None and story.exists():
        here.keep([story])
    present = complete_checkpoints(directory)
    kept = here.trees(directory)
    for checkpoint in present:
        if checkpoint not in kept:
            here.keep_tree(checkpoint)
    # Only after a newer one is shared: at every moment there is one to go on from.
    newest = present[-1] if present else None
    for checkpoint in kept:
        if newest is not None and checkpoint not in present and step_of(checkpoint) < step_of(newest):
            here.forget_tree(checkpoint)
