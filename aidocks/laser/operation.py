"""``/laser``: reduce the rank of weight matrices where that measurably makes the model better (LaserRMT, done
carefully).

scan every matrix -> ranks by random matrix theory -> screen them by one gradient pass -> measure the most promising
alone -> compose those that help -> verify on data that the search never saw -> write the model and the report.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, ClassVar

from aidocks.checkpoints.layout import read_config
from aidocks.checkpoints.reader import Checkpoint
from aidocks.checkpoints.space import require_space
from aidocks.checkpoints.writer import parse_size
from aidocks.evaluate.objectives import ObjectiveSource, Part
from aidocks.evaluate.scores import part_score
from aidocks.laser.checks import (
    bytes_kept,
    check_base,
    resolve_objectives,
    size_objectives,
    workspace_bytes,
)
from aidocks.laser.ledger import LedgerLine
from aidocks.laser.matrices import Matrix
from aidocks.laser.report import WriteReport, choose_pictured, scores_of, sections
from aidocks.laser.scan import scan_units
from aidocks.laser.search import Findings, Search
from aidocks.laser.selection import Candidate
from aidocks.laser.writing import ChooseFactors, writing_units
from aidocks.models.hub import fetch_missing, require_token
from aidocks.models.parents import parent_units
from aidocks.models.publication import Staged, find_published, publish, upload
from aidocks.plan import Operation, Plan, PlanContext, Stage
from aidocks.specs.base import OperationResult, Spec
from aidocks.specs.laser import LaserSpec
from aidocks.specs.laser_result import AcceptedReduction, LaserResult
from aidocks.specs.part_score import PartScore

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
        objectives = resolve_objectives(spec, context.resolver.allowed_roots)
        if spec.publish:
            require_token()
        if context.resolver.needs_download(spec.base_model_name):
            return
        checkpoint = context.resolver.open(spec.base_model_name, field="base_model_name")
        _check(checkpoint, objectives, spec, context)

    def plan(self, spec: LaserSpec, context: PlanContext) -> Plan[LaserResult]:
        result = find_published(spec.laser_model_name, LaserResult, context)
        if result is None:
            result = yield from self._make(spec, context)
        return (yield from upload(result, spec))

    def _make(self, spec: LaserSpec, context: PlanContext) -> Plan[LaserResult]:
        checkpoint = yield from _open_base(spec, context)
        objectives = resolve_objectives(spec, context.resolver.allowed_roots)
        kept = bytes_kept(context.workspace)
        matrices, objectives = _check(checkpoint, objectives, spec, context, kept)
        search = Search(
            spec,
            checkpoint,
            objectives,
            context.workspace,
            context.cache_dir,
            context.parallelism,
            context.say,
        )
        findings = yield from search.run(matrices)
        return (yield from _Publication(spec, context, checkpoint, objectives, findings).run())


def _check(
    checkpoint: Checkpoint,
    objectives: Sequence[ObjectiveSource],
    spec: LaserSpec,
    context: PlanContext,
    kept: int = 0,
) -> tuple[tuple[Matrix, ...], tuple[ObjectiveSource, ...]]:
    """Return the matrices of the request and its objectives with the sizes of their parts.

    Args:
        kept: Bytes of what the job has to write that are written already.
    """
    matrices = check_base(checkpoint, spec)
    sized = size_objectives(spec, objectives, checkpoint.path)
    needed = checkpoint.total_bytes + workspace_bytes(matrices, spec) + _BESIDE_WEIGHTS_BYTES
    require_space(context.workspace, needed - kept)
    return matrices, sized


def _open_base(spec: LaserSpec, context: PlanContext) -> Generator[Stage, list[Any], Checkpoint]:
    yield from fetch_missing({"base_model_name": spec.base_model_name}, context)
    return context.resolver.open(spec.base_model_name, field="base_model_name")


class _Publication:
    """From findings to a registry model with its report."""

    def __init__(
        self,
        spec: LaserSpec,
        context: PlanContext,
        checkpoint: Checkpoint,
        objectives: tuple[ObjectiveSource, ...],
        findings: Findings,
    ) -> None:
        self._spec = spec
        self._context = context
        self._checkpoint = checkpoint
        self._objectives = objectives
        self._findings = findings
        self._directory = context.workspace / "model"
        self._factored: dict[str, int] = {}
        self._bytes = 0

    def run(self) -> Plan[LaserResult]:
        """Yield the stages that write weights and report; publish what they wrote."""
        base = (("base_model_name", self._spec.base_model_name, self._checkpoint.path),)
        (parent,) = yield Stage("hash the base", parent_units(base, self._context.cache_dir))
        written = yield from self._write()
        result = self._result()
        guards = [source.label for source in self._objectives[1:]]
        lines = tuple(_line(candidate, guards) for candidate in self._findings.candidates)
        reported = yield Stage("report", (self._reporting(result, lines),))
        files = [file for part in (*written, *reported) for file in part.files]
        pictures = (file.path.relative_to(self._directory).as_posix() for file in files)
        result = result.model_copy(
            update={"pictures": tuple(name for name in pictures if name.endswith(".png"))}
        )
        staged = Staged(
            directory=self._directory,
            files=files,
            parents=(parent,),
            parameters=result.parameters,
            dtype=self._checkpoint.config.get("dtype"),
            architecture=read_config(self._directory)["architectures"][0],
            sections=sections(result, lines),
        )
        return publish(staged, "laser", self._spec, result, self._context)

    def _reporting(self, result: LaserResult, lines: tuple[LedgerLine, ...]) -> WriteReport:
        pictured = choose_pictured(self._findings.spectra, lines)
        return WriteReport(
            directory=self._directory,
            metric=self._objectives[0].metric,
            z_threshold=self._spec.z_threshold,
            lines=lines,
            spectra=self._findings.spectra,
            pictured=scan_units(
                self._checkpoint, pictured, self._findings.file_hashes, self._context.cache_dir
            ),
            scores=scores_of(result),
            taken_back_because=result.taken_back_because,
        )

    def _write(self) -> Generator[Stage, list[Any], list[Any]]:
        reductions = tuple(candidate.reduction for candidate in self._findings.accepted)
        if self._spec.output == "factored" and reductions:
            choosing = ChooseFactors(checkpoint=self._checkpoint.path, reductions=reductions)
            (chosen,) = yield Stage("choose factors", (choosing,))
            self._factored = chosen.ranks
        largest = parse_size(self._spec.max_shard_size)
        units = writing_units(self._checkpoint, self._directory, reductions, self._factored, largest)
        written = yield Stage("write", units)
        weights = (file for part in written for file in part.files if file.path.suffix == ".safetensors")
        self._bytes = sum(file.bytes for file in weights)
        return written

    def _result(self) -> LaserResult:
        findings = self._findings
        before = sum(entry.numel for entry in self._checkpoint.entries.values())
        # On the search data guards are not measured where the objective's figures ended without a decision.
        parts: dict[Part, list[PartScore]] = {
            part: [
                part_score(source, part, pairs)
                for source, pairs in zip(self._objectives, scores, strict=False)
            ]
            for part, scores in findings.scores.items()
        }
        return LaserResult(
            model=self._spec.laser_model_name,
            accepted=tuple(_accepted(candidate) for candidate in findings.accepted),
            search=parts["search"][0],
            held_out=parts["held_out"][0],
            report=parts["report"][0],
            guards=(*parts["report"][1:], *parts["held_out"][1:]),
            taken_back=tuple(c.address for c in findings.candidates if c.verdict == "taken back"),
            taken_back_because=findings.objection,
            candidates_tried=len(findings.candidates),
            candidates_screened=findings.screened,
            matrices_scanned=len(findings.spectra),
            parameters=before - self._saved(),
            parameters_before=before,
            output=self._spec.output,
            bytes=self._bytes,
            bytes_before=self._checkpoint.total_bytes,
        )

    def _saved(self) -> int:
        """Return how many parameters fewer the factors have than the matrices that they stand for."""
        entries = self._checkpoint.entries
        return sum(
            entries[name].numel - rank * sum(entries[name].shape) for name, rank in self._factored.items()
        )


def _accepted(candidate: Candidate) -> AcceptedReduction:
    effect = candidate.composed
    assert effect is not None, "accepted without evidence"
    return AcceptedReduction(
        name=candidate.address,
        **_description(candidate),
        delta=effect.delta,
        standard_error=effect.standard_error,
        z=effect.z,
    )


def _description(candidate: Candidate) -> dict[str, Any]:
    """Return what a ledger line and an accepted reduction alike say of a candidate."""
    proposal = candidate.proposal
    return {
        "layer": proposal.matrix.layer,
        "kind": proposal.matrix.kind,
        "rank": proposal.rank,
        "full_rank": proposal.matrix.full_rank,
        "truncation": proposal.truncation,
        "shrink": proposal.shrink,
        "rule": ", ".join(proposal.rules),
        "energy": proposal.energy,
        "group": candidate.group,
    }


def _line(candidate: Candidate, guards: Sequence[str]) -> LedgerLine:
    alone, composed, prediction = candidate.alone, candidate.composed, candidate.prediction
    return LedgerLine(
        address=candidate.address,
        **_description(candidate),
        snr=candidate.proposal.noise_ratio,
        predicted_change=prediction.mean if prediction else None,
        predicted_standard_error=prediction.standard_error if prediction else None,
        predicted_with_fisher=prediction.change if prediction else None,
        items=candidate.items,
        delta=alone.delta if alone else None,
        standard_error=alone.standard_error if alone else None,
        z=alone.z if alone else None,
        composed_delta=composed.delta if composed else None,
        composed_standard_error=composed.standard_error if composed else None,
        composed_z=composed.z if composed else None,
        guards={label: pairs.comparison.z for label, pairs in zip(guards, candidate.guards, strict=False)},
        decision=candidate.verdict,
        accepted=candidate.is_accepted,
    )
