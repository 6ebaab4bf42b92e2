"""The stages that build one MoE, from checked members to published model."""

from __future__ import annotations

from collections.abc import Generator
from math import prod
from pathlib import Path
from typing import Any

from aidocks.checkpoints.files import OutputFile
from aidocks.checkpoints.reader import Checkpoint
from aidocks.checkpoints.space import require_space
from aidocks.checkpoints.writer import parse_size, plan_shards
from aidocks.evaluate.perplexity import MeasurePerplexity, PerplexityResult
from aidocks.evaluate.texts import resolve_text
from aidocks.models.parents import describe_parent
from aidocks.models.publication import Staged
from aidocks.moe.assemble import AssembleShard, WriteBesideWeights
from aidocks.moe.check import CheckMoE, Routing
from aidocks.moe.compatibility import check_members, check_text
from aidocks.moe.dense import Member, mlp_shapes, stored_dtype
from aidocks.moe.gating import ComputeGates, Gates, Prompts
from aidocks.moe.mixtral import mixtral_config, plan_tensors
from aidocks.plan import Plan, PlanContext, Stage, WrittenFiles
from aidocks.specs.moe import ExpertShare, ModelPerplexity, MoEResult, MoESpec

#: Room beside the weights: tokenizer, router rows, pictures.
_BESIDE_WEIGHTS_BYTES = 64 << 20
#: Chunks of text that the finished model is checked on, at most.
_CHECKED_CHUNKS = 8


