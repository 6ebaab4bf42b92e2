"""Who asks, and what for: the caller of a request, and the scope that the request needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from aidocks.access.keys import Limits, Scope, allowed
from aidocks.errors import NotPermitted
from aidocks.jobs.terms import LOCAL

#: Where the gate leaves the caller in a request's ASGI scope.
KEY = "aidocks.key"

#: Methods that change nothing.
READING = frozenset({"GET", "HEAD"})
#: How the service is, and how it is used: neither tells of anybody's work.
_FOR_ALL = frozenset({"/", "/health", "/docs", "/redoc", "/openapi.json"})
_PAGE_FILES = "/docs/assets/"
_FOR_ADMINISTRATORS = ("/keys", "/audit")
#: What is deleted here is the caller's own, and half of a file.
_OWN = "/uploads/"


@dataclass(frozen=True)
class KeyHolder:
    """Whoever sent a request.

    Attributes:
        owner: Id of the key: the owner of the jobs that are submitted with it; ``local`` where the service is open.
        scopes: What the key allows.
        limits: What it may have, with the installation's own where the key has none. ``max_jobs`` is None where
            any number may wait.
    """

    owner: str
    scopes: tuple[Scope, ...]
    limits: Limits

    def allows(self, scope: Scope | str) -> bool:
        return allowed(self.scopes, Scope(scope))

    def require_own(self, owner: str, what: str) -> None:
        """Refuse a key what belongs to another one.

        Raises:
            NotPermitted: It is neither the owner nor an administrator's.
        """
        if self.owner != owner and not self.allows(Scope.ADMIN):
            raise NotPermitted(
                f"{what} belongs to another API key.", hint="Its owner or an administrator can do that."
            )


ANYBODY = KeyHolder(LOCAL, (Scope.ADMIN,), Limits(requests_per_minute=0))


async def _caller(request: Request) -> KeyHolder:
    return request.scope.get(KEY, ANYBODY)  # type: ignore[no-any-return]


#: For a route's signature: ``caller: Caller``.
Caller = Annotated[KeyHolder, Depends(_caller)]


def needed_scope(method: str, path: str) -> Scope | None:
    """Return what a key must allow for a request; None where none is needed.

    What computes (``/embed``) needs ``submit``, though it changes nothing. Whose a job is, its routes check.

    Args:
        method: Of the request.
        path: Without the path below which the service is mounted.
    """
    if any(path == place or path.startswith(f"{place}/") for place in _FOR_ADMINISTRATORS):
        return Scope.ADMIN
    if method in READING:
        return None if path in _FOR_ALL or path.startswith(_PAGE_FILES) else Scope.READ
    if method == "DELETE" and not path.startswith(_OWN):
        return Scope.ADMIN
    return Scope.SUBMIT
