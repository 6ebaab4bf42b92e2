"""Names that all nodes see, with a small document each: the manifests of models, the descriptions of data sets."""

from __future__ import annotations

import threading
import time

from aidocks.models.names import is_model_name
from aidocks.storage.objects import ObjectStore

#: For so long another node's change may go unseen, where that does no harm.
FRESH_S = 2.0
_ENDING = ".json"


class Catalogue:
    """Names of one kind, and their documents. Safe for threads.

    Args:
        store: Where they are.
        kind: Their folder there.
    """

    def __init__(self, store: ObjectStore, kind: str) -> None:
        self._store = store
        self._kind = kind
        self._lock = threading.Lock()
        self._names: tuple[float, list[str]] | None = None
        self._documents: dict[str, tuple[float, str, bytes]] = {}

    def names(self) -> list[str]:
        """Return all names, sorted; as they were a moment ago."""
        with self._lock:
            now = time.monotonic()
            if self._names is None or now - self._names[0] > FRESH_S:
                found = (row.key.removeprefix(f"{self._kind}/") for row in self._store.list(self._kind))
                names = [name.removesuffix(_ENDING) for name in found if name.endswith(_ENDING)]
                self._names = now, sorted(name for name in names if is_model_name(name))
            return list(self._names[1])

    def read(self, name: str, *, fresh: bool = False) -> bytes | None:
        """Return the document of a name; None where there is none.

        Args:
            name: Checked by the caller.
            fresh: As it is now, not as it was a moment ago.
        """
        known = self._documents.get(name)
        now = time.monotonic()
        if known is not None and now - known[0] <= FRESH_S and not fresh:
            return known[2]
        listed = self._store.look(self._key(name))
        if listed is None:
            self._documents.pop(name, None)
            return None
        if known is not None and known[1] == listed.version:
            content: bytes | None = known[2]
        else:
            content = self._store.read(self._key(name))
        if content is None:
            self._documents.pop(name, None)
        else:
            self._documents[name] = now, listed.version, content
        return content

    def create(self, name: str, document: bytes) -> bool:
        """Give a name its document, unless it has one; return whether it was given (see ``ObjectStore.create``)."""
        made = self._store.create(self._key(name), document)
        self._forget(name)
        return made

    def remove(self, name: str) -> None:
        """Take a name away."""
        self._store.remove(self._key(name))
        self._forget(name)

    def _forget(self, name: str) -> None:
        with self._lock:
            self._names = None
        self._documents.pop(name, None)

    def _key(self, name: str) -> str:
        return f"{self._kind}/{name}{_ENDING}"
