"""Storage on S3 as its clients speak it: real HTTP to a server on loopback."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from aidocks import storage
from aidocks.errors import ServiceUnreachable
from aidocks.executor import run_unit
from aidocks.models.manifest import ManifestFile
from aidocks.models.registry import Registry
from aidocks.plan import UnitContext
from aidocks.settings import Settings
from aidocks.storage.objects import open_store
from aidocks.storage.remote import RemoteStore
from tests.conftest import free_port
from tests.support.s3 import SECRET, s3_bucket
from tests.unit.storage.conftest import Node
from tests.unit.storage.test_shared_registry import FILES, publish, read, stage
from tests.unit.storage.test_units import LARGE, Look, Write, run


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket() as (url, _):
        yield url


@pytest.fixture
def url(bucket: str, request: pytest.FixtureRequest) -> str:
    return f"{bucket}/{request.node.name}"


def test_a_model_goes_from_one_node_to_another(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "aidocks")
    home = tmp_path / "home"
    monkeypatch.setenv("AIDOCKS_HOME", str(home))
    monkeypatch.setenv("AIDOCKS_STORAGE_URL", url)
    with Node(home, tmp_path / "a", url).at_work() as settings:
        publish(settings, FILES)
    with Node(home, tmp_path / "b", url).at_work() as settings:
        registry = Registry(settings.models_dir)
        assert registry.names() == ["m"]
        assert read(registry.bring("m")) == FILES
        registry.delete("m")
        assert Registry(settings.models_dir).names() == []
        assert storage.check(settings) is None
    assert SECRET not in caplog.text


def test_a_job_of_two_nodes_becomes_a_model(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("AIDOCKS_HOME", str(home))
    monkeypatch.setenv("AIDOCKS_STORAGE_URL", url)
    with Node(home, tmp_path / "a", url).at_work() as settings:
        publish(settings, FILES, job="job-0")
        workspace = settings.workspaces_dir / "job-1"
        workspace.mkdir(parents=True)
        shard = Write(directory=workspace / "model", name="model.safetensors", content=LARGE)
        (file,) = run_unit(shard, UnitContext(workspace), "worker-1").result.files
    with Node(home, tmp_path / "b", url).at_work() as settings:
        assert "config.json" in run(Look(places=(settings.models_dir / "m",)), workspace)
        manifest = stage(settings, {"config.json": b"{}"}, "made")[1]
        listed = ManifestFile(path="model.safetensors", bytes=file.bytes, sha256=file.sha256)
        manifest = manifest.model_copy(update={"files": (*manifest.files, listed)})
        Registry(settings.models_dir).publish(workspace / "model", manifest)
        assert not file.path.exists(), "what the other node wrote is named, not moved"
        storage.forget(workspace)
        assert read(Registry(settings.models_dir).bring("made")) == {
            "config.json": b"{}",
            "model.safetensors": LARGE,
        }
        models = storage.shared(settings.models_dir)
        assert models is not None
        (row, _) = models.store.list("models")
        assert models.store.look(row.key) == row, "a listing and a look agree"


def test_one_of_several_creates_at_the_same_time(url: str) -> None:
    store = open_store(url)
    made: list[int] = []
    start = threading.Barrier(3)

    def create(number: int) -> None:
        start.wait()
        if store.create("models/x.json", b"%d" % number):
            made.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.read("models/x.json") == b"%d" % made[0]
    assert len(made) == 1


def test_large_contents_go_in_parts(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aidocks.storage.remote._PART_BYTES", 1 << 20)
    content = os.urandom((9 << 20) + 5)
    (tmp_path / "source").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    store = open_store(url)
    store.put("objects/x", tmp_path / "source", digest, (tmp_path / "source").stat())
    store.get("objects/x", tmp_path / "target", len(content), digest, "target")
    assert (tmp_path / "target").read_bytes() == content
    (row,) = store.list("objects")
    assert row.size == len(content)
    assert row.changed_s > 1e9
    store.write("objects/y", b"y")
    store.remove_all("objects")
    assert store.list("objects") == []


def test_strange_names_are_names(url: str) -> None:
    store = open_store(url)
    for name in ("files/a%3FversionId=1", "files/b%2A%5B0%5D", "files/c+d@e"):
        store.write(name, name.encode())
        assert store.read(name) == name.encode()
    assert len(store.list("files")) == 3


def test_a_storage_that_does_not_answer_is_said_to(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = Settings(home=tmp_path, storage_url="s3://no-such-bucket-anywhere/x")
    said = storage.check(gone)
    assert said is not None
    assert "s3://no-such-bucket-anywhere/x does not answer" in said
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    store = RemoteStore(f"{bucket}/nobody")
    import s3fs

    store._fs = s3fs.S3FileSystem(skip_instance_cache=True, config_kwargs={"retries": {"max_attempts": 1}})
    monkeypatch.setattr(store._fs, "retries", 1)
    with pytest.raises(ServiceUnreachable, match="could not read 'models/x'") as refused:
        store.read("models/x")
    assert refused.value.retryable
    assert SECRET not in str(refused.value)
