"""API keys as values: how one is written, what it allows, and how many requests and jobs it may have."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from aidocks.specs.base import Spec

PREFIX = "aidk"
_ID_BYTES, _SECRET_BYTES = 6, 32
_TEXT = re.compile(rf"{PREFIX}_([0-9a-f]{{{2 * _ID_BYTES}}})_([A-Za-z0-9_-]{{43}})")


class Scope(StrEnum):
    """What a key allows. Each allows what stands before it."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"


_ORDER = tuple(Scope)


def _known_once(scopes: tuple[Scope, ...]) -> tuple[Scope, ...]:
    return tuple(scope for scope in _ORDER if scope in scopes)


#: In the order of what they allow, each once.
Scopes = Annotated[tuple[Scope, ...], Field(min_length=1), AfterValidator(_known_once)]


def allowed(scopes: Iterable[Scope], wanted: Scope) -> bool:
    """Tell whether one of ``scopes`` allows ``wanted``."""
    return any(_ORDER.index(scope) >= _ORDER.index(wanted) for scope in scopes)


PerMinute = Annotated[
    int | None,
    Field(
        ge=0, le=10**9, description="Requests a minute; 0: any number. Default: AIDOCKS_REQUESTS_PER_MINUTE."
    ),
]
MaxJobs = Annotated[
    int | None,
    Field(
        ge=1,
        le=10**9,
        description="Unfinished jobs at the same time. Default: AIDOCKS_MAX_JOBS_PER_KEY.",
    ),
]


class Limits(BaseModel):
    """What a key may have at most."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_minute: PerMinute = None
    max_jobs: MaxJobs = None


class ApiKey(BaseModel):
    """What is known of an API key. Its secret is not: that was told once, to whoever had it made."""

    model_config = ConfigDict(frozen=True)

    id: str = Field(description="Stands in the key, and is the `owner` of the jobs that it submits.")
    name: str = Field(description="Whose it is, or what for.")
    scopes: Scopes = Field(description="What it allows: `read`, `submit` (and read), `admin` (everything).")
    limits: Limits = Limits()
    created_at: datetime
    expires_at: datetime | None = Field(None, description="From then on it is refused.")
    revoked_at: datetime | None = Field(None, description="Since then it is refused.")
    last_used_at: datetime | None = Field(None, description="To the minute.")

    def allows(self, scope: Scope) -> bool:
        return allowed(self.scopes, scope)

    def is_valid(self, now: datetime | None = None) -> bool:
        """Tell whether it is neither revoked nor expired."""
        return self.revoked_at is None and (
            self.expires_at is None or (now or datetime.now(UTC)) < self.expires_at
        )


class KeyRequest(Spec):
    """A key that is to be made."""

    model_config = ConfigDict(json_schema_extra={"examples": [
        {"name": "nightly builds", "scopes": ["submit"], "expires_in_s": 7776000, "max_jobs": 10}
    ]})  # fmt: skip

    name: str = Field(min_length=1, max_length=128, description="Whose it is, or what for.")
    scopes: Scopes = Field(
        (Scope.SUBMIT,),
        description="What it allows: `read`; `submit`, which includes it; `admin`, which includes both.",
    )
    requests_per_minute: PerMinute = None
    max_jobs: MaxJobs = None
    expires_in_s: float | None = Field(
        None, gt=0, le=315_360_000, description="Seconds after which it is refused. Default: never."
    )

    @field_validator("name", mode="after")
    @classmethod
    def _can_be_read(cls, name: str) -> str:
        if not name.isprintable() or not name.strip():
            raise ValueError("must have letters, and no control characters")
        return name.strip()


class NewKey(ApiKey):
    """A key that was just made, with what its holder sends."""

    key: str = Field(description="The key itself. It is told this once and cannot be asked for again.")


def new_key() -> tuple[str, str]:
    """Return id and secret of a new key."""
    return secrets.token_hex(_ID_BYTES), secrets.token_urlsafe(_SECRET_BYTES)


def key_text(key_id: str, secret: str) -> str:
    """Return a key as its holder sends it."""
    return f"{PREFIX}_{key_id}_{secret}"


def parse_key(text: str) -> tuple[str, str] | None:
    """Return id and secret of what somebody sent as a key, None when it cannot be one."""
    found = _TEXT.fullmatch(text)
    return (found[1], found[2]) if found else None