class Build:
    """One MoE under construction. Opening it checks everything that headers and configurations can tell.

    Args:
        spec: The request.
        context: Of the plan.
        references: Field -> model reference, ``base_model`` first, then the experts. All are at hand.

    Attributes:
        files: What has been staged so far.

    Raises:
        AIDocksError: As :meth:`BuildMoE.preflight`.
    """

    def __init__(self, spec: MoESpec, context: PlanContext, references: dict[str, str]) -> None:
        self.spec = spec
        self.context = context
        self.staged = context.workspace / "model"
        self.files: list[OutputFile] = []
        self.base, *self.experts = _open_members(references, context)
        self.config = check_members(self.base, self.experts)
        self.text = resolve_text(spec.text, context.resolver.allowed_roots)
        check_text(self.base, self.config, self.text, spec)
        self.dtype = spec.dtype or stored_dtype(self.base.checkpoint)
        self.tensors = plan_tensors(self.config, len(self.experts), self.dtype)
        self.shards = plan_shards(self.tensors, parse_size(spec.max_shard_size))
        self.parameters = sum(prod(tensor.shape) for tensor in self.tensors)

    def require_space(self) -> None:
        """Raise InsufficientDisk when the result would not fit."""
        require_space(
            self.context.workspace, sum(shard.nbytes for shard in self.shards) + _BESIDE_WEIGHTS_BYTES
        )

    def run(self, name: str) -> Plan[MoEResult]:
        """Yield the stages; return the result of what is then staged, not published yet."""
        self._warn_of_equal_prompts()
        gates: Gates
        (gates,) = yield Stage("gates", (self._compute_gates(),))
        self._warn_of_gates(gates)
        written: list[WrittenFiles] = yield Stage("assemble", self._writers(gates))
        routing: Routing
        (routing,) = yield Stage("check", (self._check(gates),))
        self.files = [*(file for part in written for file in part.files), *routing.files]
        perplexities = yield from self._evaluate(name)
        return self._result(name, gates, routing, perplexities)

    def finished(self, result: MoEResult) -> Staged:
        """Describe what is staged once :meth:`run` has returned ``result``."""
        return Staged(
            directory=self.staged,
            files=self.files,
            parents=[
                describe_parent(m.field, m.reference, m.checkpoint, self.context.cache_dir)
                for m in (self.base, *self.experts)
            ],
            parameters=self.parameters,
            dtype=self.dtype,
            architecture="MixtralForCausalLM",
            # By subject: the model card shows single numbers, and counts lists.
            figures={"perplexity": {m.model: m.perplexity for m in result.perplexities}},
        )

    def _compute_gates(self) -> ComputeGates:
        is_random = self.spec.gate_mode == "random"
        return ComputeGates(
            base=self.base.checkpoint.path,
            directory=self.context.workspace / "gates",
            mode=self.spec.gate_mode,
            experts=tuple(
                Prompts() if is_random else Prompts(positive=e.positive_prompts, negative=e.negative_prompts)
                for e in self.spec.experts
            ),
            num_layers=self.config.num_hidden_layers,
            hidden_size=self.config.hidden_size,
            dtype=self.dtype,
            seed=self.spec.seed if is_random else 0,
        )

    def _writers(self, gates: Gates) -> tuple[AssembleShard | WriteBesideWeights, ...]:
        base = self.base.checkpoint
        shards = [
            AssembleShard(
                base=base.path,
                experts=tuple(expert.checkpoint.path for expert in self.experts),
                router=gates.file,
                directory=self.staged,
                shard=shard,
            )
            for shard in self.shards
        ]
        config = mixtral_config(
            base.config, self.config, len(self.experts), self.spec.num_experts_per_token, self.dtype
        )
        beside = WriteBesideWeights(base=base.path, directory=self.staged, config=config, shards=self.shards)
        return (*shards, beside)

    def _check(self, gates: Gates) -> CheckMoE:
        return CheckMoE(
            model=self.staged,
            expert_names=tuple(expert.source_model for expert in self.spec.experts),
            gates=gates,
            parameters=self.parameters,
            text=self.text,
            seq_length=self.spec.seqlen,
            chunks=min(self.spec.chunks, _CHECKED_CHUNKS),
            seed=self.spec.seed,
        )

    def _evaluate(self, name: str) -> Generator[Stage, list[Any], tuple[ModelPerplexity, ...]]:
        if not self.spec.evaluate:
            return ()
        subjects: dict[Path, tuple[str, str]] = {self.base.checkpoint.path: ("base", self.base.reference)}
        for number, expert in enumerate(self.experts):
            subjects.setdefault(expert.checkpoint.path, (f"experts[{number}]", expert.reference))
        subjects[self.staged] = ("moe", name)
        units = tuple(
            MeasurePerplexity(
                model=path,
                text=self.text,
                seq_length=self.spec.seqlen,
                chunks=self.spec.chunks,
                seed=self.spec.seed,
            )
            for path in subjects
        )
        results: list[PerplexityResult] = yield Stage("evaluate", units)
        return tuple(
            ModelPerplexity(
                model=model,
                reference=reference,
                perplexity=result.perplexity,
                standard_error=result.standard_error,
                tokens=result.total_tokens,
            )
            for (model, reference), result in zip(subjects.values(), results, strict=True)
        )

    def _result(
        self, name: str, gates: Gates, routing: Routing, perplexities: tuple[ModelPerplexity, ...]
    ) -> MoEResult:
        layers = len(routing.load)
        shares = tuple(
            ExpertShare(
                source_model=expert.source_model,
                load=sum(row[number] for row in routing.load) / layers,
                weight=sum(row[number] for row in routing.weight) / layers,
                idle_layers=sum(row[number] == 0 for row in routing.load),
            )
            for number, expert in enumerate(self.spec.experts)
        )
        idle_experts = len(self.experts) - self.spec.num_experts_per_token
        expert_parameters = sum(prod(shape) for shape in mlp_shapes(self.config).values())
        return MoEResult(
            model=name,
            experts=shares,
            experts_per_token=self.spec.num_experts_per_token,
            gate_mode=self.spec.gate_mode,
            gate_condition=gates.worst_condition,
            perplexities=perplexities,
            parameters=self.parameters,
            active_parameters=self.parameters - idle_experts * expert_parameters,
            bytes=sum(shard.nbytes for shard in self.shards),
            pictures=tuple(
                file.path.relative_to(self.staged).as_posix()
                for file in routing.files
                if file.path.suffix == ".png"
            ),
        )

    def _warn_of_equal_prompts(self) -> None:
        if self.spec.gate_mode == "random":
            return
        first: dict[Any, int] = {}
        for number, expert in enumerate(self.spec.experts):
            same = first.setdefault(expert.prompts, number)
            if same != number:
                self.context.say(
                    f"experts[{same}] and experts[{number}] have the same prompts, so their router rows are "
                    "identical and they share their tokens evenly."
                )

    def _warn_of_gates(self, gates: Gates) -> None:
        if gates.warning:
            self.context.say(gates.warning)
        if gates.cut_prompts:
            self.context.say(
                f"{gates.cut_prompts} prompts are longer than the base's context of "
                f"{self.config.max_position_embeddings} tokens; only their ends were used."
            )


def _open_members(references: dict[str, str], context: PlanContext) -> list[Member]:
    opened: dict[str, Checkpoint] = {}
    members = []
    for field, reference in references.items():
        if reference not in opened:
            opened[reference] = context.resolver.open(reference, field=field)
        members.append(Member(field, reference, opened[reference]))
    return members
