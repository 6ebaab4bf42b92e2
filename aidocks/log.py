"""Logs: one JSON object a line, with the job that the line is about, and without secrets."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aidocks.settings import Settings

MAX_BYTES, BACKUPS = 10_000_000, 3
#: The packages whose lines are ours.
LOGGERS = ("aidocks", "cluster", "train", "serve")
HIDDEN = "[hidden]"

#: What is being worked on: ``job`` and ``unit``. Ray uses the name ``job_id`` itself, and takes it out of a line.
_subject: ContextVar[dict[str, str]] = ContextVar("aidocks_log_subject", default={})  # noqa: B039 - replaced, never changed

_SECRETS = (
    re.compile(r"\bhf_[A-Za-z0-9]{16,}"),
    re.compile(r"\baidk_[^\s\"'&,;]+"),
    re.compile(r"(?<=\bbearer )[^\s\"',;]+", re.IGNORECASE),
    # A colon before digits and a slash is a port.
    re.compile(r"(?<=://)([^\s:/@]*):(?!\d+/)[^\s@]+(?=@)"),
)
_SECRET_NAMES = re.compile(r"password|secret|authorization|api_?key$|(?<!_)token$", re.IGNORECASE)


@contextmanager
def about(job: str, unit: str | None = None) -> Iterator[None]:
    """Let every line that is logged within the body, also in its tasks and threads, name the job and the unit."""
    subject = {"job": job} if unit is None else {"job": job, "unit": unit}
    before = _subject.set(subject)
    try:
        yield
    finally:
        _subject.reset(before)


def redacted(value: Any) -> Any:
    """Return a value of JSON without what looks like a secret: API keys, hub tokens, passwords in URLs."""
    if isinstance(value, str):
        for pattern in _SECRETS:
            value = pattern.sub(lambda found: f"{found[1]}:{HIDDEN}" if found.re.groups else HIDDEN, value)
        return value
    if isinstance(value, Mapping):
        return {
            redacted(str(name)): HIDDEN
            if isinstance(item, str) and _SECRET_NAMES.search(str(name))
            else redacted(item)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [redacted(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float) else redacted(str(value))


class JsonLines(logging.Formatter):
    """Formats a record as one JSON object; what ``extra={"fields": {...}}`` holds becomes its members."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_subject.get(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(redacted(line), ensure_ascii=True)


def log_to_file(settings: Settings, name: str) -> None:
    """Let this process write what our packages log to a file of the installation's log directory.

    Where that cannot be written, the lines go to standard error: a worker of another node need not have the directory.

    Args:
        settings: Of the installation.
        name: Of the file, such as ``supervisor.log``.
    """
    handler: logging.Handler
    try:
        settings.log_dir.mkdir(parents=True, exist_ok=True)
        handler = RotatingFileHandler(
            settings.log_dir / name, maxBytes=MAX_BYTES, backupCount=BACKUPS, encoding="utf-8"
        )
    except OSError:
        handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for package in LOGGERS:
        logger = logging.getLogger(package)
        logger.setLevel(logging.INFO)
        logger.handlers = [handler]
        logger.propagate = False
