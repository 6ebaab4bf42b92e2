"""From the name in a request to the model that answers it; remembered as long as its directory is the same."""

from __future__ import annotations

import asyncio
import os
import time
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from aidocks.models.resolve import ModelResolver
from aidocks.retrieval.answers import open_trained
from aidocks.training.retriever import Retriever, RetrieverKind

#: Seconds after which all files are looked at again, not just the directories that hold them.
TRUSTED_S = 5.0
_MOST = 256


@dataclass(frozen=True)
class _Known:
    retriever: Retriever
    state: tuple[tuple[int, int], ...]
    at: float


class Lookup:
    """Finds models that find texts.

    Args:
        resolver: Of the installation.
        remote_code: Models that an admin allows to bring code of their own.
    """

    def __init__(self, resolver: ModelResolver, remote_code: Collection[str] = ()) -> None:
        self._resolver = resolver
        self._remote_code = frozenset(remote_code)
        self._known: OrderedDict[tuple[str, RetrieverKind], _Known] = OrderedDict()
        self._looking: dict[tuple[str, RetrieverKind], asyncio.Task[Retriever]] = {}

    async def find(self, reference: str, kind: RetrieverKind) -> Retriever:
        """Return the model that a reference means.

        Raises:
            UnknownModel: There is none.
            IncompatibleModels: It is of the other kind, or not trained to be of this one.
            AIDocksError: As :func:`~aidocks.retrieval.answers.open_trained`.
        """
        known = self._known.get((reference, kind))
        if known and time.monotonic() - known.at < TRUSTED_S and _state(known.retriever) == known.state:
            return known.retriever
        # Requests come together, and a look at all files is one for all of them.
        looking = self._looking.get((reference, kind))
        if looking is None:
            looking = asyncio.create_task(self._look(reference, kind))
            # What it failed of is nobody's news where all who asked have gone away.
            looking.add_done_callback(lambda task: task.cancelled() or task.exception())
            self._looking[reference, kind] = looking
        # One who goes away takes nothing from the others.
        return await asyncio.shield(looking)

    async def _look(self, reference: str, kind: RetrieverKind) -> Retriever:
        try:
            retriever = await asyncio.to_thread(
                open_trained, reference, kind, self._resolver, self._remote_code
            )
        finally:
            del self._looking[reference, kind]
        state = _state(retriever)
        if state is not None:
            self._known[reference, kind] = _Known(retriever, state, time.monotonic())
            self._known.move_to_end((reference, kind))
            while len(self._known) > _MOST:
                self._known.popitem(last=False)
        return retriever


def _state(retriever: Retriever) -> tuple[tuple[int, int], ...] | None:
    """Return what changes when a model is made anew: a registry model is renamed into place."""
    try:
        stats = [os.stat(place) for place in _places(retriever)]
    except OSError:
        return None
    return tuple((stat.st_ino, stat.st_mtime_ns) for stat in stats)


def _places(retriever: Retriever) -> list[Path]:
    return [retriever.model, *([retriever.adapter] if retriever.adapter else [])]
