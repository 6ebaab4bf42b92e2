"""``/merge/evolve``: parameters of a merge by evolution, judged by any objective on data that the search never saw.

write the merge with the initial values -> generations of candidates, measured in memory -> the best and the centre on
held-out data -> write the merge that was confirmed, with the ledger of all.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from aidocks.checkpoints.layout import CAUSAL_ENDINGS
from aidocks.checkpoints.writer import parse_size
from aidocks.errors import IncompatibleModels
from aidocks.evaluate.objectives import ObjectiveSource, resolve_objective, size_objective
from aidocks.evaluate.texts import require_context
from aidocks.merge.build import MergeBuild
from aidocks.merge.evolve.candidates import Candidates
from aidocks.merge.evolve.evolution import Evolution, Findings
from aidocks.merge.evolve.genome import checked_genome
from aidocks.merge.evolve.report import (
    WriteEvolution,
    found_values,
    input_scores,
    ledger,
    scores_of,
    sections,
)
from aidocks.models.converting import conversions
from aidocks.models.hub import fetch_missing, require_token
from aidocks.models.names import derive_name
from aidocks.models.publication import Staged, find_published, publish, upload
from aidocks.plan import Operation, Plan, PlanContext, Stage, WrittenFiles
from aidocks.specs.base import OperationResult, Spec
from aidocks.specs.merge_evolve import MergeEvolveSpec
from aidocks.specs.merge_evolve_result import MergeEvolveResult
from aidocks.specs.merge_result import MergeResult
from aidocks.specs.merge_settings import split_reference


class MergeEvolve(Operation[MergeEvolveSpec, MergeEvolveResult]):
    """See the top of this module."""

    spec_type: ClassVar[type[Spec]] = MergeEvolveSpec
    result_type: ClassVar[type[OperationResult]] = MergeEvolveResult

    def output_name(self, spec: MergeEvolveSpec, job_id: str) -> str:
        first, _ = split_reference(next(reference for _, reference in spec.references()))
        return spec.name or derive_name(first, f"{spec.merge_method.replace('_', '-')}-evolved", job_id)

    def inputs(self, spec: MergeEvolveSpec) -> dict[str, str]:
        return spec.merge(spec.genome.initial).inputs()

    def preflight(self, spec: MergeEvolveSpec, context: PlanContext) -> None:
        parse_size(spec.max_shard_size)
        checked_genome(spec)
        objectives = _resolve(spec, context)
        if spec.publish:
            require_token()
        references = self.inputs(spec)
        if any(context.resolver.needs_download(r, field=field) for field, r in references.items()):
            return
        converted, units = conversions(references, context.resolver, context.workspace)
        if not units:
            build = _start(spec, context, converted)
            _size(spec, objectives, build.last.target.tokenizer)
            _require_space(build)

    def plan(self, spec: MergeEvolveSpec, context: PlanContext) -> Plan[MergeEvolveResult]:
        name = self.output_name(spec, context.job_id)
        result = find_published(name, MergeEvolveResult, context)
        if result is None:
            references = self.inputs(spec)
            fetched = yield from fetch_missing(references, context)
            converted, units = conversions(references, context.resolver, context.workspace)
            if units:
                yield Stage("convert", units)
            start = _start(spec, context, converted)
            if fetched or units:
                # Before that, the preflight could not know how much it would be.
                _require_space(start)
            result = yield from _make(spec, name, start, context, converted)
        # Not before: a merge that can be run again here names directories of this machine, and what is published does
        # not.
        merge = spec.merge(tuple(value.value for value in result.values))
        result = result.model_copy(update={"config": merge.as_yaml()})
        return (yield from upload(result, spec))


def _make(
    spec: MergeEvolveSpec,
    name: str,
    start: MergeBuild,
    context: PlanContext,
    converted: Mapping[str, Path],
) -> Plan[MergeEvolveResult]:
    genome = checked_genome(spec)
    merged = yield from start.run(name)
    objectives = _size(spec, _resolve(spec, context), start.last.directory)
    search = Evolution(spec, genome, objectives, Candidates(spec, start.last, start.mapping), context.say)
    context.say(
        f"Searching {len(genome.variables)} values by {objectives[0].label}: {search.size} candidates a generation."
    )
    findings = yield from search.run()
    build = start
    if findings.accepted:
        build = MergeBuild(spec.merge(findings.values), context, converted)
        merged = yield from build.run(name)
    result = _result(spec, objectives, findings, merged)
    staged, result = yield from _report(build.finished(merged), result, objectives, findings)
    return publish(staged, "merge-evolve", spec, result, context)


def _require_space(start: MergeBuild) -> None:
    """Raise InsufficientDisk for too little room: the merge that the search begins with stays until the end."""
    start.require_space(further=sum(file.nbytes for file in start.last.files))


def _start(spec: MergeEvolveSpec, context: PlanContext, converted: Mapping[str, Path]) -> MergeBuild:
    """Return the merge with the initial values, which all others are measured in the place of.

    Raises:
        AIDocksError: Whatever is wrong with the request or its models.
    """
    inside = replace(context, workspace=context.workspace / "start")
    build = MergeBuild(spec.merge(checked_genome(spec).initial), inside, converted)
    target, first = build.last.target, next(iter(build.last.members))
    if not target.class_name.endswith(CAUSAL_ENDINGS):
        raise IncompatibleModels(
            f"The model {first!r} is not a causal language model, but: {target.class_name or 'none'}.",
            field="models",
            value=first,
            hint="Losses of text decide here: give models whose architecture ends with ForCausalLM.",
        )
    longest = target.config.get("max_position_embeddings")
    if isinstance(longest, int):
        require_context(first, longest, spec.seqlen)
    return build


def _resolve(spec: MergeEvolveSpec, context: PlanContext) -> tuple[ObjectiveSource, ...]:
    """Return what decides and then the guards, with data that exist."""
    named = [("objective", spec.objective), *((f"guards[{i}]", guard) for i, guard in enumerate(spec.guards))]
    return tuple(
        resolve_objective(
            objective,
            context.resolver.allowed_roots,
            seq_length=spec.seqlen,
            seed=spec.seed,
            chunks=spec.chunks,
            field=field,
        )
        for field, objective in named
    )


def _size(
    spec: MergeEvolveSpec, objectives: Sequence[ObjectiveSource], tokenizer: Path
) -> tuple[ObjectiveSource, ...]:
    """Return the objectives with the sizes of their parts, counted with a tokenizer."""
    fields = ("objective", *(f"guards[{number}]" for number in range(len(objectives) - 1)))
    return tuple(
        size_objective(source, tokenizer, chunks=spec.chunks, field=field)
        for field, source in zip(fields, objectives, strict=True)
    )


def _result(
    spec: MergeEvolveSpec, objectives: Sequence[ObjectiveSource], findings: Findings, merged: MergeResult
) -> MergeEvolveResult:
    scores, guards = scores_of(findings, objectives)
    return MergeEvolveResult(
        model=merged.model,
        accepted=findings.accepted,
        objection=findings.objection,
        values=found_values(checked_genome(spec).variables, findings),
        **scores,
        guards=guards,
        inputs=input_scores(findings, objectives[0]),
        generations=len(findings.spreads),
        candidates=len(findings.trials),
        stopped_because=findings.stopped_because,
        merge_method=merged.merge_method,
        architecture=merged.architecture,
        dtype=merged.dtype,
        parameters=merged.parameters,
        bytes=merged.bytes,
        notes=merged.notes,
    )


def _report(
    staged: Staged, result: MergeEvolveResult, objectives: Sequence[ObjectiveSource], findings: Findings
) -> Generator[Stage, list[Any], tuple[Staged, MergeEvolveResult]]:
    """Write the ledger and the pictures beside the merge."""
    writing = WriteEvolution(
        directory=staged.directory,
        metric=objectives[0].metric,
        result=result,
        lines=ledger(findings, objectives),
        spreads=findings.spreads,
    )
    written: list[WrittenFiles] = yield Stage("ledger", (writing,))
    files = [file for part in written for file in part.files]
    pictures = (file.path.relative_to(staged.directory).as_posix() for file in files)
    result = result.model_copy(update={"pictures": tuple(name for name in pictures if name.endswith(".png"))})
    told = (*staged.sections, *sections(result))
    return replace(staged, files=(*staged.files, *files), sections=told), result
