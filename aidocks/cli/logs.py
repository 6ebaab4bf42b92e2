"""`aidocks logs`: the log files of the service, for people."""

from __future__ import annotations

import json as json_module
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from aidocks.cli.output import print_text, remark
from aidocks.errors import NotFound

_POLL_S = 0.5
_NAMED = ("time", "level", "logger", "message", "job", "traceback")


def logs(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[FILE]", help="Log file.  [dim](service.log)[/]", show_default=False),
    ] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Lines from the end.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as the file grows.")] = False,
    job: Annotated[
        str | None,
        typer.Option("--job", metavar="ID", help="What is about this job, from all files, in order of time."),
    ] = None,
    raw: Annotated[bool, typer.Option("--json", help="Lines as they are in the file.")] = False,
) -> None:
    """Print the end of a log of the service, and name the other logs."""
    from aidocks.settings import Settings

    directory = Settings().log_dir
    files = {str(path.relative_to(directory)): path for path in _files(directory)}
    if job is not None:
        chosen = {name: files[name]} if name in files else files
        found = sorted(_about(job, list(chosen.values())))
        for _, line in found[-lines:] if lines else []:
            print_text(line if raw else readable(line))
        if not found:
            raise NotFound(
                f"No log in {directory} mentions {job}.", hint="`aidocks jobs list` shows the ids."
            )
        return
    name = name or "service.log"
    if name not in files:
        known = ", ".join(files) or "none; has the service ever run?"
        raise NotFound(f"There is no log {name!r} in {directory}.", hint=f"There are: {known}.")
    for line in _end(files[name], lines, follow):
        print_text(line if raw else readable(line))
    others = [other for other in files if other != name]
    if others:
        remark(f"more in {directory}: {', '.join(others)}")


def readable(line: str) -> str:
    """Return a line for people: time, level and message first. What is not a JSON object stays as it is."""
    record: Any = None
    with suppress(ValueError):
        record = json_module.loads(line)
    if not isinstance(record, dict) or "message" not in record:
        return line
    begin = ""
    with suppress(KeyError, TypeError, ValueError):
        begin = f"{datetime.fromisoformat(record['time']).astimezone():%Y-%m-%d %H:%M:%S} "
    level = str(record.get("level", "")).upper()
    job = f" [{record['job']}]" if record.get("job") else ""
    rest = " ".join(f"{key}={value}" for key, value in record.items() if key not in _NAMED)
    text = f"{begin}{level:<7} {record.get('logger', '')}{job}: {record['message']}"
    return "\n".join(part for part in (f"{text}  {rest}".rstrip(), record.get("traceback")) if part)


def _end(file: Path, lines: int, follow: bool) -> Iterator[str]:
    with file.open(errors="replace") as stream:
        found = stream.readlines()
        for line in found[-lines:] if lines else []:
            yield line.rstrip("\n")
        while follow:
            if line := stream.readline():
                yield line.rstrip("\n")
            else:
                time.sleep(_POLL_S)


def _about(job: str, files: list[Path]) -> Iterator[tuple[str, str]]:
    """Yield time and text of every line of ours that names a job."""
    for file in files:
        with file.open(errors="replace") as stream:
            for line in stream:
                if job not in line:
                    continue
                with suppress(ValueError):
                    record = json_module.loads(line)
                    if isinstance(record, dict):
                        yield str(record.get("time", "")), line.rstrip("\n")


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file()) if directory.is_dir() else []
