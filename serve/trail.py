"""What the record of deeds is told by this process: requests leave a note and do not wait for it to be written."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from aidocks.access.audit import AuditLog
from aidocks.access.entry import AuditEntry
from aidocks.access.redaction import without_secrets
from aidocks.access.store import KeyStore
from aidocks.jobs.terms import LOCAL
from serve.access import KEY, READING
from serve.problems import REQUEST_ID
from serve.rates import Rates

WRITE_S = 1.0
SWEEP_S = 3600.0
#: Notes that wait while the job store does not answer; beyond it the oldest are lost, and the log says so.
MOST_WAITING = 10_000
#: Refused keys that are recorded; whoever sends a thousand a minute fills no disk.
REFUSED_PER_MINUTE = 20
_MOST_WRITTEN_AT_ONCE = 500
_LONGEST_OBJECT = 200
#: Change nothing that lasts: they compute; and of an upload its beginning and its end are recorded, not each part.
_PASSING = frozenset({"/embed", "/rerank", "/v1/embeddings", "/v1/rerank"})

log = logging.getLogger("serve.trail")


class Trail:
    """Notes who did what, and writes it into the job store from time to time.

    Args:
        audit: Where it is written.
        keys: Whose times of use are written at the same time.
        asks_for_keys: Requests need a key.
    """

    def __init__(self, audit: AuditLog, keys: KeyStore, asks_for_keys: bool) -> None:
        self._audit = audit
        self._keys = keys
        self._asks_for_keys = asks_for_keys
        self._waiting: deque[AuditEntry] = deque()
        self._lost = 0
        self._writing = threading.Lock()
        self._refused = Rates(most=1)

    def note(self, scope: Mapping[str, Any], path: str, status: int, location: str | None) -> None:
        """Note an answered request, if it was to change something or had no right key.

        Args:
            scope: ASGI scope of the request, as the application left it.
            path: Of the request, without that below which the service is mounted.
            status: Of the answer.
            location: Of what was made, as the answer said.
        """
        method, holder = scope["method"], scope.get(KEY)
        if holder is None and (self._asks_for_keys or status == 421):
            # Whoever has no right key writes nothing else here, and not much of that.
            if status == 401 and not self._refused.take("", REFUSED_PER_MINUTE):
                self._append(scope, "-", f"{method} without a right key", None, status)
            return
        part = method == "PUT" and path.startswith("/uploads/")
        if method in READING or method == "OPTIONS" or path in _PASSING or part or status == 429:
            return
        named = scope.get("path_params") or {}
        made = location.rpartition("/")[2] if location else None
        done_to = ", ".join([*map(str, named.values()), *([made] if made else [])])
        owner = LOCAL if holder is None else holder.owner
        self._append(scope, owner, f"{method} {_template(scope, path)}", done_to or None, status)

    def _append(
        self, scope: Mapping[str, Any], owner: str, action: str, done_to: str | None, status: int
    ) -> None:
        if len(self._waiting) >= MOST_WAITING:
            self._waiting.popleft()
            self._lost += 1
        client = scope.get("client")
        entry = AuditEntry(
            time=datetime.now(UTC),
            owner=owner,
            action=_plain(action)[:128],
            object=None if done_to is None else _plain(done_to)[:_LONGEST_OBJECT],
            status=status,
            address=str(client[0])[:64] if client else None,
            request_id=scope[REQUEST_ID],
        )
        self._waiting.append(entry)

    def write(self) -> None:
        """Write what was noted so far. What could not be written waits for the next time."""
        with self._writing:
            while self._waiting:
                taken = [
                    self._waiting.popleft() for _ in range(min(len(self._waiting), _MOST_WRITTEN_AT_ONCE))
                ]
                try:
                    self._audit.add(taken)
                except BaseException:
                    self._waiting.extendleft(reversed(taken))
                    raise
            if self._lost:
                log.error("%d entries of the audit log were lost", self._lost)
                self._lost = 0
            self._keys.save_uses()

    async def keep(self) -> None:
        """Write from time to time, and remove what is old, until cancelled; then write what is left."""
        swept = -SWEEP_S
        clock = asyncio.get_running_loop().time
        try:
            while True:
                await self._safely(self.write)
                if clock() - swept >= SWEEP_S:
                    swept = clock()
                    await self._safely(self._audit.sweep)
                await asyncio.sleep(WRITE_S)
        finally:
            # Not in a thread: a process that ends starts none any more.
            try:
                self.write()
            except Exception:
                log.exception("the audit log could not be written")

    async def _safely(self, work: Callable[[], object]) -> None:
        try:
            await asyncio.to_thread(work)
        except Exception:
            log.exception("the audit log could not be written")


def _template(scope: Mapping[str, Any], path: str) -> str:
    """Return the path of the route that answered; the request's own where it came to none."""
    route = getattr(scope.get("route"), "path", None)
    if route is None:
        return path
    # The routes below it do not know it.
    prefix = "/v1" if path.startswith("/v1/") and not route.startswith("/v1/") else ""
    return f"{prefix}{route}"


def _plain(text: str) -> str:
    """Return what every database takes as text, and everybody may read."""
    return without_secrets(text.encode("utf-8", "replace").decode().replace("\0", "?"))
