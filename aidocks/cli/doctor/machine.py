"""Checks of the machine: memory, open files, disk."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from aidocks.cli.doctor.finding import Finding, bad, existing, good, note
from aidocks.client.wording import size
from aidocks.settings import Settings

_LOW_DISK, _NO_DISK = 5_000_000_000, 500_000_000
_LOW_MEMORY = 2_000_000_000
#: What Ray maps there for its objects, and some room for those who load data.
_LOW_SHARED_MEMORY = 512 * 1024 * 1024
_FEW_FILES, _TOO_FEW_FILES = 4096, 1024
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def main_memory(_: Settings) -> Iterator[Finding]:
    """Look at what is free, and at what the container allows."""
    pages, page = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    free, total = pages * page, os.sysconf("SC_PHYS_PAGES") * page
    available = _meminfo("MemAvailable") or free
    if _CGROUP_LIMIT.exists() and (limit := _CGROUP_LIMIT.read_text().strip()).isdigit():
        total = min(total, int(limit))
    available = min(available, total)
    text = f"{size(available)} of {size(total)} available"
    yield note("memory", f"{text}: little for a model") if available < _LOW_MEMORY else good("memory", text)


def shared_memory(_: Settings) -> Iterator[Finding]:
    """Look at /dev/shm, which containers make small."""
    shm = Path("/dev/shm")  # noqa: S108 - looked at, not written
    if not shm.is_dir():
        yield note("shared memory", "there is no /dev/shm; Ray keeps objects on the disk, which is slow")
        return
    total = shutil.disk_usage(shm).total
    if total < _LOW_SHARED_MEMORY:
        text = f"{shm} has {size(total)} only; start the container with --shm-size=1g, or more"
        yield note("shared memory", text)


def open_files(_: Settings) -> Iterator[Finding]:
    """Look at how many files and connections a process may have open."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _FEW_FILES:
        return
    text = f"a process may open {soft} files; raise it: ulimit -n 65536"
    yield bad("open files", text) if soft < _TOO_FEW_FILES else note("open files", text)


def disk_space(settings: Settings) -> Iterator[Finding]:
    """Look at the disks of the data directory and of Ray's own files."""
    free = shutil.disk_usage(existing(settings.home)).free
    if free < _NO_DISK:
        yield bad("disk", f"{size(free)} free; delete models (aidocks models delete), or set AIDOCKS_HOME")
    elif free < _LOW_DISK:
        yield note("disk", f"{size(free)} free: little for models")
    else:
        yield good("disk", f"{size(free)} free")
    temporary = shutil.disk_usage("/tmp").free  # noqa: S108 - where the embedded Ray has its files
    if temporary < _NO_DISK:
        yield bad("disk of /tmp", f"{size(temporary)} free; the service has its sockets and Ray's logs there")


def _meminfo(name: str) -> int | None:
    for line in Path("/proc/meminfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    return None


MACHINE_CHECKS = (main_memory, shared_memory, open_files, disk_space)
