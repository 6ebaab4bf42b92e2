"""The stages that build one MoE, from checked members to a staged model."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from aidocks.checkpoints.files import OutputFile
from aidocks.checkpoints.reader import Checkpoint
from aidocks.checkpoints.space import require_space
from aidocks.checkpoints.writer import parse_size
from aidocks.evaluate.comparison import model_perplexities
from aidocks.evaluate.domains import DomainResults, MeasureDomains
from aidocks.models.manifest import Parent
from aidocks.models.parents import describe_members, parent_units
from aidocks.models.publication import Staged
from aidocks.models.unchanged import require_unchanged
from aidocks.moe.assemble import WriteRouter, assembly_units
from aidocks.moe.check import CheckMoE, Routing
from aidocks.moe.dense import Member, read_dense, stored_dtype
from aidocks.moe.domains import resolve_texts
from aidocks.moe.gate_stages import Learned, Learner
from aidocks.moe.gating import ComputeGates, Gates, Prompts
from aidocks.moe.report import (
    DrawReport,
    card_sections,
    expert_shares,
    find_warnings,
    warn_of_parallel_rows,
)
from aidocks.moe.target import plan_target
from aidocks.plan import Plan, PlanContext, Stage, WrittenFiles
from aidocks.specs.moe import LEARNED_MODES, PROMPT_MODES, RANDOM_MODES, MoESpec, SharedExpertSpec
from aidocks.specs.moe_result import MoEResult
from aidocks.specs.perplexities import ModelPerplexity

#: Room beside the weights: tokenizer, router rows, pictures.
_BESIDE_WEIGHTS_BYTES = 64 << 20
#: Chunks of every text that the finished model's routing is counted on, at most.
_CHECKED_CHUNKS = 8


class Build:
    """One MoE under construction. Opening it checks everything that headers and configurations can tell.

    Args:
        spec: The request.
        context: Of the plan.
        references: Field -> model reference, ``base_model`` first, then the experts, then the shared ones. All are
            at hand.

    Raises:
        AIDocksError: As :meth:`BuildMoE.preflight`.
    """

    def __init__(self, spec: MoESpec, context: PlanContext, references: dict[str, str]) -> None:
        self.spec = spec
        self.context = context
        self.staged = context.workspace / "model"
        self.members = _open_members(references, context)
        self.base, self.experts = self.members[0], self.members[1 : 1 + len(spec.experts)]
        self.target = plan_target(spec, self.base, self.experts, self.members[1 + len(spec.experts) :])
        self.texts = resolve_texts(
            spec,
            self.base.checkpoint.path,
            self.target.dense.max_position_embeddings,
            context.resolver.allowed_roots,
        )
        self.files = self.target.plan_files(parse_size(spec.max_shard_size))
        self.routers = tuple(map(self.target.router_name, range(self.target.num_layers)))
        self.averaged = self._averaged()
        self.written: list[OutputFile] = []
        self.parents: tuple[Parent, ...] = ()

    def require_space(self) -> None:
        """Raise InsufficientDisk when the result would not fit."""
        require_space(self.context.workspace, sum(file.nbytes for file in self.files) + _BESIDE_WEIGHTS_BYTES)

    def run(self, name: str) -> Plan[MoEResult]:
        """Yield the stages; return the result of what is then staged, not published yet."""
        for note in (*self.target.notes, *self.texts.notes, *self._equal_experts()):
            self.context.say(note)
        if not self.averaged:
            self.context.say(
                "Only some of the experts have a head of their own (tie_word_embeddings): there is no plain average to "
                "compare with."
            )
        yield from require_unchanged(member.checkpoint.path for member in self.members)
        gates = yield from self._assemble()
        learned = (yield from self._learn()) if gates is None else None
        file = learned.file if learned else gates.file if gates else None
        assert file is not None, "gates are computed or learned"
        router: list[WrittenFiles] = yield Stage(
            "router", (WriteRouter(gates=file, directory=self.staged, shard=self.files[-1]),)
        )
        self._keep(router)
        result = self._result(name, gates, learned)
        if not self.spec.evaluate:
            return result
        return (yield from self._measure(name, result, gates, learned))

    def finished(self, result: MoEResult) -> Staged:
        """Describe what is staged once :meth:`run` has returned ``result``."""
        return Staged(
            directory=self.staged,
            files=self.written,
            parents=self.parents,
            parameters=self.target.parameters,
            dtype=self.target.dtype,
            architecture=self.target.class_name,
            sections=card_sections(result),
        )

    def _assemble(self) -> Generator[Stage, list[Any], Gates | None]:
        """Write all weights but the routers; beside it, compute gates that do not need them, and hash the parents."""
        writers = assembly_units(self.target, self.files, self.staged)
        named = [(m.field, m.reference, m.checkpoint.path) for m in self.members]
        hashes = parent_units(named, self.context.cache_dir)
        gates = () if self.spec.gate_mode in LEARNED_MODES else (self._compute_gates(),)
        results: list[Any] = yield Stage("assemble", (*gates, *writers, *hashes))
        self._keep(results[len(gates) : len(gates) + len(writers)])
        self.parents = describe_members(named, hashes, results[len(gates) + len(writers) :])
        computed: Gates | None = results[0] if gates else None
        if computed:
            self._tell_of(computed)
        return computed

    def _learn(self) -> Generator[Stage, list[Any], Learned]:
        learner = Learner(
            self.spec,
            self.context.workspace,
            self.staged,
            self.files[-1],
            self.routers,
            self.texts.examples,
            self.base.checkpoint.path,
            self.averaged,
        )
        return (yield from learner.run())

    def _compute_gates(self) -> ComputeGates:
        spec, target = self.spec, self.target
        is_random = spec.gate_mode in RANDOM_MODES
        shared_gates = [target.shared_gate_name(layer) for layer in range(target.num_layers)]
        bits = 4 if spec.load_in_4bit else 8 if spec.load_in_8bit else None
        return ComputeGates(
            base=self.base.checkpoint.path,
            directory=self.context.workspace / "gates",
            mode=spec.gate_mode,
            experts=tuple(Prompts() if is_random else _prompts((expert,)) for expert in spec.experts),
            shared=Prompts() if is_random or not spec.shared_experts else _prompts(spec.shared_experts),
            routers=self.routers,
            shared_gates=tuple(name for name in shared_gates if name and spec.shared_experts),
            hidden_size=target.hidden_size,
            bits=bits if spec.gate_mode in ("hidden", "hidden_avg") else None,
            seed=spec.seed if is_random else 0,
        )

    def _tell_of(self, gates: Gates) -> None:
        if self.spec.gate_mode in PROMPT_MODES and (warning := warn_of_parallel_rows(gates.condition)):
            self.context.say(warning)
        if gates.cut_prompts:
            self.context.say(
                f"{gates.cut_prompts} prompts are longer than the base's context of "
                f"{self.target.dense.max_position_embeddings} tokens; only their ends were used."
            )
        if (self.spec.load_in_4bit or self.spec.load_in_8bit) and gates.bits is None:
            self.context.say(
                "The base was not loaded in fewer bits: that concerns the gate modes 'hidden' and 'hidden_avg' on a "
                "worker with a CUDA GPU."
            )

    def _measure(
        self, name: str, result: MoEResult, gates: Gates | None, learned: Learned | None
    ) -> Plan[MoEResult]:
        references = tuple(expert.source_model for expert in self.spec.experts)
        conditions = gates.condition if gates and self.spec.gate_mode in PROMPT_MODES else ()
        routing: Routing
        (routing,) = yield Stage("check", (self._check(references, gates),))
        self.written += routing.files
        shares = expert_shares(routing, references)
        perplexities = yield from self._evaluate(name)
        warnings = find_warnings(shares, perplexities, conditions)
        report: list[WrittenFiles] = yield Stage(
            "report",
            (
                DrawReport(
                    directory=self.staged,
                    experts=shares,
                    perplexities=perplexities,
                    warnings=warnings,
                    training=learned.training if learned else None,
                    curve=learned.curve if learned else (),
                ),
            ),
        )
        self._keep(report)
        for warning in warnings:
            self.context.say(warning)
        pictures = [file.path for file in self.written if file.path.suffix == ".png"]
        return result.model_copy(
            update={
                "experts": shares,
                "perplexities": perplexities,
                "warnings": warnings,
                "pictures": tuple(path.relative_to(self.staged).as_posix() for path in pictures),
            }
        )

    def _check(self, references: tuple[str, ...], gates: Gates | None) -> CheckMoE:
        return CheckMoE(
            model=self.staged,
            expert_names=references,
            routers=self.routers,
            condition=gates.condition if gates else (),
            parameters=self.target.parameters,
            domains=tuple(
                domain.model_copy(update={"chunks": min(domain.chunks, _CHECKED_CHUNKS)})
                for domain in self.texts.domains
            ),
            seq_length=self.spec.seqlen,
            seed=self.spec.seed,
            tokenizer=self.base.checkpoint.path,
        )

    def _averaged(self) -> tuple[Path, ...]:
        """Return the models whose plain average is the floor; none where some have a head of their own, some not."""
        ties = {read_dense(expert).tie_word_embeddings for expert in self.experts}
        return tuple(expert.checkpoint.path for expert in self.experts) if len(ties) == 1 else ()

    def _evaluate(self, name: str) -> Generator[Stage, list[Any], tuple[ModelPerplexity, ...]]:
        subjects: dict[tuple[Path, ...], tuple[str, str]] = {
            (self.base.checkpoint.path,): ("base", self.base.reference)
        }
        for number, expert in enumerate(self.experts):
            subjects.setdefault((expert.checkpoint.path,), (f"experts[{number}]", expert.reference))
        if len(set(self.averaged)) > 1:
            subjects[self.averaged] = ("average", "plain average of the experts")
        subjects[(self.staged,)] = ("moe", name)
        units = tuple(
            MeasureDomains(
                models=models,
                domains=self.texts.domains,
                seq_length=self.spec.seqlen,
                seed=self.spec.seed,
                dtype=self._measuring_dtype(),
                tokenizer=self.base.checkpoint.path,
                subject=subject,
            )
            for models, (subject, _) in subjects.items()
        )
        results: list[DomainResults] = yield Stage("evaluate", units)
        return model_perplexities(tuple(subjects.values()), results, self.texts.domains)

    def _measuring_dtype(self) -> str | None:
        """Return the type to measure all models in: what the workers choose where all are stored alike."""
        stored = {stored_dtype(m.checkpoint) for m in (self.base, *self.experts)} | {self.target.dtype}
        return None if len(stored) == 1 else "float32"

    def _result(self, name: str, gates: Gates | None, learned: Learned | None) -> MoEResult:
        idle = len(self.experts) - self.spec.num_experts_per_token
        conditions = gates.condition if gates else ()
        known = [number for number in conditions if number is not None]
        return MoEResult(
            model=name,
            architecture=self.target.architecture,
            experts_per_token=self.spec.num_experts_per_token,
            gate_mode=self.spec.gate_mode,
            gate_condition=max(known) if known and len(known) == len(conditions) else None,
            gate_scale=learned.scale if learned else None,
            training=learned.training if learned else None,
            parameters=self.target.parameters,
            active_parameters=self.target.parameters - idle * self.target.expert_parameters,
            bytes=sum(file.nbytes for file in self.files),
        )

    def _keep(self, results: Sequence[WrittenFiles]) -> None:
        self.written += [file for result in results for file in result.files]

    def _equal_experts(self) -> list[str]:
        """Return what to say of experts between which a router cannot choose."""
        if self.spec.gate_mode in RANDOM_MODES:
            return []
        learns = self.spec.gate_mode in LEARNED_MODES
        first: dict[Any, int] = {}
        notes = []
        for number, expert in enumerate(self.spec.experts):
            same = first.setdefault(expert.examples if learns else expert.prompts, number)
            if same != number:
                notes.append(
                    f"experts[{same}] and experts[{number}] have the same {'texts' if learns else 'prompts'}, so their "
                    "router rows are identical: they get the same tokens, or one gets all and the other none."
                )
        return notes


def _prompts(experts: Sequence[SharedExpertSpec]) -> Prompts:
    return Prompts(
        positive=tuple(prompt for expert in experts for prompt in expert.positive_prompts),
        negative=tuple(prompt for expert in experts for prompt in expert.negative_prompts),
    )


def _open_members(references: dict[str, str], context: PlanContext) -> list[Member]:
    opened: dict[str, Checkpoint] = {}
    members = []
    for field, reference in references.items():
        if reference not in opened:
            opened[reference] = context.resolver.open(reference, field=field)
        members.append(Member(field, reference, opened[reference]))
    return members
