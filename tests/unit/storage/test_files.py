"""What two nodes see of each other's files, through a directory and through memory."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from aidocks import storage
from aidocks.checkpoints.files import hash_file, unfinished
from aidocks.errors import CorruptCheckpoint, InvalidSpec, MissingExtra, PathNotAllowed, ServiceUnreachable
from aidocks.settings import Settings
from aidocks.storage import files
from aidocks.storage.disk import DirectoryStore
from aidocks.storage.files import Entry, object_key
from aidocks.storage.objects import ObjectStore, open_store, redacted
from aidocks.storage.sweep import sweep_contents, sweep_node
from tests.unit.storage.conftest import MakeNode

JOB = "workspaces/job-1"


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_what_one_node_keeps_another_brings(node: MakeNode) -> None:
    names = ["plain", "deep/er/файл 1.json", "q?*[x]#%.txt", ".hidden"]
    with node("a").sharing() as here:
        written = [write(here.home / JOB / name, name.encode() * 9) for name in names]
        here.keep(written)
    with node("b").sharing() as here:
        entries = here.entries(here.home / JOB)
        assert sorted(entries) == sorted(written)
        here.bring(entries)
        assert [path.read_bytes() for path in written] == [name.encode() * 9 for name in names]
        here.forget(here.home / JOB)
        assert here.entries(here.home / JOB) == {}
        assert all(path.exists() for path in written)


def test_a_file_is_brought_again_only_when_it_changed_elsewhere(node: MakeNode) -> None:
    a, b = node("a"), node("b")
    with a.sharing() as here:
        path = write(here.home / JOB / "x", b"old")
        os.utime(path, ns=(1, 10**18))
        here.keep([path])
    with b.sharing() as here:
        here.bring(here.entries(path.parent))
        brought = path.stat()
        here.bring(here.entries(path.parent))
        assert path.stat().st_ino == brought.st_ino
    with a.sharing() as here:
        write(path, b"new")
        here.keep([path])
    with b.sharing() as here:
        here.bring(here.entries(path.parent))
        assert path.read_bytes() == b"new"
        write(path, b"newer, and only here")
        here.bring(here.entries(path.parent))
        assert path.read_bytes() == b"newer, and only here"


def test_the_same_content_is_stored_once(node: MakeNode) -> None:
    with node("a").sharing() as here:
        here.keep([write(here.home / JOB / name, b"same") for name in ("x", "y")])
        here.keep([write(here.home / JOB / "z", b"same")], {here.home / JOB / "z": sha(b"same")})
        assert [row.key for row in here.store.list("objects")] == [object_key(sha(b"same"))]


def test_a_file_that_is_not_what_was_written_is_not_kept(node: MakeNode) -> None:
    with node("a").sharing() as here:
        path = write(here.home / JOB / "x", b"other")
        if isinstance(here.store, DirectoryStore):
            with pytest.raises(CorruptCheckpoint):
                here.keep([path], {path: sha(b"this")})
            assert here.entries(path.parent) == {}
        before = path.stat()
        write(path, b"changed since")
        with pytest.raises(CorruptCheckpoint):
            here.put(path, sha(b"other"), before)
        assert here.store.list("objects") == []


def test_a_large_file_of_two_units_is_hashed_and_uploaded_once(
    node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_SMALL_BYTES", 10)
    hashed: list[Path] = []
    monkeypatch.setattr(files, "hash_file", lambda path: hashed.append(path) or hash_file(path))
    with node("a").sharing() as here:
        path = write(here.home / JOB / "x", b"large" * 9)
        for _ in range(2):
            here.keep([path])
        assert hashed == [path]
        write(path, b"another" * 9)
        here.keep([path])
        assert here.entries(path.parent)[path].sha256 == sha(b"another" * 9)


def test_damage_in_the_storage_is_noticed_and_nothing_half_written_remains(node: MakeNode) -> None:
    with node("a").sharing() as here:
        path = write(here.home / JOB / "x", b"right")
        here.keep([path])
        key = object_key(sha(b"right"))
        path.unlink()
        here.store.write(key, b"wrong")
        with pytest.raises(CorruptCheckpoint, match="x"):
            here.bring(here.entries(path.parent))
        here.store.write(key, b"short"[:3])
        with pytest.raises(CorruptCheckpoint, match="3 bytes where 5"):
            here.bring(here.entries(path.parent))
        here.store.remove(key)
        with pytest.raises(CorruptCheckpoint, match="not in the storage"):
            here.bring(here.entries(path.parent))
        assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("name", ["files/workspaces/job-1/..%2Fx", "files/workspaces/job-1/%2E%2E"])
def test_names_that_lead_out_are_refused(node: MakeNode, name: str) -> None:
    with node("a").sharing() as here:
        here.store.write(name, Entry(bytes=1, sha256=sha(b"x")).model_dump_json().encode())
        with pytest.raises(PathNotAllowed):
            here.entries(here.home / JOB)


def test_nothing_is_read_or_written_through_links(node: MakeNode, tmp_path: Path) -> None:
    with node("a").sharing() as here:
        secret = write(tmp_path / "secret", b"secret")
        (here.home / JOB).mkdir(parents=True)
        (here.home / JOB / "link").symlink_to(secret)
        (here.home / "workspaces" / "job-2").symlink_to(tmp_path)
        for path in (here.home / JOB / "link", here.home / "workspaces" / "job-2" / "secret"):
            with pytest.raises(PathNotAllowed):
                here.keep([path])
            with pytest.raises(PathNotAllowed):
                here.fetch(Entry(bytes=1, sha256=sha(b"x")), path)
        assert here.store.list("objects") == []


def test_directories_appear_as_a_whole(node: MakeNode) -> None:
    with node("a").sharing() as here:
        step = here.home / "checkpoints" / "job-1" / "checkpoint-00000002"
        write(step / "state" / "rank-0", b"0")
        write(step / "weights", b"w" * 100)
        here.keep_tree(step)
    with node("b").sharing() as here:
        assert here.trees(step.parent) == [step]
        assert here.bring_tree(step)
        assert (step / "state" / "rank-0").read_bytes() == b"0"
        assert [path.name for path in step.parent.iterdir()] == [step.name]
        assert not here.bring_tree(step.with_name("checkpoint-00000009"))
        here.forget(step.parent)
        assert here.trees(step.parent) == []


def test_a_directory_that_goes_while_it_is_shared_is_not_shared_in_part(
    node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    with node("a").sharing() as here:
        step = write(here.home / "checkpoints" / "job-1" / "checkpoint-2" / "w", b"w").parent
        with monkeypatch.context() as patch:
            # As whoever removes it does: first its name, so that nobody finds a file any more.
            patch.setattr(files, "files_below", lambda path: step.rename(here.home / "gone") and [])
            with pytest.raises(FileNotFoundError):
                here.keep_tree(step)
        assert here.trees(step.parent) == []


def test_locks_that_nobody_holds_are_removed(node: MakeNode) -> None:
    with node("a").sharing() as here, here.hold(here.home / "held") as held:
        with here.hold(here.home / "free"):
            pass
        here.remove_locks(-1)
        assert held
        assert len(list(here.locks.iterdir())) == 1
        with here.hold(here.home / "held", wait=False) as second:
            assert not second


def test_contents_that_become_a_model_while_it_is_looked_stay(
    node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    with node("a").sharing() as here:
        path = write(here.home / JOB / "x", b"shard")
        here.keep([path])
        read = type(here.store).read

        def published(store: ObjectStore, key: str) -> bytes | None:
            if key.startswith("files/"):
                here.models.create("m", b'{"files": [{"sha256": "%s"}]}' % sha(b"shard").encode())
                here.forget(path.parent)
            return read(store, key)

        monkeypatch.setattr(type(here.store), "read", published)
        assert sweep_contents(here, older_than_s=-1) == 0
        assert here.has(sha(b"shard"), 5)


def test_unnamed_contents_go_when_they_are_old(node: MakeNode) -> None:
    with node("a").sharing() as here:
        here.keep([write(here.home / JOB / "x", b"kept")])
        here.keep_tree(write(here.home / "checkpoints" / "job-1" / "checkpoint-1" / "w", b"tree").parent)
        here.models.create("m", b'{"files": [{"sha256": "%s"}]}' % sha(b"model").encode())
        for content in (b"kept", b"tree", b"model", b"unnamed"):
            here.store.write(object_key(sha(content)), content)
        assert sweep_contents(here) == 0
        assert sweep_contents(here, older_than_s=-1) == 1
        assert here.store.read(object_key(sha(b"unnamed"))) is None
        assert len(here.store.list("objects")) == 3
        here.store.write("files/workspaces/job-1/torn", b"{")
        here.store.write(object_key(sha(b"unnamed")), b"unnamed")
        with pytest.raises(CorruptCheckpoint, match="torn"):
            sweep_contents(here, older_than_s=-1)
        assert len(here.store.list("objects")) == 4


def test_workspaces_of_ended_jobs_leave_this_node(node: MakeNode) -> None:
    with node("a").sharing() as here:
        for name in ("job-ended", "job-under-way", "job-held", "job-young"):
            path = write(here.home / "workspaces" / name / "x", b"x")
            if name != "job-young":
                os.utime(path, (1, 1))
                os.utime(path.parent, (1, 1))
            if name == "job-under-way":
                here.keep([path])
        with here.hold(here.home / "workspaces" / "job-held", together=True):
            assert sweep_node(here) == 1
        assert not (here.home / "workspaces" / "job-ended").exists()
        step = write(here.home / "checkpoints" / "job-ended" / "checkpoint-2" / "w", b"w")
        for place in (step, step.parent, step.parent.parent):
            os.utime(place, (1, 1))
        assert sweep_node(here) == 2, "its checkpoints, and the workspace that was held"


def test_what_writers_that_were_killed_left_goes(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/store")
    store.write("objects/ab/x.tmp-file", b"x")
    left = unfinished(tmp_path / "store" / "objects" / "ab" / "x")
    left.write_bytes(b"half")
    assert [row.key for row in store.list("objects")] == ["objects/ab/x.tmp-file"]
    store.remove_unfinished(3600)
    assert left.exists()
    store.remove_unfinished(-1)
    assert not left.exists()
    assert store.read("objects/ab/x.tmp-file") == b"x"


def test_a_large_content_comes_in_parts(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aidocks.storage.remote._PART_BYTES", 1000)
    content = os.urandom(12_345)
    source = write(tmp_path / "source", content)
    store.put("objects/x", source, sha(content), source.stat())
    store.get("objects/x", tmp_path / "target", len(content), sha(content), "target")
    assert (tmp_path / "target").read_bytes() == content
    with pytest.raises(CorruptCheckpoint):
        store.get("objects/x", tmp_path / "no", len(content), sha(b""), "no")
    assert not (tmp_path / "no").exists()


def test_one_of_several_creates(store: ObjectStore) -> None:
    assert [store.create("models/x.json", b"%d" % number) for number in range(3)] == [True, False, False]
    assert store.read("models/x.json") == b"0"
    assert store.create("models/x.json", b"0"), "one's own second try"
    assert [row.key for row in store.list("models")] == ["models/x.json"]
    assert store.look("models/y.json") is None
    store.remove("models/x.json")
    store.remove("models/x.json")
    assert store.list("models") == []


def test_secrets_are_not_shown() -> None:
    assert redacted("sftp://me:secret@host/x?token=abc") == "sftp://…@host/x?…"
    assert redacted("s3://bucket/prefix") == "s3://bucket/prefix"


def test_what_is_wrong_with_a_url_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    for url, kind in (
        ("nothing://x", InvalidSpec),
        ("/mnt/x", InvalidSpec),
        ("gs://bucket/x", MissingExtra),
        (f"file://{tmp_path}/file/x", ServiceUnreachable),
    ):
        settings = Settings(home=tmp_path, storage_url=url)
        said = storage.check(settings)
        assert said, url
        with pytest.raises(kind):
            _write_something(settings)
    assert storage.check(Settings(home=tmp_path)) is None
    assert storage.check(Settings(home=tmp_path, storage_url=f"file://{tmp_path}/fine")) is None
    assert storage.shared(tmp_path) is None


def _write_something(settings: Settings) -> None:
    here = storage.open_shared(settings)
    assert here is not None
    here.store.write("x", b"")
