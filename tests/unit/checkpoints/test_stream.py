"""What flows into a file is what it then holds, hashed on the way, on every file system and in any order."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aidocks.checkpoints import stream
from aidocks.checkpoints.files import StagedFile, copy_file
from aidocks.errors import CorruptCheckpoint, InsufficientDisk

BLOCK = 4096
PATTERN = bytes(range(251)) * 400


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BUFFER_BYTES", BLOCK)
    monkeypatch.setattr(stream, "BUFFERS", 2)


def make(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


pieces = st.lists(st.tuples(st.integers(0, 3 * BLOCK), st.booleans()), max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=pieces, order=st.randoms(use_true_random=False), is_ordered=st.booleans())
def test_a_file_is_what_was_written_to_it(
    tmp_path: Path, pieces: list[tuple[int, bool]], order: object, is_ordered: bool
) -> None:
    """In order, out of order, or in order to begin with; from memory and from another file."""
    content, parts = b"", []
    for number, (size, is_copy) in enumerate(pieces):
        part = PATTERN[number : number + size]
        parts.append((len(content), part, number, is_copy))
        content += part
    if not is_ordered:
        order.shuffle(parts)  # type: ignore[attr-defined]
    source = make(tmp_path / "source", PATTERN)
    staged = StagedFile(tmp_path / "target", len(content))
    staged.create()
    for offset, part, begin, is_copy in parts:
        if is_copy:
            staged.copy(offset, source, begin, len(part))
        else:
            staged.write(offset, part)
    output = staged.publish()
    staged.discard()
    assert output.path.read_bytes() == content
    assert (output.bytes, output.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def refuse_to_open(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    real = os.open

    def open_(path: object, flags: int, *rest: object, **named: object) -> int:
        if flags & os.O_DIRECT:
            raise OSError(number, os.strerror(number))
        return real(path, flags, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", open_)


def refuse_to_write(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    import fcntl

    real = os.pwrite

    def pwrite(descriptor: int, content: bytes, offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT and offset >= 2 * BLOCK:
            raise OSError(number, os.strerror(number))
        return real(descriptor, content, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("refuse", [refuse_to_open, refuse_to_write])
def test_a_file_system_may_insist_on_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse: object, number: int
) -> None:
    source = make(tmp_path / "source", PATTERN)
    refuse(monkeypatch, number)  # type: ignore[operator]
    output = copy_file(source, tmp_path / "target")
    assert output.path.read_bytes() == PATTERN
    assert output.sha256 == hashlib.sha256(PATTERN).hexdigest()


def test_a_system_without_that_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    copied = copy_file(make(tmp_path / "source", PATTERN), tmp_path / "target")
    assert copied.path.read_bytes() == PATTERN


@pytest.mark.parametrize("call", ["preadv", "pwrite"])
def test_short_calls_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    source = make(tmp_path / "source", PATTERN)
    real = getattr(os, call)

    def little(descriptor: int, content: object, offset: int) -> int:
        if call == "preadv":
            return int(real(descriptor, [content[0][:1000]], offset))  # type: ignore[index]
        return int(real(descriptor, content[:1000], offset))  # type: ignore[index]

    monkeypatch.setattr(os, call, little)
    copied = copy_file(source, tmp_path / "target")
    assert copied.path.read_bytes() == PATTERN
    assert copied.sha256 == hashlib.sha256(PATTERN).hexdigest()


@pytest.mark.parametrize("where", [0, 3 * BLOCK, len(PATTERN) // BLOCK * BLOCK])
def test_a_disk_that_fills_up_behind_the_reader_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: int
) -> None:
    real = os.pwrite

    def pwrite(descriptor: int, content: bytes, offset: int) -> int:
        if offset >= where:
            raise OSError(errno.ENOSPC, "full")
        return real(descriptor, content, offset)

    source = make(tmp_path / "source", PATTERN)
    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(InsufficientDisk, match="target needs"):
        copy_file(source, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_source_that_ends_early_is_named_and_nothing_remains(tmp_path: Path) -> None:
    source = make(tmp_path / "source", PATTERN)
    staged = StagedFile(tmp_path / "target", 2 * len(PATTERN))
    staged.create()
    with pytest.raises(CorruptCheckpoint, match=f"after {len(PATTERN) - 5} of the {len(PATTERN)}"):
        staged.copy(0, source, 5, len(PATTERN))
    staged.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    source = make(tmp_path / "source", PATTERN)
    before = len(os.listdir("/proc/self/fd"))
    copy_file(source, tmp_path / "target")
    with pytest.raises(FileNotFoundError):
        copy_file_from_nowhere(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def copy_file_from_nowhere(directory: Path) -> None:
    staged = StagedFile(directory / "other", 10)
    staged.create()
    try:
        staged.copy(0, directory / "nowhere", 0, 10)
    finally:
        staged.discard()


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Of a process that copies 300 MB it is the interpreter's, and the buffers."""
    with (tmp_path / "large").open("wb") as file:
        file.truncate(300_000_000)
    code = """
import re, sys
from pathlib import Path
from aidocks.checkpoints.files import copy_file
copy_file(Path(sys.argv[1]) / "large", Path(sys.argv[1]) / "copy")
assert not {"torch", "numpy", "transformers"} & set(sys.modules)
# Not ru_maxrss, which includes what this process was before it became this program.
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], check=True, stdout=subprocess.PIPE, text=True
    )
    assert int(done.stdout) < 120_000, "kilobytes"
    assert (tmp_path / "copy").stat().st_size == 300_000_000
