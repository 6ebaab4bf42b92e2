"""``/laser``: reduce the rank of weight matrices where that measurably lowers perplexity (LaserRMT, done
carefully).

scan every matrix -> rank by random matrix theory -> measure each candidate alone -> compose those that help
-> verify on chunks that the search never saw -> write the model and the report.
"""

from __future__ import annotations

from collections.abc import Generator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from aidocks._version import __version__
from aidocks.checkpoints.reader import Checkpoint
from aidocks.checkpoints.space import require_space
from aidocks.checkpoints.writer import TensorPlan, parse_size, plan_shards
from aidocks.evaluate.texts import TextSource, resolve_text
from aidocks.laser.checks import check_base, check_text
from aidocks.laser.matrices import Matrix
from aidocks.laser.report import WriteReport
from aidocks.laser.search import Findings, Search
from aidocks.laser.writing import CopyBesideWeights, WriteShard
from aidocks.models.hub import FetchModel, PublishToHub, require_token
from aidocks.models.manifest import Manifest, ManifestFile, Parent
from aidocks.plan import Operation, OutputFile, Plan, PlanContext, Stage
from aidocks.specs.base import OperationResult, Spec
from aidocks.specs.laser import AcceptedReduction, LaserResult, LaserSpec

#: Room beside the weights: tokenizer, pictures, ledger.
_BESIDE_WEIGHTS_BYTES = 64 << 20


class Laser(Operation[LaserSpec, LaserResult]):
    """See the top of this module."""

    spec_type: ClassVar[type[Spec]] = LaserSpec
    result_type: ClassVar[type[OperationResult]] = LaserResult

    def output_name(self, spec: LaserSpec, job_id: str) -> str | None:
        return spec.laser_model_name

    def inputs(self, spec: LaserSpec) -> dict[str, str]:
        return {"base_model_name": spec.base_model_name}

    def preflight(self, spec: LaserSpec, context: PlanContext) -> None:
        parse_size(spec.max_shard_size)
        text = _text(spec, context)
        if spec.publish:
            require_token()
        if context.resolver.needs_download(spec.base_model_name):
            return
        base = context.resolver.resolve(spec.base_model_name, field="base_model_name")
        _check(Checkpoint(base.path), text, spec, context)

    def plan(self, spec: LaserSpec, context: PlanContext) -> Plan[LaserResult]:
        result = _published_before(spec, context)
        if result is None:
            result = yield from self._make(spec, context)
        return (yield from _upload(result, spec, context)) if spec.publish else result

    def _make(self, spec: LaserSpec, context: PlanContext) -> Plan[LaserResult]:
        base = yield from _find_base(spec, context)
        text = _text(spec, context)
        checkpoint = Checkpoint(base)
        matrices = _check(checkpoint, text, spec, context)
        search = Search(spec, base, text, context.parallelism, context.say)
        findings = yield from search.run(matrices)
        files = yield from _write(findings, spec, context, checkpoint)
        return _register(findings, files, spec, context, checkpoint)


def _text(spec: LaserSpec, context: PlanContext) -> TextSource:
    return resolve_text(spec.text, context.resolver.allowed_roots)


def _check(
    checkpoint: Checkpoint, text: TextSource, spec: LaserSpec, context: PlanContext
) -> tuple[Matrix, ...]:
    matrices = check_base(checkpoint, spec)
    check_text(checkpoint, text, spec)
    require_space(context.workspace, checkpoint.total_bytes + _BESIDE_WEIGHTS_BYTES)
    return matrices


def _find_base(spec: LaserSpec, context: PlanContext) -> Generator[Stage, list[Any], Path]:
    if context.resolver.needs_download(spec.base_model_name):
        yield Stage("fetch", (FetchModel(reference=spec.base_model_name),))
    return context.resolver.resolve(spec.base_model_name, field="base_model_name").path


