"""Units of one job that run on nodes without a common file system."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import BaseModel, ConfigDict, Field

from aidocks import storage
from aidocks.checkpoints.files import hash_file, unfinished, write_bytes
from aidocks.executor import run_unit
from aidocks.models.registry import Registry
from aidocks.plan import Unit, UnitContext, WritingUnit, WrittenFiles
from aidocks.storage.checkpoints import bring_checkpoints, has_begun, sharing_checkpoints
from aidocks.storage.files import Entry, files_below
from tests.unit.storage.conftest import MakeNode
from tests.unit.storage.test_shared_registry import FILES, publish

LARGE = b"l" * (2 << 20)


class Write(WritingUnit):
    directory: Path
    name: str
    content: bytes = b"small"

    @property
    def label(self) -> str:
        return self.name

    @property
    def computes(self) -> bool:
        return False

    def run(self, context: UnitContext) -> WrittenFiles:
        unfinished(context.workspace / "half").write_bytes(b"half")
        (context.workspace / "beside.txt").write_text("not in the result")
        return WrittenFiles(files=(write_bytes(self.directory / self.name, self.content),))


class Found(BaseModel):
    model_config = ConfigDict(frozen=True)
    files: dict[str, str]


class Look(Unit[Found]):
    result_type: ClassVar[type[BaseModel]] = Found
    places: tuple[Path, ...] = ()
    named: dict[str, Path] = Field(default_factory=dict)

    @property
    def label(self) -> str:
        return "look"

    @property
    def computes(self) -> bool:
        return False

    def run(self, context: UnitContext) -> Found:
        roots = (context.workspace, *self.places)
        paths = [path for root in roots for path in files_below(root)]
        return Found(files={path.name: hash_file(path) for path in paths})


def run(unit: Unit[Found], workspace: Path) -> set[str]:
    workspace.mkdir(parents=True, exist_ok=True)
    return set(run_unit(unit, UnitContext(workspace), "worker-1").result.model_dump()["files"])


def test_units_find_what_others_wrote_elsewhere(node: MakeNode) -> None:
    a, b = node("a"), node("b")
    with a.at_work() as settings:
        workspace = settings.workspaces_dir / "job-1"
        workspace.mkdir(parents=True)
        context = UnitContext(workspace)
        publish(settings, FILES, job="job-0")
        write = (
            Write(directory=workspace / "bases", name="basis", content=LARGE),
            Write(directory=workspace / "model", name="shard", content=LARGE + b"1"),
            Write(directory=workspace / "model", name="config.json"),
            Write(directory=settings.cache_dir / "scans" / "s1", name="list.yaml"),
        )
        (outcome,) = [run_unit(unit, context, "worker-1") for unit in write][1:2]
    shard = outcome.result.files[0]
    with b.at_work():
        beside = {"basis", "config.json", "beside.txt"}
        assert run(Look(), workspace) == beside
        # Whoever writes beside the large ones does not need them.
        run_unit(Write(directory=workspace / "model", name="card.md"), UnitContext(workspace), "worker-2")
        assert not (workspace / "model" / "shard").exists()
        assert storage.is_kept(shard.path, shard.bytes, shard.sha256)
        assert not storage.is_kept(shard.path, shard.bytes, "0" * 64)
        sizes = {"shard": len(LARGE) + 1, "config.json": 5, "card.md": 5}
        assert storage.sizes_of(workspace / "model") == sizes
        assert storage.sizes_of(settings.models_dir / "m")["model.safetensors"] == 5000
        model = settings.models_dir / "m"
        scan = settings.cache_dir / "scans" / "s1"
        named = Look(places=(model, scan), named={"whole": workspace / "model"})
        assert run(named, workspace) == beside | {
            "shard",
            "card.md",
            "list.yaml",
            "aidocks.json",
            "README.md",
        } | {Path(name).name for name in FILES}
        storage.bring_file(scan)
    with a.at_work():
        storage.bring_back(workspace)
        assert (workspace / "model" / "card.md").read_bytes() == b"small"
        storage.forget(workspace)
        assert not storage.is_kept(shard.path, shard.bytes, shard.sha256)
        assert Registry(settings.models_dir).exists("m")


def test_a_unit_that_fails_keeps_nothing(node: MakeNode) -> None:
    with node("a").sharing() as here:
        workspace = here.home / "workspaces" / "job-1"
        workspace.mkdir(parents=True)

        class Fail(Write):
            def run(self, context: UnitContext) -> WrittenFiles:
                super().run(context)
                raise RuntimeError("broken")

        with pytest.raises(RuntimeError, match="broken"):
            run_unit(Fail(directory=workspace, name="x"), UnitContext(workspace), "worker-1")
        assert here.entries(workspace) == {}


def test_a_model_is_the_same_wherever_it_was_brought(node: MakeNode) -> None:
    with node("a").at_work() as settings:
        publish(settings, FILES)
        known = storage.identity_of(Registry(settings.models_dir).bring("m"))
    with node("b").at_work() as settings:
        assert storage.identity_of(Registry(settings.models_dir).bring("m")) == known
        Registry(settings.models_dir).delete("m")
        publish(settings, FILES | {"model.safetensors": b"v" * 5000}, job="job-2")
        assert storage.identity_of(Registry(settings.models_dir).bring("m")) != known


def test_checkpoints_go_with_a_training_that_moves(node: MakeNode) -> None:
    a, b = node("a"), node("b")
    with a.sharing() as here:
        directory = here.home / "checkpoints" / "job-1"
        story = here.home / "workspaces" / "job-1" / "training" / "story.jsonl"
        story.parent.mkdir(parents=True)
        assert not has_begun(here, directory)
        for step in (2, 4):
            with sharing_checkpoints(here, directory, story):
                write_bytes(directory / f"checkpoint-0000000{step}" / "weights", b"%d" % step)
                write_bytes(story, b"{}")
        for path in (directory / "checkpoint-00000002").iterdir():
            path.unlink()
        (directory / "checkpoint-00000002").rmdir()
        with sharing_checkpoints(here, directory, story):
            pass
        assert [path.name for path in here.trees(directory)] == ["checkpoint-00000004"]
    with b.sharing() as here:
        assert has_begun(here, directory)
        bring_checkpoints(directory)
        assert (directory / "checkpoint-00000004" / "weights").read_bytes() == b"4"
        storage.bring_file(story)
        assert story.read_bytes() == b"{}"
        # Somebody tells something here.
        story.write_bytes(b"{}{}")
        storage.bring_file(story)
        assert here.entry(story) == Entry(
            bytes=4, sha256=hash_file(story), changed_ns=story.stat().st_mtime_ns
        )
        bring_checkpoints(directory.with_name("job-2"))
