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
        self._listed: tuple[float, dict[str, str]] | None = None
        self._documents: dict[str, tuple[float, str, bytes]] = {}

    def names(self) -> list[str]:
        """Return all names, sorted; as they were a moment ago."""
        return sorted(name for name in self._versions() if is_model_name(name))

    def read(self, name: str, *, fresh: bool = False) -> bytes | None:
        """Return the document of a name; None where there is none.

        Args:
            name: Checked by the caller.
            fresh: As it is now, not as it was a moment ago.
        """
        seen = None if fresh else self._seen(name)
        if seen is None:
            at = time.monotonic()
            listed = self._store.look(self._key(name))
            if listed is None:
                self._documents.pop(name, None)
                return None
            seen = at, listed.version
        at, version = seen
        known = self._documents.get(name)
        if known is not None and known[1] == version:
            content: bytes | None = known[2]
        else:
            content = self._store.read(self._key(name))
        if content is None:
            self._documents.pop(name, None)
        else:
            self._documents[name] = at, version, content
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

    def _versions(self) -> dict[str, str]:
        """Return name -> version of its document, as they were a moment ago: one request for all of them."""
        with self._lock:
            now = time.monotonic()
            if self._listed is None or now - self._listed[0] > FRESH_S:
                rows = self._store.list(self._kind)
                found = {row.key.removeprefix(f"{self._kind}/"): row.version for row in rows}
                names = {
                    key.removesuffix(_ENDING): version
                    for key, version in found.items()
                    if key.endswith(_ENDING)
                }
                self._listed = now, names
            return self._listed[1]

    def _seen(self, name: str) -> tuple[float, str] | None:
        """Return when, a moment ago, a document was last seen, and its version; None where it was not."""
        known, listed = self._documents.get(name), self._listed
        seen = [known[:2]] if known is not None else []
        if listed is not None and name in listed[1]:
            seen.append((listed[0], listed[1][name]))
        latest = max(seen, default=None)
        return latest if latest is not None and time.monotonic() - latest[0] <= FRESH_S else None

    def _forget(self, name: str) -> None:
        with self._lock:
            self._listed = None
        self._documents.pop(name, None)

    def _key(self, name: str) -> str:
        return f"{self._kind}/{name}{_ENDING}"
