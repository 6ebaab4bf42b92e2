"""Checks of the data directory: its place, its secrets, the job store, the registry, what was left behind."""

from __future__ import annotations

import os
import stat
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aidocks.cli.doctor.finding import Finding, bad, existing, good, note
from aidocks.errors import AIDocksError
from aidocks.log import redacted
from aidocks.settings import Settings

if TYPE_CHECKING:
    from sqlalchemy import Connection

#: File systems on which SQLite's locks are not to be trusted, or another node's writes not seen.
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse", "afs")
_CONNECT_S = 5
#: Of clocks that differ by less nobody notices.
_CLOCK_S = 60.0


def data_directory(settings: Settings) -> Iterator[Finding]:
    """See whether the data directory can be written, and is of one piece."""
    try:
        with tempfile.TemporaryFile(dir=existing(settings.home)):
            pass
    except OSError as error:
        yield bad("data", f"{settings.home} cannot be written: {error.strerror}. Set AIDOCKS_HOME.")
        return
    if len({existing(path).stat().st_dev for path in (settings.models_dir, settings.workspaces_dir)}) > 1:
        yield bad("data", "models and workspaces are on different file systems; publishing a model needs one")
    else:
        yield good("data", str(settings.home))


def file_system(settings: Settings) -> Iterator[Finding]:
    """See whether SQLite is on a file system that keeps its promises."""
    kind = file_system_of(existing(settings.home), Path("/proc/self/mountinfo").read_text())
    if settings.store_url.startswith("sqlite") and kind in _NETWORK:
        yield bad(
            "job store",
            f"SQLite on {kind}: its locks do not work there. Set AIDOCKS_DATABASE_URL to a PostgreSQL, or "
            "AIDOCKS_HOME to a local disk.",
        )


def file_system_of(path: Path, mounts: str) -> str:
    """Return the type of the file system that holds a path.

    Args:
        path: Of an existing file or directory.
        mounts: As of /proc/self/mountinfo.
    """
    place, found, kind = str(path.resolve()), "", ""
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        point = left.split()[4].replace("\\040", " ")
        inside = place == point or place.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(found):
            found, kind = point, right.split()[0]
    return kind


def secret_files(settings: Settings) -> Iterator[Finding]:
    """See that nobody else on this machine can read the secrets."""
    from aidocks.access.local import admin_key_file

    for path in (settings.token_file, admin_key_file(settings)):
        if not path.exists():
            continue
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            yield bad(path.name, f"others can read it (mode {mode:04o}); chmod 600 {path}")
        if path.stat().st_uid != os.getuid():
            yield bad(path.name, f"{path} belongs to another user; run AIDocks as one user")


def job_store(settings: Settings) -> Iterator[Finding]:
    """See whether the job store answers, is of this version, and has work that nobody does."""
    if find_spec("sqlalchemy") is None:
        return
    from sqlalchemy import create_engine, make_url
    from sqlalchemy.exc import SQLAlchemyError

    address = make_url(settings.store_url)
    sqlite = address.get_backend_name() == "sqlite"
    if sqlite and not Path(str(address.database)).exists():
        yield good("job store", "none yet")
        return
    if address.drivername == "postgresql":
        address = address.set(drivername="postgresql+psycopg")
    try:
        engine = create_engine(address, connect_args={"timeout" if sqlite else "connect_timeout": _CONNECT_S})
        with engine.connect() as connection:
            yield from _look_into(connection, settings)
        engine.dispose()
    except (SQLAlchemyError, ImportError) as error:
        reason = redacted(str(error).splitlines()[0])
        yield bad("job store", f"{redacted(settings.store_url)} does not answer: {reason}")


def _look_into(connection: Connection, settings: Settings) -> Iterator[Finding]:
    from sqlalchemy import func, inspect, select

    from aidocks.jobs.database import SCHEMA_VERSION, jobs, meta
    from aidocks.jobs.rows import UNFINISHED

    if not inspect(connection).has_table(meta.name):
        yield good("job store", "empty")
        return
    version = connection.scalar(select(meta.c.value).where(meta.c.key == "schema_version"))
    if version is None or version > SCHEMA_VERSION:
        yield bad(
            "job store",
            f"its schema is version {version}, this AIDocks reads up to {SCHEMA_VERSION}; use the AIDocks that "
            "wrote it",
        )
        return
    if version < SCHEMA_VERSION:
        yield note("job store", f"schema version {version}: brought up to date at the next start")
    else:
        yield good("job store", f"answers, schema version {version}")
    unfinished = {
        row.id: row.place
        for row in connection.execute(select(jobs.c.id, jobs.c.place).where(jobs.c.status.in_(UNFINISHED)))
    }
    waiting = sum(place == "service" for place in unfinished.values())
    if waiting and not _runs(settings):
        yield note("jobs", f"{waiting} unfinished, and no service runs; `aidocks up` goes on with them")
    left = [path for path in settings.workspaces_dir.glob("job-*") if path.name not in unfinished]
    if left:
        text = f"{len(left)} of jobs that have ended or are not known here"
        yield note("workspaces", f"{text}; a running service removes those of its own jobs: {left[0]}")
    newest = connection.scalar(select(func.max(jobs.c.created_at))) or 0.0
    if newest > time.time() + _CLOCK_S:
        ahead = newest - time.time()
        yield bad(
            "clock", f"the newest job is from {ahead:.0f} s in the future; set the clock of this machine"
        )


def _runs(settings: Settings) -> bool:
    from aidocks.client.address import service_url
    from aidocks.client.http import Client

    try:
        with Client(service_url(settings), timeout=2.0, retry_s=0.0) as client:
            client.health()
    except AIDocksError:
        return False
    return True


def registry_models(settings: Settings) -> Iterator[Finding]:
    """See that the models' files are there, and as large as their manifests say."""
    if settings.storage_url or not settings.models_dir.is_dir():
        return  # files of a shared registry come when they are asked for
    from aidocks.models.registry import Registry

    registry = Registry(settings.models_dir)
    names = registry.names()
    broken = 0
    for name in names:
        if flaw := _flaw(registry, name):
            broken += 1
            advice = f"import or make it again: aidocks models delete {name}"
            yield bad(f"model {name}", f"{flaw}; {advice}")
    if names and not broken:
        yield good("models", f"{len(names)}, with all their files")


def _flaw(registry: Any, name: str) -> str | None:
    try:
        manifest = registry.manifest(name)
    except AIDocksError as error:
        return error.message.rstrip(".")
    for file in manifest.files:
        try:
            found = (registry.path(name) / file.path).stat().st_size
        except OSError:
            return f"{file.path} is missing"
        if found != file.bytes:
            return f"{file.path} has {found:,} bytes, not {file.bytes:,}"
    return None


def shared_storage(settings: Settings) -> Iterator[Finding]:
    """See whether the storage that all nodes share can be written and read."""
    if settings.storage_url is None:
        return
    from aidocks import storage

    url = redacted(settings.storage_url)
    flaw = storage.check(settings)
    yield bad("storage", redacted(flaw)) if flaw else good("storage", f"{url} can be written and read")


DATA_CHECKS = (
    data_directory,
    file_system,
    secret_files,
    job_store,
    registry_models,
    shared_storage,
)
