"""From a staged MoE to a model in the registry, and back to its result when that has happened before."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from aidocks._version import __version__
from aidocks.models.registry import Manifest, ManifestFile, Parent
from aidocks.plan import PlanContext
from aidocks.specs.moe import MoEResult

if TYPE_CHECKING:
    from aidocks.moe.build import Build


def publish(build: Build, name: str, result: MoEResult) -> MoEResult:
    """Bring what ``build`` has staged into the registry and return the result with its place."""
    path = build.context.registry.publish(build.staged, _manifest(build, name, result))
    return result.model_copy(update={"path": str(path)})


def find_published(name: str, context: PlanContext) -> MoEResult | None:
    """Return the result of an earlier attempt that ended between publication and its last word."""
    if not context.registry.exists(name):
        return None
    manifest = context.registry.manifest(name)
    if manifest.job_id != context.job_id:
        return None
    known = MoEResult.model_fields.keys()
    result = MoEResult.model_validate({key: value for key, value in manifest.metrics.items() if key in known})
    return result.model_copy(update={"path": str(context.registry.path(name))})


def _manifest(build: Build, name: str, result: MoEResult) -> Manifest:
    cache = build.context.cache_dir
    return Manifest(
        name=name,
        created_at=datetime.now(UTC),
        operation="byo-moe",
        job_id=build.context.job_id,
        spec=build.spec.model_dump(mode="json"),
        parents=tuple(
            Parent(
                field=member.field,
                reference=member.reference,
                content_hash=member.checkpoint.content_hash(cache),
                path_name=member.checkpoint.path.name,
            )
            for member in (build.base, *build.experts)
        ),
        code_version=__version__,
        files=tuple(
            ManifestFile(
                path=file.path.relative_to(build.staged).as_posix(), bytes=file.bytes, sha256=file.sha256
            )
            for file in build.files
        ),
        # By subject as well: the model card shows single numbers, and counts lists.
        metrics={
            **result.model_dump(mode="json"),
            "perplexity": {measured.model: measured.perplexity for measured in result.perplexities},
        },
        parameters=result.parameters,
        dtype=build.dtype,
        architecture="MixtralForCausalLM",
        bytes=sum(file.bytes for file in build.files),
    )
