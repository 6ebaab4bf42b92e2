"""Parents are described by units: once for each directory, with the hash of what is in it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from aidocks.checkpoints.reader import Checkpoint
from aidocks.models.manifest import Parent
from aidocks.models.parents import DescribeParent, describe_members, describe_parent, parent_units
from aidocks.plan import UnitContext


@pytest.fixture
def models(tmp_path: Path, tiny_llama: Callable[..., Path]) -> tuple[Path, Path]:
    first = tiny_llama(tmp_path / "first")
    (first / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return first, tiny_llama(tmp_path / "second", seed=1, max_shard_size="200KB")


def test_every_member_is_described_and_every_directory_hashed_once(
    tmp_path: Path, models: tuple[Path, Path]
) -> None:
    first, second = models
    members = [
        ("base_model", "one", first),
        ("experts[0].source_model", "./first", first),
        ("experts[1].source_model", "two", second),
    ]
    units = parent_units(members, tmp_path / "cache")
    assert [unit.directory for unit in units] == [first, second]
    parents = describe_members(members, units, [unit.run(UnitContext(tmp_path)) for unit in units])
    assert list(parents) == [
        describe_parent(field, reference, Checkpoint(directory)) for field, reference, directory in members
    ]
    assert [parent.license for parent in parents] == ["apache-2.0", "apache-2.0", None]
    assert parents[0].content_hash == parents[1].content_hash != parents[2].content_hash


def test_the_unit_survives_the_journal(tmp_path: Path, models: tuple[Path, Path]) -> None:
    unit = DescribeParent(
        field="base_model", reference="one", directory=models[1], cache_dir=tmp_path / "cache"
    )
    assert DescribeParent.model_validate_json(unit.model_dump_json()).unit_id == unit.unit_id
    result = unit.run(UnitContext(tmp_path))
    assert Parent.model_validate(result.model_dump(mode="json")) == result
    assert unit.weight == sum(file.stat().st_size for file in Checkpoint(models[1]).weight_files)
    assert unit.label == "hash of second"


def test_it_imports_no_torch(tmp_path: Path, models: tuple[Path, Path]) -> None:
    code = """
import sys
from pathlib import Path
from aidocks.models.parents import DescribeParent
from aidocks.plan import UnitContext
model, cache = map(Path, sys.argv[1:])
unit = DescribeParent(field="base_model", reference="one", directory=model, cache_dir=cache)
assert len(unit.run(UnitContext(cache)).content_hash) == 64
assert not {"torch", "numpy", "transformers"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, models[0], tmp_path], check=True)
