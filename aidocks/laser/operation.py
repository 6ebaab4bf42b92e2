"""``/laser``: reduce the rank of weight matrices where that measurably lowers perplexity (LaserRMT, done
carefully).

scan every matrix -> rank by random matrix theory -> measure each candidate alone -> compose those that help
-> verify on chunks that the search never saw -> write the model and the report.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, ClassVar

from aidocks.checkpoints.files import OutputFile
from aidocks.checkpoints.reader import Checkpoint
from aidocks.checkpoints.space import require_space
from aidocks.checkpoints.writer import TensorPlan, parse_size, plan_shards
from aidocks.evaluate.texts import TextSource, require_chunks, resolve_text
from aidocks.laser.checks import check_base
from aidocks.laser.matrices import Matrix
from aidocks.laser.report import WriteReport
from aidocks.laser.search import Findings, Search
from aidocks.laser.writing import CopyBesideWeights, WriteShard
from aidocks.models.hub import FetchModel, require_token
from aidocks.models.parents import describe_parent
from aidocks.models.publication import Staged, find_published, publish, upload
from aidocks.plan import Operation, Plan, PlanContext, Stage
from aidocks.specs.base import OperationResult, Spec
from aidocks.specs.laser import AcceptedReduction, LaserResult, LaserSpec

#: Room beside the weights: tokenizer, pictures, ledger.
_BESIDE_WEIGHTS_BYTES = 64 << 20


class Laser(Operation[LaserSpec, LaserResult]):
    """See the top of this module."""

    spec_type: ClassVar[type[Spec]] = LaserSpec
    result_type: ClassVar[type[OperationResult]] = LaserResult
    output_field: ClassVar[str] = "laser_model_name"

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
        _check(context.resolver.open(spec.base_model_name, field="base_model_name"), text, spec, context)

    def plan(self, spec: LaserSpec, context: PlanContext) -> Plan[LaserResult]:
        result = find_published(spec.laser_model_name, LaserResult, context)
        if result is None:
            result = yield from self._make(spec, context)
        return (yield from upload(result, spec))

    def _make(self, spec: LaserSpec, context: PlanContext) -> Plan[LaserResult]:
        checkpoint = yield from _open_base(spec, context)
        text = _text(spec, context)
        matrices = _check(checkpoint, text, spec, context)
        search = Search(spec, checkpoint.path, text, context.parallelism, context.say)
        findings = yield from search.run(matrices)
        files = yield from _write(findings, spec, context, checkpoint)
        return _register(findings, files, spec, context, checkpoint)


def _text(spec: LaserSpec, context: PlanContext) -> TextSource:
    return resolve_text(spec.text, context.resolver.allowed_roots)


def _check(
    checkpoint: Checkpoint, text: TextSource, spec: LaserSpec, context: PlanContext
) -> tuple[Matrix, ...]:
    matrices = check_base(checkpoint, spec)
    require_chunks(checkpoint.path, text, "search", spec.chunks, spec.seqlen, spec.seed)
    require_space(context.workspace, checkpoint.total_bytes + _BESIDE_WEIGHTS_BYTES)
    return matrices


def _open_base(spec: LaserSpec, context: PlanContext) -> Generator[Stage, list[Any], Checkpoint]:
    if context.resolver.needs_download(spec.base_model_name):
        yield Stage("fetch", (FetchModel(reference=spec.base_model_name),))
    return context.resolver.open(spec.base_model_name, field="base_model_name")


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
    directory = context.workspace / "model"
    pictures = [f.path.relative_to(directory).as_posix() for f in files if f.path.suffix == ".png"]
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
    base = describe_parent("base_model_name", spec.base_model_name, checkpoint, context.cache_dir)
    staged = Staged(
        directory=directory,
        files=files,
        parents=(base,),
        parameters=result.parameters,
        dtype=checkpoint.config.get("dtype"),
        architecture=checkpoint.config["architectures"][0],
    )
    return publish(staged, "laser", spec, result, context)


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
