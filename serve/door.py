"""The door: lets a request through that has a key for it, and not more often than its key may ask."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address
from typing import Any

from starlette.datastructures import Headers

from aidocks.access.keys import ApiKey, Limits
from aidocks.access.store import KeyStore
from aidocks.errors import AIDocksError, NotPermitted, RateLimited, Unauthenticated
from aidocks.jobs.database import STORE_ERRORS, store_away
from aidocks.settings import Settings
from serve.access import KeyHolder, needed_scope
from serve.rates import Rates

#: Keys that are not right which one address may send. Whoever has the right one is let through all the same.
WRONG_KEYS_PER_MINUTE = 30
_MOST_REMEMBERED = 10_000

log = logging.getLogger("serve.door")


@dataclass(frozen=True)
class Refusal:
    """Why a request is not let through, and what the answer's headers say of it."""

    error: AIDocksError
    headers: Mapping[str, str] = field(default_factory=dict)


class Door:
    """Asks for a key where the settings ask for one.

    Args:
        settings: Of the installation.
        keys: Those that are right.
        rates: Count the requests of keys and the wrong keys of addresses, each for this process alone.
    """

    def __init__(self, settings: Settings, keys: KeyStore, rates: Rates | None = None) -> None:
        self._open = settings.open_to_all
        self._per_minute = settings.requests_per_minute
        self._max_jobs = settings.max_jobs_per_key
        self._keys = keys
        self._rates = rates or Rates()
        # Were right at some time, and are looked up also when their address has sent too many that were not.
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    async def admit(
        self, scope: Mapping[str, Any], headers: Headers
    ) -> tuple[KeyHolder | None, Refusal | None]:
        """Return whose the request is (None where that does not matter), or why it is refused."""
        needed = None if self._open else needed_scope(scope["method"], path_of(scope))
        if needed is None:
            return None, None
        try:
            key = await self._authenticate(headers, address_of(scope))
            self._count(key)
        except Unauthenticated as error:
            return None, Refusal(error, {"WWW-Authenticate": 'Bearer realm="AIDocks"'})
        except _TooOften as late:
            return None, Refusal(late.error, {"Retry-After": str(math.ceil(late.wait_s))})
        except STORE_ERRORS as error:
            log.error("the keys cannot be read", exc_info=error)
            return None, Refusal(store_away(), {"Retry-After": "1"})
        holder = KeyHolder(key.id, key.scopes, self._limits(key))
        if key.allows(needed):
            return holder, None
        refused = NotPermitted(
            f"This API key allows {', '.join(key.scopes)}; the request needs {needed}.",
            hint="An administrator makes keys: `aidocks keys create NAME --scope " + f"{needed}`.",
        )
        return holder, Refusal(refused)

    async def _authenticate(self, headers: Headers, address: str) -> ApiKey:
        text = _sent_key(headers)
        if text is None:
            raise Unauthenticated(
                "This request needs an API key.",
                hint="Send it as `Authorization: Bearer <key>`; clients of AIDocks read AIDOCKS_API_KEY.",
            )
        known = self._keys.cached(text)
        if known is not None:
            return known
        digest = hashlib.sha256(text.encode()).digest()
        bucket = f"address {address}"
        if digest not in self._seen and (wait := self._rates.wait_s(bucket, WRONG_KEYS_PER_MINUTE)):
            raise _TooOften(RateLimited("Too many wrong API keys came from this address."), wait)
        try:
            key = await asyncio.to_thread(self._keys.check, text)
        except Unauthenticated:
            self._rates.take(bucket, WRONG_KEYS_PER_MINUTE)
            raise
        self._seen[digest] = None
        if len(self._seen) > _MOST_REMEMBERED:
            self._seen.popitem(last=False)
        return key

    def _count(self, key: ApiKey) -> None:
        per_minute = self._limits(key).requests_per_minute
        if per_minute and (wait := self._rates.take(f"key {key.id}", per_minute)):
            error = RateLimited(
                f"This API key may ask {per_minute:,} times a minute.",
                hint="Ask again after the seconds of Retry-After. To follow a job, read its event stream.",
            )
            raise _TooOften(error, wait)

    def _limits(self, key: ApiKey) -> Limits:
        own = key.limits
        return Limits(
            requests_per_minute=self._per_minute
            if own.requests_per_minute is None
            else own.requests_per_minute,
            max_jobs=self._max_jobs if own.max_jobs is None else own.max_jobs,
        )


class _TooOften(Exception):
    def __init__(self, error: RateLimited, wait_s: float) -> None:
        super().__init__(error, wait_s)
        self.error = error
        self.wait_s = wait_s


def path_of(scope: Mapping[str, Any]) -> str:
    """Return the path of a request as its route is looked for: without that below which the service is mounted."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    inside = root and path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/")
    return path[len(root) :] if inside else path


def address_of(scope: Mapping[str, Any]) -> str:
    """Return where a request comes from; of IPv6 the network, in which one machine has any number of addresses."""
    host = (scope.get("client") or ("unknown",))[0]
    try:
        address = ip_address(host)
    except ValueError:
        return str(host)[:64]
    if isinstance(address, IPv6Address) and not address.is_loopback:
        return f"{IPv6Address(int(address) >> 64 << 64)}/64"
    return str(address)


def _sent_key(headers: Headers) -> str | None:
    """Return what was sent as a key, as OpenAI's clients do or as others do; None when there is nothing."""
    scheme, _, given = headers.get("authorization", "").strip().partition(" ")
    if scheme:
        # Of another scheme it is no key; and two keys in one request would be one too many.
        return given.strip() if scheme.lower() == "bearer" else ""
    return headers.get("x-api-key")
