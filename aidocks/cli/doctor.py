"""What `aidocks doctor` looks at: this machine, this installation, this data directory."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from aidocks._root import service_root
from aidocks._version import __version__
from aidocks.client.wording import size
from aidocks.settings import Settings

_EXTRAS = {
    "local": (
        "torch",
        "transformers",
        "safetensors",
        "sqlalchemy",
        "numpy",
        "matplotlib",
        "sentence-transformers",
    ),
    "service": ("ray", "fastapi", "fastapi-offline", "psutil"),
}
_LOW_DISK = 5_000_000_000


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        state: ``good``, ``note`` (worth knowing) or ``bad`` (AIDocks will not work).
        text: What was found and, if it is bad, what to do.
    """

    subject: str
    state: Literal["good", "note", "bad"]
    text: str


def examine(settings: Settings) -> Iterator[Finding]:
    """Yield what was found, from the interpreter outwards."""
    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding("aidocks", "good", f"{__version__} on Python {python}, {os.cpu_count()} cores")
    for extra, packages in _EXTRAS.items():
        yield _extra(extra, packages)
    yield _gpu()
    yield _home(settings)
    yield _disk(settings)
    yield _port(settings)
    yield from _shadows()


def _extra(extra: str, packages: tuple[str, ...]) -> Finding:
    found, missing = [], []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            missing.append(package)
    if missing:
        text = f"without {', '.join(missing)}; install it with: pip install 'aidocks[{extra}]'"
        return Finding(f"extra {extra}", "note", text)
    return Finding(f"extra {extra}", "good", ", ".join(found))


def _gpu() -> Finding:
    devices = sorted(Path("/dev").glob("nvidia[0-9]*"))
    if not devices:
        return Finding("GPU", "note", "none; everything runs on the CPU")
    return Finding("GPU", "good", f"{len(devices)} NVIDIA device{'s' if len(devices) > 1 else ''}")


def _home(settings: Settings) -> Finding:
    try:
        with tempfile.TemporaryFile(dir=_existing(settings.home)):
            pass
    except OSError as error:
        return Finding(
            "data", "bad", f"{settings.home} cannot be written: {error.strerror}. Set AIDOCKS_HOME."
        )
    if len({_existing(path).stat().st_dev for path in (settings.models_dir, settings.workspaces_dir)}) > 1:
        text = "models and workspaces are on different file systems; publishing a model needs one"
        return Finding("data", "bad", text)
    return Finding("data", "good", str(settings.home))


def _disk(settings: Settings) -> Finding:
    free = shutil.disk_usage(_existing(settings.home)).free
    if free < _LOW_DISK:
        return Finding("disk", "note", f"{size(free)} free: little for models")
    return Finding("disk", "good", f"{size(free)} free")


def _existing(path: Path) -> Path:
    """Return ``path`` or the nearest directory above it that is there."""
    return next(place for place in (path, *path.parents) if place.exists())


def _port(settings: Settings) -> Finding:
    from aidocks.client.address import service_url
    from aidocks.client.http import Client
    from aidocks.errors import AIDocksError

    url = service_url(settings)
    try:
        with Client(url, timeout=2.0, retry_s=0.0) as client:
            client.health()
        return Finding("service", "good", f"answers at {url}")
    except AIDocksError:
        pass
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            text = f"port {settings.port} is taken by another program ({error.strerror}); set AIDOCKS_PORT"
            return Finding("service", "bad", text)
    return Finding("service", "note", f"does not run; port {settings.port} is free for `aidocks up`")


def _shadows() -> Iterator[Finding]:
    """Look for modules of the user's that Python would import instead of the service's packages."""
    root = service_root()
    for name in ("cluster", "train", "serve"):
        spec = PathFinder.find_spec(name, [str(Path.cwd()), str(root)])
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin is None:
            yield Finding(name, "bad", f"the package is missing below {root}; install AIDocks again")
        elif not origin.is_relative_to(root):
            yield Finding(
                name, "bad", f"{origin} hides AIDocks' own; start the service from another directory"
            )