def _write(
    findings: Findings, spec: LaserSpec, context: PlanContext, checkpoint: Checkpoint
) -> Generator[Stage, list[Any], list[OutputFile]]:
    directory = context.workspace / "model"
    tensors = [TensorPlan(name=e.name, dtype=e.dtype, shape=e.shape) for e in checkpoint.entries.values()]
    shards = plan_shards(tensors, parse_size(spec.max_shard_size))
    reductions = {candidate.matrix.name: candidate.reduction for candidate in findings.accepted}
    writers = [
        WriteShard(
            checkpoint=checkpoint.path,
            directory=directory,
            shard=shard,
            reductions=tuple(reductions[t.name] for t in shard.tensors if t.name in reductions),
        )
        for shard in shards
    ]
    beside = CopyBesideWeights(checkpoint=checkpoint.path, directory=directory, shards=shards)
    written = yield Stage("write", (*writers, beside))
    report = WriteReport(
        checkpoint=checkpoint.path,
        directory=directory,
        rule=spec.rule,
        z_threshold=spec.z_threshold,
        spectra=findings.spectra,
        candidates=findings.candidates,
        search=findings.search,
        held_out=findings.held_out,
    )
    reported = yield Stage("report", (report,))
    return [file for part in (*written, *reported) for file in part.files]


def _register(
    findings: Findings, files: list[OutputFile], spec: LaserSpec, context: PlanContext, checkpoint: Checkpoint
) -> LaserResult:
    staged = context.workspace / "model"
    pictures = [f.path.relative_to(staged).as_posix() for f in files if f.path.suffix == ".png"]
    result = LaserResult(
        model=spec.laser_model_name,
        accepted=_accepted(findings),
        search=findings.search,
        held_out=findings.held_out,
        withdrawn=findings.withdrawn,
        candidates_tried=len(findings.candidates),
        matrices_scanned=len(findings.spectra),
        parameters=sum(entry.numel for entry in checkpoint.entries.values()),
        pictures=tuple(pictures),
    )
    path = context.registry.publish(staged, _manifest(result, files, spec, context, checkpoint))
    return result.model_copy(update={"path": str(path)})


def _accepted(findings: Findings) -> tuple[AcceptedReduction, ...]:
    lines = []
    for candidate in findings.accepted:
        effect = candidate.composed
        assert effect is not None, "accepted without evidence"
        line = {
            "name": candidate.matrix.name,
            "layer": candidate.matrix.layer,
            "kind": candidate.matrix.kind,
            "rank": candidate.rank,
            "full_rank": candidate.matrix.full_rank,
        }
        lines.append(AcceptedReduction.model_validate(line | effect.model_dump()))
    return tuple(lines)


def _manifest(
    result: LaserResult,
    files: list[OutputFile],
    spec: LaserSpec,
    context: PlanContext,
    checkpoint: Checkpoint,
) -> Manifest:
    staged = context.workspace / "model"
    return Manifest(
        name=spec.laser_model_name,
        created_at=datetime.now(UTC),
        operation="laser",
        job_id=context.job_id,
        spec=spec.model_dump(mode="json"),
        parents=(
            Parent(
                field="base_model_name",
                reference=spec.base_model_name,
                content_hash=checkpoint.content_hash(context.cache_dir),
                path_name=checkpoint.path.name,
            ),
        ),
        code_version=__version__,
        files=tuple(
            ManifestFile(path=f.path.relative_to(staged).as_posix(), bytes=f.bytes, sha256=f.sha256)
            for f in files
        ),
        metrics=result.model_dump(mode="json"),
        parameters=result.parameters,
        dtype=checkpoint.config.get("dtype"),
        architecture=checkpoint.config["architectures"][0],
        bytes=sum(f.bytes for f in files),
    )


def _published_before(spec: LaserSpec, context: PlanContext) -> LaserResult | None:
    """Return the result of an earlier attempt that ended between publication and its last word."""
    name = spec.laser_model_name
    if not context.registry.exists(name) or context.registry.manifest(name).job_id != context.job_id:
        return None
    result = LaserResult.model_validate(context.registry.manifest(name).metrics)
    return result.model_copy(update={"path": str(context.registry.path(name))})


def _upload(
    result: LaserResult, spec: LaserSpec, context: PlanContext
) -> Generator[Stage, list[Any], LaserResult]:
    directory = context.registry.path(spec.laser_model_name)
    unit = PublishToHub(directory=directory, repo_id=f"{spec.trainer}/{spec.laser_model_name}")
    (published,) = yield Stage("publish", (unit,))
    return result.model_copy(update={"hub_url": published.url})
