"""From what a job has staged to a model of the registry, and from there to the hub. The same for every operation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from aidocks._version import __version__
from aidocks.checkpoints.files import OutputFile
from aidocks.models.manifest import Manifest, ManifestFile, Parent, Section
from aidocks.plan import Plan, PlanContext, Stage
from aidocks.specs.base import ModelResult, PublishableSpec

ModelResultT = TypeVar("ModelResultT", bound=ModelResult)


@dataclass(frozen=True)
class Staged:
    """A finished model that is not in the registry yet.

    Attributes:
        directory: Where its files are, on the registry's file system.
        files: All of them.
        parents: What it was made of.
        figures: Single numbers for the model card, beside those that the result holds.
        sections: What else the model card tells.
    """

    directory: Path
    files: Sequence[OutputFile]
    parents: Sequence[Parent]
    parameters: int
    dtype: str | None
    architecture: str
    figures: dict[str, Any] = field(default_factory=dict)
    sections: Sequence[Section] = ()


def publish(
    staged: Staged, operation: str, spec: PublishableSpec, result: ModelResultT, context: PlanContext
) -> ModelResultT:
    """Rename a staged model into the registry, with manifest and card, and return the result with its path.

    Raises:
        NameTaken: Another model has the name by now.
    """
    assert result.model is not None, "the result names the model that it is of"
    manifest = Manifest(
        name=result.model,
        created_at=datetime.now(UTC),
        operation=operation,
        job_id=context.job_id,
        spec=spec.model_dump(mode="json"),
        parents=tuple(staged.parents),
        code_version=__version__,
        files=tuple(
            ManifestFile(
                path=file.path.relative_to(staged.directory).as_posix(), bytes=file.bytes, sha256=file.sha256
            )
            for file in staged.files
        ),
        metrics=staged.figures | result.model_dump(mode="json"),
        sections=tuple(staged.sections),
        parameters=staged.parameters,
        dtype=staged.dtype,
        architecture=staged.architecture,
        bytes=sum(file.bytes for file in staged.files),
    )
    path = context.registry.publish(staged.directory, manifest)
    return result.model_copy(update={"path": str(path)})


def find_published(name: str, kind: type[ModelResultT], context: PlanContext) -> ModelResultT | None:
    """Return the result of an attempt of this very job that ended between publication and its last word."""
    if not context.registry.exists(name):
        return None
    manifest = context.registry.manifest(name)
    if manifest.job_id != context.job_id:
        return None
    known = {key: value for key, value in manifest.metrics.items() if key in kind.model_fields}
    return kind.model_validate(known).model_copy(update={"path": str(context.registry.path(name))})


def upload(result: ModelResultT, spec: PublishableSpec) -> Plan[ModelResultT]:
    """Yield the stage that uploads a published model when the spec asks for it."""
    if not spec.publish:
        return result
    from aidocks.models.hub import PublishToHub

    assert result.path is not None, "it was published"
    repository = f"{spec.trainer}/{result.model}"
    unit = PublishToHub(directory=Path(result.path), repo_id=repository, private=spec.private)
    (uploaded,) = yield Stage("publish", (unit,))
    return result.model_copy(update={"hub_url": uploaded.url})
