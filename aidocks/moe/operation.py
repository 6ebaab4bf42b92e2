"""``/byo-moe``: one Mixture-of-Experts from a base model and fine-tunes of its shape.

assemble the weight files, and compute gates beside it -> or learn them on the assembled weights -> write the router ->
load, run and picture the result -> measure it beside its parts -> publish.
"""

from __future__ import annotations

from typing import ClassVar

from aidocks.checkpoints.writer import parse_size
from aidocks.models.hub import fetch_missing, require_token
from aidocks.models.names import derive_name
from aidocks.models.publication import find_published, publish, upload
from aidocks.moe.domains import resolve_texts
from aidocks.plan import Operation, Plan, PlanContext
from aidocks.specs.base import OperationResult, Spec
from aidocks.specs.moe import MoESpec
from aidocks.specs.moe_result import MoEResult


class BuildMoE(Operation[MoESpec, MoEResult]):
    """See the top of this module."""

    spec_type: ClassVar[type[Spec]] = MoESpec
    result_type: ClassVar[type[OperationResult]] = MoEResult

    def output_name(self, spec: MoESpec, job_id: str) -> str:
        return spec.name or derive_name(spec.base_model, "moe", job_id)

    def inputs(self, spec: MoESpec) -> dict[str, str]:
        lists = {"experts": spec.experts, "shared_experts": spec.shared_experts}
        experts = {
            f"{field}[{i}].source_model": expert.source_model
            for field, members in lists.items()
            for i, expert in enumerate(members)
        }
        return {"base_model": spec.base_model, **experts}

    def preflight(self, spec: MoESpec, context: PlanContext) -> None:
        parse_size(spec.max_shard_size)
        resolve_texts(spec, None, None, context.resolver.allowed_roots)
        if spec.publish:
            require_token()
        references = self.inputs(spec)
        resolver = context.resolver
        here = {f: r for f, r in references.items() if not resolver.needs_download(r, field=f)}
        if len(here) == len(references):
            from aidocks.moe.build import Build

            Build(spec, context, references).require_space()
        for field, reference in here.items():
            resolver.resolve(reference, field=field)

    def plan(self, spec: MoESpec, context: PlanContext) -> Plan[MoEResult]:
        name = self.output_name(spec, context.job_id)
        result = find_published(name, MoEResult, context)
        if result is None:
            references = self.inputs(spec)
            fetched = yield from fetch_missing(references, context)
            from aidocks.moe.build import Build

            build = Build(spec, context, references)
            if fetched:
                build.require_space()
            result = yield from build.run(name)
            result = publish(build.finished(result), "byo-moe", spec, result, context)
        return (yield from upload(result, spec))
