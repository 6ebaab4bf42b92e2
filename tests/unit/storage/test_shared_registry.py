"""The registry and the data sets as several nodes see them, and what is left when a node dies in between."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from aidocks import storage
from aidocks.checkpoints.files import UNFINISHED, write_bytes
from aidocks.datasets.store import DatasetStore
from aidocks.errors import Conflict, CorruptCheckpoint, NameTaken, NotFound, UnknownModel
from aidocks.models.manifest import MANIFEST_FILE, Manifest, ManifestFile
from aidocks.models.registry import Registry
from aidocks.models.resolve import ModelResolver
from aidocks.settings import Settings
from aidocks.storage import models as shared_models
from aidocks.storage.catalogue import Catalogue
from aidocks.storage.disk import DirectoryStore
from aidocks.storage.objects import ObjectStore
from aidocks.storage.remote import RemoteStore
from tests.unit.storage.conftest import MakeNode, Node

FILES = {"model.safetensors": b"w" * 5000, "config.json": b"{}", "report/scan.json": b"[]"}


def stage(
    settings: Settings, files: dict[str, bytes], name: str = "m", job: str = "job-1"
) -> tuple[Path, Manifest]:
    """Write what a job would: files in its workspace, and what it knows of them."""
    staged = settings.workspaces_dir / job / "model"
    listed = []
    for relative, content in files.items():
        written = write_bytes(staged / relative, content)
        listed.append(ManifestFile(path=relative, bytes=written.bytes, sha256=written.sha256))
    manifest = Manifest(
        name=name, created_at=datetime.now(UTC), operation="laser", job_id=job, spec={}, code_version="1",
        files=tuple(listed),
    )  # fmt: skip
    return staged, manifest


def publish(settings: Settings, files: dict[str, bytes], name: str = "m", job: str = "job-1") -> None:
    Registry(settings.models_dir).publish(*stage(settings, files, name, job))


def read(directory: Path) -> dict[str, bytes]:
    found = {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    return {name: content for name, content in found.items() if name not in (MANIFEST_FILE, "README.md")}


def test_a_model_is_seen_listed_and_brought_by_other_nodes(node: MakeNode) -> None:
    with node("a").at_work() as settings:
        publish(settings, FILES)
        assert Registry(settings.models_dir).bring("m") == settings.models_dir / "m"
        assert read(settings.models_dir / "m") == FILES
    with node("b").at_work() as settings:
        registry = Registry(settings.models_dir)
        assert registry.names() == ["m"]
        assert registry.exists("m")
        assert registry.list()[0].path == settings.models_dir / "m"
        assert registry.manifest("m").job_id == "job-1"
        assert registry.path("m") == settings.models_dir / "m"
        assert not (settings.models_dir / "m").exists(), "nothing is brought before it is needed"
        assert registry.file("m", "config.json").read_bytes() == b"{}"
        assert registry.file("m", MANIFEST_FILE).stat().st_size > 0
        assert not (settings.models_dir / "m" / "model.safetensors").exists()
        with pytest.raises(NotFound):
            registry.file("m", "nothing.json")
        resolved = ModelResolver(settings.models_dir, ()).resolve("m")
        assert read(resolved.path) == FILES
        brought = (resolved.path / "model.safetensors").stat()
        registry.bring("m")
        assert (resolved.path / "model.safetensors").stat().st_ino == brought.st_ino
        with pytest.raises(UnknownModel):
            registry.path("other")
        with pytest.raises(NameTaken):
            publish(settings, FILES, job="job-2")


def test_a_list_of_models_is_one_request(
    node: MakeNode, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with node("a").at_work() as settings:
        for number in range(3):
            publish(settings, FILES, f"m{number}", f"job-{number}")
    asked: list[str] = []
    for name in ("look", "list", "read"):
        call = getattr(type(store), name)
        monkeypatch.setattr(
            type(store), name, lambda *given, _name=name, _call=call: asked.append(_name) or _call(*given)
        )
    with node("b").at_work() as settings:
        assert len(Registry(settings.models_dir).list()) == 3
        assert asked == ["list", "read", "read", "read"]
        shared = storage.shared(settings.models_dir)
        assert shared is not None
        shared.models._listed = None  # some time later
        monkeypatch.setattr(shared.models, "_documents", {
            name: (0.0, *known[1:]) for name, known in shared.models._documents.items()
        })  # fmt: skip
        assert len(Registry(settings.models_dir).list()) == 3
        assert asked[4:] == ["list"]


def test_a_model_made_anew_under_the_same_name_is_another(
    node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aidocks.storage.catalogue.FRESH_S", 0.0)
    a, b = node("a"), node("b")
    with a.at_work() as settings:
        publish(settings, FILES | {"old.json": b"1"})
    with b.at_work() as settings:
        Registry(settings.models_dir).bring("m")
        Registry(settings.models_dir).delete("m")
        assert not (settings.models_dir / "m").exists()
        publish(settings, {"model.safetensors": b"v" * 5000, "config.json": b"{}"}, job="job-2")
    with a.at_work() as settings:
        found = Registry(settings.models_dir).bring("m")
        assert read(found) == {"model.safetensors": b"v" * 5000, "config.json": b"{}"}
        Registry(settings.models_dir).delete("m")
        assert Registry(settings.models_dir).names() == []
        with pytest.raises(UnknownModel):
            Registry(settings.models_dir).delete("m")


def test_shards_of_other_nodes_need_not_be_brought_to_be_published(node: MakeNode) -> None:
    a, b = node("a"), node("b")
    with a.sharing() as here:
        staged, _ = stage(Settings(), {"shard-1.safetensors": b"1" * 4000, "report/extra.json": b"{}"})
        here.keep([staged / "shard-1.safetensors", staged / "report" / "extra.json"])
    with b.at_work() as settings:
        _, full = stage(settings, {"shard-1.safetensors": b"1" * 4000, "shard-2.safetensors": b"2" * 4000})
        (staged / "shard-1.safetensors").unlink()
        Registry(settings.models_dir).publish(staged, full)
        assert not (settings.models_dir / "m" / "shard-1.safetensors").exists()
        assert sorted(file.path for file in Registry(settings.models_dir).manifest("m").files) == [
            "README.md", "report/extra.json", "shard-1.safetensors", "shard-2.safetensors",
        ]  # fmt: skip
        assert (Registry(settings.models_dir).bring("m") / "shard-1.safetensors").read_bytes() == b"1" * 4000
    with a.at_work() as settings:
        assert set(read(Registry(settings.models_dir).bring("m"))) >= {
            "shard-1.safetensors",
            "shard-2.safetensors",
        }


def test_a_shard_that_nobody_has_cannot_be_published(node: MakeNode) -> None:
    with node("a").at_work() as settings:
        staged, manifest = stage(settings, FILES)
        (staged / "model.safetensors").unlink()
        with pytest.raises(AssertionError):
            Registry(settings.models_dir).publish(staged, manifest)
        assert Registry(settings.models_dir).names() == []


def test_models_and_data_sets_of_the_time_before_are_not_touched(node: MakeNode, tmp_path: Path) -> None:
    with node("a").at_work() as settings:
        write_bytes(settings.models_dir / "m" / "config.json", b"precious")
        write_bytes(settings.datasets_dir / "d" / "data.jsonl", b"precious")
        (tmp_path / "x.jsonl").write_text('{"text": "new"}\n')
        with pytest.raises(Conflict, match="before the storage was shared"):
            publish(settings, FILES)
        with pytest.raises(Conflict, match="before the storage was shared"):
            DatasetStore.of(settings).add(tmp_path / "x.jsonl", "d")
    with node("b").at_work() as settings:
        publish(settings, FILES)
        DatasetStore.of(settings).add(tmp_path / "x.jsonl", "d")
    with Node(settings.home, tmp_path / "c", settings.storage_url or "").at_work() as settings:
        write_bytes(settings.models_dir / "m" / "config.json", b"precious")
        write_bytes(settings.datasets_dir / "d" / "data.jsonl", b"precious")
        for bring in (
            lambda: Registry(settings.models_dir).bring("m"),
            lambda: DatasetStore.of(settings).fetch("d"),
        ):
            with pytest.raises(Conflict):
                bring()
        Registry(settings.models_dir).delete("m")
        DatasetStore.of(settings).delete("d")
        assert (settings.models_dir / "m" / "config.json").read_bytes() == b"precious"
        assert (settings.datasets_dir / "d" / "data.jsonl").read_bytes() == b"precious"


def test_data_sets_are_seen_and_brought_by_other_nodes(node: MakeNode, tmp_path: Path) -> None:
    source = tmp_path / "lessons.jsonl"
    source.write_text('{"text": "one"}\n')
    with node("a").at_work() as settings:
        made = DatasetStore(settings.datasets_dir, 1000, 30).add(source, "lessons")
        assert made.path.read_bytes() == source.read_bytes()
    with node("b").at_work() as settings:
        store = DatasetStore(settings.datasets_dir, 1000, 30)
        assert store.names() == ["lessons"]
        assert store.resolve(made.id) == store.get("lessons") == made
        assert not made.path.exists()
        assert store.fetch("lessons").path.read_bytes() == source.read_bytes()
        with pytest.raises(NameTaken):
            store.add(source, "lessons")
        with pytest.raises(OSError, match="free"):
            store.add(source, "more")
        store.delete("lessons")
        assert store.names() == []
        source.write_text('{"text": "two"}\n')
        store.add(source, "lessons")
    with Node(settings.home, tmp_path / "c", settings.storage_url or "").at_work() as settings:
        assert DatasetStore.of(settings).fetch("lessons").path.read_bytes() == source.read_bytes()


def test_models_that_nobody_uses_make_room(node: MakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    with node("a").at_work() as settings:
        for number in range(4):
            publish(settings, {"model.safetensors": b"%d" % number * 5000}, f"m{number}", f"job-{number}")
    with node("b").sharing() as here:
        models = shared_models.SharedModels(here, settings.models_dir)
        for number in range(3):
            models.bring(f"m{number}")
            os.utime(settings.models_dir / ".brought" / f"m{number}.json", (number, number))
        free = [1 << 20]
        monkeypatch.setattr(shared_models, "_BESIDE_BYTES", 0)
        monkeypatch.setattr(
            shared_models.shutil, "disk_usage", lambda _: _Usage(free.pop(0) if free else 1 << 40)
        )
        free[:] = [0, 0]
        with models.in_use("m0"):
            models.bring("m3")
        left = sorted(path.name for path in settings.models_dir.iterdir() if not path.name.startswith("."))
        assert left == ["m0", "m2", "m3"], "m0 is in use, m1 was used longest ago of the others"
        assert read(models.bring("m1")) == {"model.safetensors": b"1" * 5000}


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free


class Killed(BaseException):
    """The process is gone."""


@contextmanager
def killed_before(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """End everything before the so-manieth change of disk or storage; the list tells of those that happened."""
    done: list[str] = []

    def dying(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*args: Any, **kwargs: Any) -> Any:
            if len(done) >= step:
                raise Killed
            done.append(name)
            return call(*args, **kwargs)

        return instead

    with monkeypatch.context() as patch:
        writes = ("write", "put", "touch")
        for kind, names in (
            (DirectoryStore, writes),
            (RemoteStore, writes),
            (Catalogue, ("create", "remove")),
        ):
            for name in names:
                patch.setattr(kind, name, dying(name, getattr(kind, name)))
        for name in ("rename", "replace", "unlink", "utime"):
            patch.setattr(os, name, dying(name, getattr(os, name)))
        try:
            yield done
        except Killed:
            done.append("killed")


def test_whenever_publication_is_cut_off_there_is_all_or_nothing(
    node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = node("a"), node("b")
    for step in range(200):
        with a.at_work() as settings:
            staged, manifest = stage(settings, FILES, job=f"job-{step}")
            with killed_before(step, monkeypatch) as done:
                Registry(settings.models_dir).publish(staged, manifest)
        with b.at_work() as settings:
            registry = Registry(settings.models_dir)
            if registry.exists("m"):
                assert read(registry.bring("m")) == FILES
        with a.at_work() as settings:
            # The job goes on, and runs units again whose files are gone.
            if not Registry(settings.models_dir).exists("m"):
                staged, manifest = stage(settings, FILES, job=f"job-{step}")
            Registry(settings.models_dir).publish(staged, manifest)
            assert read(Registry(settings.models_dir).bring("m")) == FILES
            Registry(settings.models_dir).delete("m")
        if done[-1] != "killed":
            break
    assert step > 5
    assert done[-1] != "killed"


def test_whenever_bringing_is_cut_off_it_can_be_done_again(
    node: MakeNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "one"}\n')
    with node("a").at_work() as settings:
        publish(settings, FILES)
        DatasetStore.of(settings).add(tmp_path / "d.jsonl", "d")
    for step in range(200):
        with node(f"b{step}").at_work() as settings:
            with killed_before(step, monkeypatch) as done:
                Registry(settings.models_dir).bring("m")
                DatasetStore.of(settings).fetch("d")
            for path in (settings.models_dir / "m").rglob("*"):
                relative = path.relative_to(settings.models_dir / "m").as_posix()
                if relative in FILES:
                    assert path.read_bytes() == FILES[relative]
            assert read(Registry(settings.models_dir).bring("m")) == FILES
            assert not list((settings.models_dir / "m").rglob(f"*{UNFINISHED}*"))
            fetched = DatasetStore.of(settings).fetch("d")
            assert fetched.path.read_bytes() == (tmp_path / "d.jsonl").read_bytes()
        if done[-1] != "killed":
            break
    assert step > 5
    assert done[-1] != "killed"


def test_a_manifest_that_leads_out_is_refused(node: MakeNode, store: ObjectStore) -> None:
    with node("a").at_work() as settings:
        publish(settings, FILES)
        document = store.read("models/m.json")
        assert document is not None
        store.write("models/m.json", document.replace(b"config.json", b"../../../evil"))
    with node("b").at_work() as settings:
        for ask in (Registry(settings.models_dir).bring, Registry(settings.models_dir).manifest):
            with pytest.raises(CorruptCheckpoint):
                ask("m")
