"""Hashes of files are exact, and computed once per content."""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from aidocks.checkpoints import hashes
from aidocks.checkpoints.hashes import FileHashes, combine_hashes


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were really read."""
    seen: list[Path] = []
    real = hashes.hash_file

    def hash_file(path: Path) -> str:
        seen.append(path)
        return real(path)

    monkeypatch.setattr(hashes, "hash_file", hash_file)
    return seen


def make(path: Path, content: bytes, mtime: int = 1_000_000_000) -> Path:
    path.write_bytes(content)
    os.utime(path, (mtime, mtime))
    return path


def test_a_file_is_read_once(tmp_path: Path, reads: list[Path]) -> None:
    file = make(tmp_path / "a", b"content")
    expected = {"a": hashlib.sha256(b"content").hexdigest()}
    assert FileHashes(tmp_path / "cache").compute([file]) == expected
    assert FileHashes(tmp_path / "cache").compute([file]) == expected
    assert reads == [file]


@pytest.mark.parametrize(
    ("content", "mtime"), [(b"changed", 1_000_000_001), (b"longer content", 1_000_000_000)]
)
def test_a_changed_file_is_read_again(tmp_path: Path, reads: list[Path], content: bytes, mtime: int) -> None:
    file = make(tmp_path / "a", b"content")
    FileHashes(tmp_path).compute([file])
    make(file, content, mtime)
    assert FileHashes(tmp_path).compute([file]) == {"a": hashlib.sha256(content).hexdigest()}
    assert len(reads) == 2


def test_a_file_of_this_moment_is_not_remembered(tmp_path: Path, reads: list[Path]) -> None:
    """It could change again within the clock's granularity, with the same size."""
    file = tmp_path / "a"
    file.write_bytes(b"now")
    FileHashes(tmp_path).compute([file])
    FileHashes(tmp_path).compute([file])
    assert len(reads) == 2


def test_hashes_known_from_writing_are_believed(tmp_path: Path, reads: list[Path]) -> None:
    file = make(tmp_path / "a", b"content")
    FileHashes(tmp_path).remember({file: "known"})
    assert FileHashes(tmp_path).compute([file]) == {"a": "known"}
    assert not reads


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff", b'{"x": 1}'])
def test_a_damaged_cache_is_only_slow(tmp_path: Path, reads: list[Path], damage: bytes) -> None:
    (tmp_path / "file-hashes.json").write_bytes(damage)
    file = make(tmp_path / "a", b"content")
    FileHashes(tmp_path).compute([file])
    FileHashes(tmp_path).compute([file])
    assert reads == [file]


def test_a_cache_that_cannot_be_written_is_only_slow(tmp_path: Path) -> None:
    blocker = make(tmp_path / "file", b"in the way")
    assert FileHashes(blocker / "cache").compute([blocker])["file"]


def test_links_share_their_target_s_hash(tmp_path: Path, reads: list[Path]) -> None:
    file = make(tmp_path / "a", b"content")
    (tmp_path / "b").symlink_to(file)
    FileHashes(tmp_path).compute([file])
    FileHashes(tmp_path).compute([tmp_path / "b"])
    assert reads == [file]


def test_names_and_contents_both_count() -> None:
    assert combine_hashes({"a": "1", "b": "2"}) == combine_hashes({"b": "2", "a": "1"})
    assert combine_hashes({"a": "1", "b": "2"}) != combine_hashes({"a": "2", "b": "1"})


def test_who_asks_while_a_file_is_read_ahead_waits_for_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, may_end, seen = threading.Event(), threading.Event(), list[str]()
    real = hashes.hash_file

    def hash_file(path: Path) -> str:
        seen.append(path.name)
        began.set()
        assert may_end.wait(20)
        return real(path)

    monkeypatch.setattr(hashes, "hash_file", hash_file)
    files = [make(tmp_path / name, name.encode()) for name in "ab"]
    FileHashes(tmp_path / "cache").compute_ahead([tmp_path / "gone", *files])
    assert began.wait(20)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(FileHashes(tmp_path / "cache").compute, files)
        may_end.set()
        assert asked.result(20) == {name: hashlib.sha256(name.encode()).hexdigest() for name in "ab"}
    assert sorted(seen) == ["a", "b"]
