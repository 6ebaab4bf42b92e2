"""API keys in the job store: made, listed, revoked, and checked at every request."""

from __future__ import annotations

import builtins
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Row, insert, select, update

from aidocks.access.keys import ApiKey, KeyRequest, Limits, key_text, new_key, parse_key
from aidocks.errors import NotFound, Unauthenticated
from aidocks.jobs.database import Database, keys

#: A revoked key is refused everywhere after so many seconds; within them, a poll costs no look at the database.
CACHE_S = 3.0
#: Between two writings of when a key was last used.
USE_S = 60.0
_MOST_CACHED = 10_000
_SALT_BYTES = 16
_COLUMNS = tuple(keys.c[name] for name in ApiKey.model_fields)


class KeyStore:
    """The API keys of one installation.

    Args:
        database: Of the job store.
        cache_s: Seconds for which a key that was found good is not looked up again.
        clock: Returns the seconds since the epoch.
    """

    def __init__(
        self, database: Database, *, cache_s: float = CACHE_S, clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._cache_s = cache_s
        self._clock = clock
        self._good: dict[bytes, tuple[ApiKey, float]] = {}
        #: When keys were used since it was last written down, and when that was.
        self._used: dict[str, float] = {}
        self._written: dict[str, float] = {}

    def create(self, asked: KeyRequest) -> tuple[ApiKey, str]:
        """Make a key.

        Returns:
            What is known of it, and the key itself, which is told this once and stored nowhere.
        """
        key_id, secret = new_key()
        now = self._clock()
        made = ApiKey(
            id=key_id,
            name=asked.name,
            scopes=asked.scopes,
            limits=Limits(requests_per_minute=asked.requests_per_minute, max_jobs=asked.max_jobs),
            created_at=_moment(now),
            expires_at=None if asked.expires_in_s is None else _moment(now + asked.expires_in_s),
        )
        salt = secrets.token_hex(_SALT_BYTES)
        row = {
            "id": key_id,
            "name": made.name,
            "salt": salt,
            "hash": _hash(salt, secret),
            "scopes": [scope.value for scope in made.scopes],
            "limits": made.limits.model_dump(exclude_none=True),
            "created_at": now,
            "expires_at": None if asked.expires_in_s is None else now + asked.expires_in_s,
        }
        with self._database.durable() as connection:
            connection.execute(insert(keys).values(row))
        return made, key_text(key_id, secret)

    def list(self) -> builtins.list[ApiKey]:
        """Return all keys, the newest first; also those that are revoked or have expired."""
        with self._database.read() as connection:
            found = connection.execute(select(*_COLUMNS).order_by(keys.c.created_at.desc(), keys.c.id)).all()
        return [_read(row) for row in found]

    def revoke(self, key_id: str) -> None:
        """Let a key be refused from now on: here at once, in other processes after :data:`CACHE_S`.

        Raises:
            NotFound: There is none of this id.
        """
        with self._database.durable() as connection:
            mine = keys.c.id == key_id
            if connection.scalar(select(keys.c.id).where(mine)) is None:
                raise NotFound(f"There is no API key {key_id[:64]!r}.", field="key_id", value=key_id[:64])
            change = update(keys).where(mine, keys.c.revoked_at.is_(None)).values(revoked_at=self._clock())
            connection.execute(change)
        self._good = {digest: known for digest, known in self._good.items() if known[0].id != key_id}

    def check(self, text: str) -> ApiKey:
        """Return the key that somebody sent.

        Raises:
            Unauthenticated: It is no key, unknown, wrong, expired or revoked; which of these is not said.
        """
        key = self.cached(text)
        if key is not None:
            return key
        parsed = parse_key(text)
        row = None
        if parsed is not None:
            with self._database.read() as connection:
                row = connection.execute(select(keys).where(keys.c.id == parsed[0])).first()
        # One that is not known takes as long as one that is.
        salt, expected = (row.salt, row.hash) if row is not None else ("", _hash("", ""))
        same = hmac.compare_digest(_hash(salt, parsed[1] if parsed else ""), expected)
        key = _read(row) if row is not None and same else None
        now = self._clock()
        if key is None or not key.is_valid(_moment(now)):
            raise Unauthenticated(
                "The API key is not valid.",
                hint="It may have expired or been revoked. An administrator makes keys: `aidocks keys create NAME`.",
            )
        if len(self._good) >= _MOST_CACHED:
            self._good.clear()
        self._good[_digest(text)] = (key, now + self._cache_s)
        self._used[key.id] = now
        return key

    def cached(self, text: str) -> ApiKey | None:
        """Return the key that somebody sent if it was found good a moment ago, without looking it up."""
        known = self._good.get(_digest(text))
        now = self._clock()
        if known is None or now >= known[1] or not known[0].is_valid(_moment(now)):
            return None
        self._used[known[0].id] = now
        return known[0]

    def save_uses(self) -> None:
        """Write down when keys were last used: of each, at most once in :data:`USE_S` seconds."""
        now = self._clock()
        due = {
            key_id: used
            for key_id, used in list(self._used.items())
            if now - self._written.get(key_id, 0.0) >= USE_S
        }
        if not due:
            return
        with self._database.relaxed() as connection:
            for key_id, used in due.items():
                connection.execute(update(keys).where(keys.c.id == key_id).values(last_used_at=used))
        for key_id in due:
            self._used.pop(key_id, None)
            self._written[key_id] = now


def _hash(salt: str, secret: str) -> str:
    # No slow hash: those make up for secrets that people choose. This one has 256 random bits, and nobody tries
    # these through, however fast the hash is.
    return hashlib.sha256(f"{salt}:{secret}".encode()).hexdigest()


def _digest(text: str) -> bytes:
    # Of what is kept in memory, nothing can be sent as a key.
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _read(row: Row[Any]) -> ApiKey:
    values: dict[str, Any] = {name: getattr(row, name) for name in ApiKey.model_fields}
    for name in ("created_at", "expires_at", "revoked_at", "last_used_at"):
        values[name] = None if values[name] is None else _moment(values[name])
    return ApiKey.model_validate(values)
