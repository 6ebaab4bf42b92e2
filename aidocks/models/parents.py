"""Describing the models that a new one is made of."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, Field

from aidocks.checkpoints.hashes import FileHashes, combine_hashes
from aidocks.checkpoints.layout import ADAPTER_CONFIG_FILE, ADAPTER_FILE, is_adapter
from aidocks.models.card import read_license
from aidocks.models.manifest import Parent
from aidocks.plan import Unit, UnitContext

if TYPE_CHECKING:
    from aidocks.checkpoints.reader import Checkpoint

#: A parent as a spec names it: field, reference, checkpoint directory.
Named = tuple[str, str, Path]


class DescribeParent(Unit[Parent]):
    """One parent's description. All its weights are read to hash them, unless their hashes are known."""

    field: str = Field(description="Path of the spec's field that named it.")
    reference: str = Field(description="As it was given.")
    directory: Path = Field(description="Checkpoint directory, or that of an adapter.")
    cache_dir: Path = Field(description="Where hashes of large files are kept.")
    all_parts: bool = Field(
        False, description="Whether sub-directories belong to it, and code of its own, which an admin allows."
    )

    result_type: ClassVar[type[BaseModel]] = Parent

    @property
    def label(self) -> str:
        return f"hash of {self.directory.name}"

    @property
    def weight(self) -> float:
        return float(sum(path.stat().st_size for path in self.directory.glob("*.safetensors")))

    @property
    def computes(self) -> bool:
        return False

    def run(self, context: UnitContext) -> Parent:
        from aidocks.checkpoints.reader import Checkpoint

        if is_adapter(self.directory):
            return _describe_adapter(self.field, self.reference, self.directory, self.cache_dir)
        if self.all_parts:
            return _describe_parts(self.field, self.reference, self.directory, self.cache_dir)
        return describe_parent(self.field, self.reference, Checkpoint(self.directory), self.cache_dir)


def _describe_adapter(field: str, reference: str, directory: Path, cache_dir: Path) -> Parent:
    hashes = FileHashes(cache_dir).compute([directory / ADAPTER_CONFIG_FILE, directory / ADAPTER_FILE])
    return Parent(
        field=field,
        reference=reference,
        content_hash=combine_hashes(hashes),
        path_name=directory.name,
        license=read_license(directory),
    )


def _describe_parts(field: str, reference: str, directory: Path, cache_dir: Path) -> Parent:
    """Describe a model of several parts, in sub-directories: its configurations, weights and code all count."""
    hashes = FileHashes(cache_dir)
    digests = {}
    for place in sorted({directory, *(path.parent for path in directory.rglob("*.safetensors"))}):
        files = [path for path in sorted(place.iterdir()) if path.suffix in (".safetensors", ".json", ".py")]
        digests[place.relative_to(directory).as_posix()] = combine_hashes(hashes.compute(files))
    return Parent(
        field=field,
        reference=reference,
        content_hash=combine_hashes(digests),
        path_name=directory.name,
        license=read_license(directory),
    )


def parent_units(
    members: Iterable[Named], cache_dir: Path, in_parts: Collection[Path] = ()
) -> tuple[DescribeParent, ...]:
    """Return the units that describe the parents of a model: one for each directory, however often it is named.

    Args:
        members: Of every parent: field, reference, checkpoint directory.
        cache_dir: Where hashes of large files are kept.
        in_parts: Directories of those whose sub-directories belong to them.
    """
    first: dict[Path, DescribeParent] = {}
    for field, reference, directory in members:
        unit = DescribeParent(
            field=field,
            reference=reference,
            directory=directory,
            cache_dir=cache_dir,
            all_parts=directory in in_parts,
        )
        first.setdefault(directory, unit)
    return tuple(first.values())


def describe_members(
    members: Iterable[Named], units: Sequence[DescribeParent], described: Sequence[Parent]
) -> tuple[Parent, ...]:
    """Return one parent for every member, from what :func:`parent_units` of them have returned."""
    known = {unit.directory: parent for unit, parent in zip(units, described, strict=True)}
    return tuple(
        known[directory].model_copy(update={"field": field, "reference": reference})
        for field, reference, directory in members
    )


def describe_parent(
    field: str, reference: str, checkpoint: Checkpoint, cache_dir: Path | None = None
) -> Parent:
    """Describe one parent for a manifest: which field named it, the hash of its content, its licence.

    Args:
        field: Path of the spec's field.
        reference: As it was given.
        checkpoint: The parent, opened.
        cache_dir: Where hashes of large files are kept; see :meth:`Checkpoint.content_hash`.
    """
    return Parent(
        field=field,
        reference=reference,
        content_hash=checkpoint.content_hash(cache_dir),
        path_name=checkpoint.path.name,
        license=read_license(checkpoint.path),
    )
