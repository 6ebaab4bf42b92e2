"""The key of this machine's own command line, and what there is to say of a service that asks for none."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from aidocks.access.keys import KeyRequest, Scope
from aidocks.errors import Unauthenticated
from aidocks.settings import LOOPBACK, Settings

if TYPE_CHECKING:
    from aidocks.access.store import KeyStore

FILE_NAME = "admin-key"


def admin_key_file(settings: Settings) -> Path:
    """Return where the key of whoever may read the data directory is."""
    return settings.home / FILE_NAME


def make_admin_key(settings: Settings, keys: KeyStore) -> Path:
    """Return the file of the administrator's key; where it has no valid one, with a new key.

    So one that was revoked, or that belongs to another job store, is replaced at the next start of the service.
    """
    path = admin_key_file(settings)
    settings.home.mkdir(parents=True, exist_ok=True)
    with (settings.home / f".{FILE_NAME}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_good(path, keys):
            path.chmod(0o600)
            return path
        _, text = keys.create(KeyRequest(name=FILE_NAME, scopes=(Scope.ADMIN,)))
        aside = path.with_name(f".{FILE_NAME}.{os.getpid()}")
        aside.unlink(missing_ok=True)
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    return path


def _is_good(path: Path, keys: KeyStore) -> bool:
    try:
        return keys.check(path.read_text().strip()).allows(Scope.ADMIN)
    except (OSError, ValueError, Unauthenticated):
        return False


def key_for(url: str, settings: Settings) -> str | None:
    """Return the key to send to the service at ``url``, None where there is none.

    ``AIDOCKS_API_KEY`` goes wherever its user sends requests. The administrator's goes to the service that the state
    file of this data directory names, while its process lives: to nobody who has the port after it.
    """
    if settings.api_key is not None:
        return settings.api_key.get_secret_value()
    try:
        state = json.loads(settings.state_file.read_text())
        if state["url"].rstrip("/") != url.rstrip("/") or not _lives(state.get("pid")):
            return None
        return admin_key_file(settings).read_text().strip() or None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _lives(pid: int | None) -> bool:
    """Tell whether a process of this user has the id; a service without one lives elsewhere."""
    if pid is None:
        return True
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def warn_of_open_door(settings: Settings) -> str | None:
    """Return what to say loudly of a service that needs no key though others than this machine reach it."""
    if not settings.open_to_all or settings.host in LOOPBACK:
        return None
    return (
        f"Anybody who reaches {settings.host}:{settings.port} can use this service without a key: AIDOCKS_ACCESS=open. "
        "That is for a service behind something that checks who asks; without one, set AIDOCKS_ACCESS=keys."
    )
