"""Publication is all or nothing, once per job, one winner per name; listings survive whatever lies around."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from aidocks.checkpoints.reader import Checkpoint
from aidocks.errors import (
    AIDocksError,
    CorruptCheckpoint,
    NameTaken,
    NotFound,
    PathNotAllowed,
    UnknownModel,
    UnsafeCheckpoint,
)
from aidocks.models import registry as registry_module
from aidocks.models.registry import Manifest, ManifestFile, Parent, Registry


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "models")


def manifest(name: str = "m", job_id: str = "job-1", **more: Any) -> Manifest:
    now = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
    return Manifest(
        name=name, created_at=now, operation="laser", job_id=job_id, spec={"a": 1}, code_version="1", **more
    )


def stage(directory: Path, content: str = "weights") -> Path:
    (directory / "report").mkdir(parents=True)
    (directory / "model.safetensors").write_text(content)
    (directory / "report" / "scan.png").write_text("picture")
    return directory


def snapshot(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_publication_moves_completes_and_describes(registry: Registry, tmp_path: Path) -> None:
    staged = stage(tmp_path / "work" / "model")
    path = registry.publish(staged, manifest(metrics={"perplexity": 3.25}, parameters=10))
    assert path == tmp_path / "models" / "m"
    assert not staged.exists()
    files = snapshot(path)
    assert set(files) == {"model.safetensors", "report/scan.png", "README.md", "aidocks.json"}
    found = registry.manifest("m")
    assert {f.path: (f.bytes, f.sha256) for f in found.files} == {
        name: (len(content), hashlib.sha256(content).hexdigest())
        for name, content in files.items()
        if name != "aidocks.json"
    }
    assert found.bytes == sum(len(files[file.path]) for file in found.files)
    assert found.metrics == {"perplexity": 3.25}
    info = registry.get("m")
    assert (info.name, info.path, info.operation, info.parameters) == ("m", path, "laser", 10)
    assert registry.names() == ["m"]
    assert registry.list() == [info]
    assert registry.exists("m")
    assert json.loads((path / "aidocks.json").read_text())["schema_version"] == 1


def test_what_a_killed_writer_left_is_not_published(registry: Registry, tmp_path: Path) -> None:
    staged = stage(tmp_path / "work")
    (staged / "model.safetensors.tmp-abc").write_text("half")
    (staged / "aidocks.json").write_text("old")
    (staged / "README.md").write_text("old")
    registry.publish(staged, manifest())
    assert "model.safetensors.tmp-abc" not in snapshot(registry.path("m"))
    assert registry.manifest("m").name == "m"
    assert "# m" in registry.file("m", "README.md").read_text()


def test_a_manifest_that_contradicts_the_files_is_our_mistake(registry: Registry, tmp_path: Path) -> None:
    wrong_size = ManifestFile(path="model.safetensors", bytes=3, sha256="0")
    with pytest.raises(AssertionError, match=r"model\.safetensors has 7 bytes"):
        registry.publish(stage(tmp_path / "a"), manifest(files=(wrong_size,)))
    missing = ManifestFile(path="gone", bytes=3, sha256="0")
    with pytest.raises(AssertionError, match="not staged: gone"):
        registry.publish(stage(tmp_path / "b"), manifest(files=(missing,)))
    assert registry.names() == []


def test_the_same_job_may_publish_again(registry: Registry, tmp_path: Path) -> None:
    first = registry.publish(stage(tmp_path / "one"), manifest())
    before = snapshot(first)
    assert registry.publish(tmp_path / "gone", manifest()) == first
    assert registry.publish(stage(tmp_path / "again", "other"), manifest()) == first
    assert snapshot(first) == before


def test_another_job_may_not(registry: Registry, tmp_path: Path) -> None:
    registry.publish(stage(tmp_path / "one"), manifest())
    before = snapshot(registry.path("m"))
    other = stage(tmp_path / "two", "other")
    with pytest.raises(NameTaken, match="'m'") as caught:
        registry.publish(other, manifest(job_id="job-2"))
    assert "aidocks models delete m" in (caught.value.hint or "")
    assert snapshot(registry.path("m")) == before
    assert (other / "model.safetensors").read_text() == "other"


@pytest.mark.parametrize("occupant", ["directory", "file", "broken manifest", "dangling link"])
def test_a_name_that_is_occupied_by_anything_is_taken(
    registry: Registry, tmp_path: Path, occupant: str
) -> None:
    target = tmp_path / "models" / "m"
    target.parent.mkdir()
    if occupant == "file":
        target.write_text("x")
    elif occupant == "dangling link":
        target.symlink_to(tmp_path / "nowhere")
    else:
        target.mkdir()
        (target / ("aidocks.json" if occupant == "broken manifest" else "x")).write_text("{")
    assert registry.exists("m")
    with pytest.raises(NameTaken):
        registry.publish(stage(tmp_path / "work"), manifest())


def test_of_many_concurrent_publishers_exactly_one_wins(registry: Registry, tmp_path: Path) -> None:
    count, outcomes = 8, []
    staged = [stage(tmp_path / f"work{i}", f"weights of {i}") for i in range(count)]
    gate = threading.Barrier(count)

    def publish(number: int) -> None:
        gate.wait()
        try:
            Registry(tmp_path / "models").publish(staged[number], manifest(job_id=f"job-{number}"))
            outcomes.append(number)
        except NameTaken:
            outcomes.append(None)

    threads = [threading.Thread(target=publish, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [outcome for outcome in outcomes if outcome is not None]
    assert len(outcomes) == count
    assert registry.manifest("m").job_id == f"job-{winner}"
    assert registry.file("m", "model.safetensors").read_text() == f"weights of {winner}"


def test_two_attempts_at_one_job_both_succeed(registry: Registry, tmp_path: Path) -> None:
    staged, gate, outcomes = stage(tmp_path / "work"), threading.Barrier(2), []

    def publish() -> None:
        gate.wait()
        outcomes.append(Registry(tmp_path / "models").publish(staged, manifest()))

    threads = [threading.Thread(target=publish) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [tmp_path / "models" / "m"] * 2


KILLED = """
import os, signal, sys
from datetime import UTC, datetime
from pathlib import Path
from aidocks.models.registry import Manifest, Registry
calls, real = {calls}, {function}
def killing(*arguments, **named):
    global calls
    calls -= 1
    if calls == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    result = real(*arguments, **named)
    if calls == {after}:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
{function} = killing
manifest = Manifest(
    name="m", created_at=datetime.now(UTC), operation="laser", job_id="job-1", spec={{}}, code_version="1"
)
Registry(Path(sys.argv[1])).publish(Path(sys.argv[2]), manifest)
"""


@pytest.mark.parametrize("function", ["os.rename", "os.replace", "os.fsync"])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_killed_anywhere_the_model_is_absent_or_whole(
    registry: Registry, tmp_path: Path, function: str, call: int
) -> None:
    staged = stage(tmp_path / "work")
    code = KILLED.format(function=function, calls=call, after=call - 1 if function == "os.rename" else -9)
    subprocess.run([sys.executable, "-c", code, tmp_path / "models", staged], check=False)
    if registry.exists("m"):
        assert set(snapshot(registry.path("m"))) >= {"model.safetensors", "README.md", "aidocks.json"}
        assert registry.manifest("m").job_id == "job-1"
    else:
        assert (staged / "model.safetensors").read_text() == "weights"
    registry.publish(staged, manifest())
    assert registry.file("m", "model.safetensors").read_text() == "weights"
    assert not [name for name in snapshot(registry.path("m")) if ".tmp-" in name]


def test_a_kill_after_the_rename_is_recognised(registry: Registry, tmp_path: Path) -> None:
    staged = stage(tmp_path / "work")
    code = KILLED.format(function="os.rename", calls=2, after=1)
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "models", staged], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not staged.exists()
    assert registry.publish(staged, manifest()) == registry.path("m")


def test_a_workspace_on_another_disk(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, staged = os.rename, stage(tmp_path / "work")

    def rename(source: Path, target: Path) -> None:
        if Path(source) == staged:
            raise OSError(errno.EXDEV, "another disk")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    registry.publish(staged, manifest())
    assert registry.file("m", "report/scan.png").read_text() == "picture"
    assert not staged.exists()
    assert not list((tmp_path / "models" / ".staging").iterdir())


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "a/b", "../m", "a b", "m\n", "ü", "a" * 97, "-m", "m\0"]
)
def test_names_that_are_no_names(registry: Registry, tmp_path: Path, name: str) -> None:
    assert not registry.exists(name)
    with pytest.raises(UnknownModel):
        registry.get(name)
    with pytest.raises(UnknownModel):
        registry.delete(name)
    with pytest.raises(PathNotAllowed):
        registry.publish(stage(tmp_path / "work"), manifest().model_copy(update={"name": name}))
    with pytest.raises(PathNotAllowed):
        registry.import_checkpoint(name, tmp_path / "work")
    assert not list(tmp_path.rglob("aidocks.json"))


def test_unknown_names_list_similar_ones(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match="registry is empty"):
        registry.get("smollm2")
    for name in ("smollm2-base", "smollm2-laser", "other"):
        registry.publish(stage(tmp_path / f"work-{name}"), manifest(name))
    with pytest.raises(UnknownModel, match="Did you mean smollm2-base, smollm2-laser"):
        registry.get("smollm2-bass")
    with pytest.raises(UnknownModel, match="The registry holds other, smollm2-base"):
        registry.get("zzzzzzz")


@pytest.mark.parametrize("damage", [None, b"", b"{", b"[]", b'{"name": "bad"}', b"\xff"])
def test_a_broken_manifest_is_skipped_in_listings_and_explained_on_request(
    registry: Registry, tmp_path: Path, damage: bytes | None
) -> None:
    registry.publish(stage(tmp_path / "good"), manifest("good"))
    bad = stage(tmp_path / "models" / "bad")
    if damage is not None:
        (bad / "aidocks.json").write_bytes(damage)
    (tmp_path / "models" / "stray.txt").write_text("x")
    (tmp_path / "models" / ".hidden").mkdir()
    assert [info.name for info in registry.list()] == ["good"]
    for ask in (registry.get, registry.manifest):
        with pytest.raises(CorruptCheckpoint, match="aidocks models delete bad") as caught:
            ask("bad")
        assert "'bad'" in caught.value.message
    registry.delete("bad")
    assert not registry.exists("bad")


def test_listing_a_thousand_models_is_fast(registry: Registry, tmp_path: Path) -> None:
    text = manifest(metrics={f"m{i}": {"delta": 0.5, "z": -3.0} for i in range(100)}).model_dump_json()
    for number in range(1000):
        directory = tmp_path / "models" / f"m{number}"
        directory.mkdir(parents=True)
        (directory / "aidocks.json").write_text(text)
    begin = time.perf_counter()
    assert len(registry.list()) == 1000
    assert time.perf_counter() - begin < 5


def test_deleting(registry: Registry, tmp_path: Path) -> None:
    registry.publish(stage(tmp_path / "work"), manifest())
    registry.delete("m")
    assert not registry.exists("m")
    assert registry.names() == []
    assert not list((tmp_path / "models" / ".trash").iterdir())
    with pytest.raises(UnknownModel):
        registry.delete("m")
    registry.publish(stage(tmp_path / "work"), manifest(job_id="job-2"))
    assert registry.manifest("m").job_id == "job-2"


def test_deleting_a_link_leaves_its_target(registry: Registry, tmp_path: Path) -> None:
    target = stage(tmp_path / "elsewhere")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "m").symlink_to(target)
    registry.delete("m")
    assert not registry.exists("m")
    assert (target / "model.safetensors").is_file()


def test_a_deletion_that_was_killed_is_finished_by_the_sweep(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.publish(stage(tmp_path / "work"), manifest())
    with monkeypatch.context() as patch:
        patch.setattr(registry_module, "remove_tree", lambda path: None)
        registry.delete("m")
    assert not registry.exists("m")
    young, old = stage(tmp_path / "models" / ".staging" / "a"), stage(tmp_path / "models" / ".staging" / "b")
    os.utime(old, (1, 1))
    registry.sweep_trash()
    assert not list((tmp_path / "models" / ".trash").iterdir())
    assert young.exists()
    assert not old.exists()


def test_sweeping_before_there_is_anything(registry: Registry) -> None:
    registry.sweep_trash()
    assert registry.names() == []


def test_files_of_a_model(registry: Registry, tmp_path: Path) -> None:
    registry.publish(stage(tmp_path / "work"), manifest())
    assert registry.file("m", "report/scan.png").read_text() == "picture"
    for missing in ("nothing", "report", "", ".", "report/", "model.safetensors/x", ".hidden", "a.tmp-1"):
        with pytest.raises(NotFound):
            registry.file("m", missing)
    with pytest.raises(UnknownModel):
        registry.file("other", "model.safetensors")


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("shard", ["5GB", "300KB"])
def test_importing_a_checkpoint(
    registry: Registry, tmp_path: Path, tiny_llama: Callable[..., Path], copy: bool, shard: str
) -> None:
    source = tiny_llama(tmp_path / "source", max_shard_size=shard)
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Source\n")
    (source / "pytorch_model.bin").write_text("pickle")
    info = registry.import_checkpoint("tiny", source, copy=copy)
    expected, found = Checkpoint(source), Checkpoint(info.path)
    assert all(torch.equal(found.tensor(name), expected.tensor(name)) for name in expected.entries)
    assert {p.name for p in found.metadata_files()} == {p.name for p in expected.metadata_files()}
    assert not (info.path / "pytorch_model.bin").exists()
    assert info.architecture == "LlamaForCausalLM"
    assert info.dtype == "F32"
    assert info.parameters == sum(entry.numel for entry in expected.entries.values())
    (parent,) = registry.manifest("tiny").parents
    assert parent.license == "apache-2.0"
    assert parent.content_hash == expected.content_hash(tmp_path / "cache-1")
    assert found.content_hash(tmp_path / "cache-2") == parent.content_hash
    linked = (source / "config.json").stat().st_ino == (info.path / "config.json").stat().st_ino
    assert linked is not copy
    assert (
        str(tmp_path) not in (info.path / "aidocks.json").read_text() + (info.path / "README.md").read_text()
    )
    with pytest.raises(NameTaken):
        registry.import_checkpoint("tiny", source)


def test_hashes_of_published_weights_need_no_second_reading(
    registry: Registry, tmp_path: Path, tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from aidocks.checkpoints import hashes

    info = registry.import_checkpoint("tiny", tiny_llama(tmp_path / "source"))
    monkeypatch.setattr(hashes, "hash_file", lambda path: pytest.fail(f"read {path} again"))
    assert Checkpoint(info.path).content_hash(tmp_path / "cache")


@pytest.mark.parametrize("flaw", ["pickle", "cut", "nothing"])
def test_what_is_not_sound_is_not_imported(
    registry: Registry, tmp_path: Path, tiny_llama: Callable[..., Path], flaw: str
) -> None:
    source = tiny_llama(tmp_path / "source")
    weights = source / "model.safetensors"
    if flaw == "pickle":
        weights.rename(source / "pytorch_model.bin")
    elif flaw == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    else:
        shutil.rmtree(source)
    kinds = {"pickle": UnsafeCheckpoint, "cut": CorruptCheckpoint, "nothing": UnknownModel}
    with pytest.raises(kinds[flaw]):
        registry.import_checkpoint("tiny", source)
    assert registry.names() == []
    assert not list(tmp_path.glob("models/.staging/*"))


def test_an_import_that_fails_half_way_leaves_nothing(
    registry: Registry, tmp_path: Path, tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from aidocks.errors import InsufficientDisk
    from aidocks.models import importing

    source, real = tiny_llama(tmp_path / "source"), importing.copy_file

    def copy_file(source: Path, target: Path) -> Any:
        if source.suffix == ".safetensors":
            raise InsufficientDisk("full")
        return real(source, target)

    monkeypatch.setattr(importing, "copy_file", copy_file)
    with pytest.raises(AIDocksError, match="full"):
        registry.import_checkpoint("tiny", source)
    assert registry.names() == []
    assert not list(tmp_path.glob("models/.staging/*"))


def test_a_child_inherits_the_licence_of_its_parent(registry: Registry, tmp_path: Path) -> None:
    parent = Parent(field="source", reference="x", content_hash="0", path_name="x", license="mit")
    registry.publish(stage(tmp_path / "one"), manifest("base", parents=(parent,)))
    child = Parent(field="base_model_name", reference="base", content_hash="1", path_name="base")
    registry.publish(stage(tmp_path / "two"), manifest("child", job_id="job-2", parents=(child,)))
    assert registry.manifest("child").parents[0].license == "mit"
    assert "license: mit" in registry.file("child", "README.md").read_text()
