"""Merges that are interrupted, spread over workers, or fail: what is done twice, and what is left."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from aidocks.errors import InsufficientDisk
from aidocks.jobs.model import Status
from aidocks.jobs.runner import run_locally
from aidocks.merge.inputs import BLOCK_VALUES
from aidocks.merge.shard import MergeShard
from aidocks.settings import Settings
from tests.support.merge_jobs import (
    Driver,
    Killed,
    add_models,
    change,
    copy_model,
    digests,
    left_behind,
    make_family,
    request,
    tensors,
)

DARE = """
stages:
  - name: pair
    merge_method: linear
    models: [{model: one}, {model: two}]
    parameters: {weight: 0.5}
merge_method: dare_ties
base_model: three
models: [{model: pair}, {model: two}]
parameters: {weight: [0.3, 0.8], density: 0.4}
max_shard_size: 60KB
seed: 5
name: result
"""


@pytest.fixture
def place(settings: Settings, tmp_path: Path) -> Settings:
    make_family(tmp_path / "sources", "one", "two", "three")
    add_models(settings, *(tmp_path / "sources" / name for name in ("one", "two", "three")))
    return settings.model_copy(update={"allowed_roots": (tmp_path,)})


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, so that a tensor has several, in which threads may overtake one another."""
    monkeypatch.setitem(BLOCK_VALUES, "cpu", 500)


def finished(driver: Driver) -> dict[Path, tuple[int, int]]:
    """Return the weight files of a workspace, each with what would be another if it were written again."""
    files = driver.context.workspace.rglob("*.safetensors")
    return {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def test_neither_workers_nor_threads_nor_kills_leave_a_trace(
    place: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Driver(place)
    expected = one.run(DARE)
    path = Path(str(expected.path))
    files = digests(path)
    shards = sum(isinstance(unit, MergeShard) for unit in one.units)
    assert shards == expected.steps[0].files + expected.steps[1].files > 6
    merged = tensors(path)
    shutil.rmtree(path)

    assert Driver(place, workers=3, threads=3).run(DARE).model_dump() == expected.model_dump()
    assert digests(path) == files
    shutil.rmtree(path)

    # In other blocks sums are rounded otherwise, but random numbers belong to values, not to blocks.
    monkeypatch.setitem(BLOCK_VALUES, "cpu", 1300)
    found = tensors(Path(str(Driver(place).run(DARE).path)))
    assert all(torch.allclose(found[name], tensor, atol=1e-6) for name, tensor in merged.items())
    monkeypatch.setitem(BLOCK_VALUES, "cpu", 500)
    shutil.rmtree(path)

    for kill_after in (1, shards // 2, shards, len(one.units) - 1):
        driver = Driver(place, workers=2)
        with pytest.raises(Killed):
            driver.run(DARE, kill_after=kill_after)
        assert not path.exists()
        before = finished(driver)
        assert driver.run(DARE).model_dump() == expected.model_dump()
        assert digests(path) == files
        assert len(driver.units) == len(one.units), "a finished unit was run again"
        published = {file.name: state for file, state in before.items() if file.parent.name == "model"}
        for name, state in published.items():
            assert ((path / name).stat().st_ino, (path / name).stat().st_mtime_ns) == state
        shutil.rmtree(path)
        shutil.rmtree(driver.context.workspace)

    # Another seed draws other numbers.
    other = tensors(Path(str(Driver(place).run(DARE, seed=6).path)))
    assert any(not torch.equal(merged[name], tensor) for name, tensor in other.items())


def test_a_seed_does_not_matter_where_nothing_is_drawn(place: Settings) -> None:
    text = (
        "{merge_method: linear, models: [{model: one}, {model: two}], parameters: {weight: 1}, name: result}"
    )
    found = []
    for seed in (0, 1):
        result = Driver(place).run(text, seed=seed)
        found.append((Path(str(result.path)) / "model.safetensors").read_bytes())
        shutil.rmtree(str(result.path))
    assert found[0] == found[1]


def test_a_failure_half_way_leaves_nothing(place: Settings, tmp_path: Path) -> None:
    """The last tensor of the second stage is wrong: by then whole files have been written."""
    broken = copy_model(tmp_path / "sources" / "three", tmp_path / "broken")
    last = "model.norm.weight"
    change(
        broken, lambda name, t: torch.where(torch.arange(len(t)) == 7, torch.nan, t) if name == last else t
    )
    add_models(place, broken)
    known = ("one", "two", "three", "broken")
    job = run_locally("merge", request(DARE.replace("three", "broken")), place)
    assert (job.status, job.output_name) == (Status.FAILED, "result")
    assert job.error is not None
    assert job.error["code"] == "corrupt_checkpoint"
    assert "model.norm.weight of broken" in job.error["detail"]
    assert left_behind(place.home, *known) == []
    # The name is free again.
    assert run_locally("merge", request(DARE), place).status is Status.SUCCEEDED
    assert not list((place.home / "workspaces").iterdir())


class Disk:
    def __init__(self, free: int) -> None:
        self.free = free


def test_room_is_asked_for_before_any_work(
    place: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pickled = copy_model(tmp_path / "sources" / "two", tmp_path / "pickled")
    torch.save(tensors(pickled), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(1_000_000))
    with pytest.raises(InsufficientDisk, match=r"1\.0 MB are free"):
        run_locally("merge", request(DARE), place)
    # Where a model has to be converted first, its size is known after that; and what is there needs no more room.
    text = DARE.replace("{model: two}", f"{{model: {pickled}}}")
    driver = Driver(place)
    with pytest.raises(InsufficientDisk) as caught:
        driver.run(text)
    assert driver.stages == ["convert"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(int(str(caught.value.value))))
    with pytest.raises(Killed):
        driver.run(text, kill_after=4)
    written = sum(unit.shard.nbytes for unit in driver.units if isinstance(unit, MergeShard))
    assert written > 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(int(str(caught.value.value)) - written))
    assert driver.run(text).model == "result"
    assert left_behind(place.home, "one", "two", "three", "result", driver.context.job_id) == []


def test_preflight_and_planning_need_no_torch(place: Settings) -> None:
    import subprocess
    import sys

    text = DARE + "tokenizer_source: union\n"
    code = (
        "import sys\n"
        "from aidocks.jobs.submit import plan_context\n"
        "from aidocks.merge.operation import Merge\n"
        "from aidocks.settings import Settings\n"
        "from aidocks.specs.merge import MergeSpec\n"
        "from aidocks.specs.read import build_spec, parse_yaml\n"
        f"spec = build_spec(MergeSpec, parse_yaml({text!r}))\n"
        "context = plan_context(Settings(), 'job-1')\n"
        "Merge().preflight(spec, context)\n"
        "next(Merge().plan(spec, context))\n"
        "assert not {'torch', 'transformers', 'matplotlib', 'ray'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
