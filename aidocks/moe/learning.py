"""The units that learn a router from the experts' texts: fit it, judge candidates, train it.

All of them run a *draft*: the finished weights, linked, with a router of zeros, which they replace in memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from aidocks.checkpoints.files import OutputFile
from aidocks.checkpoints.writer import ShardPlan
from aidocks.errors import CorruptCheckpoint, InvalidSpec
from aidocks.evaluate.memory import memory_to_load
from aidocks.moe.examples import Examples, Part
from aidocks.moe.gate_files import read_gates, write_gates
from aidocks.plan import Unit, UnitContext, UnitResultT, WritingUnit, WrittenFiles

if TYPE_CHECKING:
    import torch

    from aidocks.evaluate.causal_lm import CausalLM
    from aidocks.moe.gate_files import Rows

#: Stands for a loss that is not finite.
_NOT_FINITE = 1e9
_FIRST, _SECOND = "first_moment.", "second_moment."


class GateFile(BaseModel):
    """Router rows that a unit made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: OutputFile


class Judgement(BaseModel):
    """What router rows are worth on the sequences that were set aside.

    Attributes:
        file: The rows.
        losses: Of every expert's texts, in nats per token.
        balance: Load-balancing loss of every layer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: OutputFile
    losses: tuple[float, ...]
    balance: tuple[float, ...]

    @property
    def loss(self) -> float:
        """Mean over the experts' texts: the logarithm of the geometric mean of their perplexities."""
        return sum(self.losses) / len(self.losses)

    @property
    def mean_balance(self) -> float:
        return sum(self.balance) / len(self.balance)

    def rank(self, floor: Floor) -> tuple[int, float]:
        """Return what to sort candidates by, best first: on how many texts the floor is better, then the loss."""
        return sum(loss > least for loss, least in zip(self.losses, floor.losses, strict=True)), self.loss


class Floor(BaseModel):
    """What a model without a router is worth on the sequences that were set aside.

    Attributes:
        losses: Of every expert's texts, in nats per token.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    losses: tuple[float, ...]


class TrainedGates(BaseModel):
    """Router rows after some steps, with what the optimiser needs to go on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: OutputFile
    losses: tuple[float, ...] = Field(description="Of each step, in nats per token.")
    tokens: int = Field(description="That were learned from.")


class PrepareDraft(WritingUnit):
    """The draft's directory: links to what is staged, and a router of zeros."""

    staged: Path
    directory: Path = Field(description="The draft's directory.")
    router: ShardPlan

    @property
    def label(self) -> str:
        return "draft for learning the router"

    def run(self, context: UnitContext) -> WrittenFiles:
        import torch

        from aidocks.checkpoints.dtypes import to_torch
        from aidocks.checkpoints.writer import ShardWriter

        self.directory.mkdir(parents=True, exist_ok=True)
        for file in self.staged.iterdir():
            link = self.directory / file.name
            if file.is_file() and file.name != self.router.file_name and not link.is_symlink():
                os.symlink(file, link)
        with ShardWriter(self.directory, self.router) as writer:
            for tensor in self.router.tensors:
                writer.write(tensor.name, torch.zeros(tensor.shape, dtype=to_torch(tensor.dtype)))
        return WrittenFiles(files=(writer.output,))


class _LearningUnit(Unit[UnitResultT]):
    """What the units below share."""

    draft: Path = Field(description="Directory of the draft.")
    directory: Path = Field(description="Directory for the file of rows.")
    routers: tuple[str, ...] = Field(description="Name of each layer's router.")
    experts: tuple[Examples, ...] = Field(description="In the order of the router's rows.")
    seq_length: int
    fit_tokens: int
    seed: int
    tokenizer: Path = Field(description="Checkpoint directory whose tokenizer reads the texts: the base's.")

    @property
    def memory(self) -> int | None:
        return memory_to_load(self.draft)

    def _draft(self, context: UnitContext) -> CausalLM:
        from aidocks.evaluate.causal_lm import load_cached

        return load_cached(self.draft, None, context, self.tokenizer)

    def _sequences(self, part: Part, model: CausalLM) -> list[list[torch.Tensor]]:
        from aidocks.moe.examples import take_sequences

        groups = [
            take_sequences(examples, part, model, self.seq_length, self.fit_tokens, self.seed)
            for examples in self.experts
        ]
        if not all(groups):
            number = groups.index([])
            raise InvalidSpec(
                "Every prompt of this expert is a single token, of which nothing can be learned.",
                field=f"experts[{number}].positive_prompts",
                value=list(self.experts[number].prompts),
                hint="Give longer ones, or `positive_texts` or a `dataset`.",
            )
        return groups

    def _stack(self, rows: Rows, prefix: str = "") -> torch.Tensor:
        """Return rows of a file as float32 [L, E, H]."""
        import numpy as np
        import torch

        return torch.from_numpy(np.stack([rows[f"{prefix}{name}"] for name in self.routers]))

    def _write(self, name: str, **tensors: torch.Tensor) -> OutputFile:
        """Write tensors [L, E, H], each under its prefix (``rows`` has none)."""
        self.directory.mkdir(parents=True, exist_ok=True)
        prefixes = {"rows": "", "first": _FIRST, "second": _SECOND}
        return write_gates(
            self.directory / f"{name}.safetensors",
            {
                f"{prefixes[kind]}{router}": layer_EH.float().numpy()
                for kind, tensor_LEH in tensors.items()
                for router, layer_EH in zip(self.routers, tensor_LEH, strict=True)
            },
        )


class FitGates(_LearningUnit[GateFile]):
    """Rows in closed form, by :mod:`aidocks.moe.fitting`."""

    result_type: ClassVar[type[BaseModel]] = GateFile

    @property
    def label(self) -> str:
        return f"fit the routers of {len(self.routers)} layers"

    def run(self, context: UnitContext) -> GateFile:
        import torch

        from aidocks.moe.fitting import fit_along_path

        model = self._draft(context)
        groups = self._sequences("fit", model)
        # Experts with equal texts share them: each then gets half of every token, and the two rows are equal.
        alike = torch.tensor(
            [[float(a == b) for a in self.experts] for b in self.experts], dtype=torch.float64
        )
        shares_EE = alike / alike.sum(1, keepdim=True)
        sequences = [sequence for group in groups for sequence in group]
        shares_BE = torch.cat([shares_EE[e].expand(len(group), -1) for e, group in enumerate(groups)])
        rows_LEH = fit_along_path(model.network, sequences, shares_BE)
        if not bool(torch.isfinite(rows_LEH).all()):
            raise CorruptCheckpoint(
                "The hidden states of the example texts are not finite.", field="base_model"
            )
        return GateFile(file=self._write(f"fitted-{self.unit_id}", rows=rows_LEH))

    def outputs(self, result: GateFile) -> Sequence[OutputFile]:
        return (result.file,)


class JudgeGates(_LearningUnit[Judgement]):
    """The loss of some rows, or of the mean of several, times a factor, on what was set aside."""

    result_type: ClassVar[type[BaseModel]] = Judgement

    files: tuple[OutputFile, ...] = Field(min_length=1)
    scale: float = 1.0

    @property
    def label(self) -> str:
        return f"validate gates × {self.scale:g}"

    def run(self, context: UnitContext) -> Judgement:
        from aidocks.moe.training import validate

        rows = read_gates(self.files)
        gates_LEH = self._stack(rows) * self.scale
        model = self._draft(context)
        losses, balance = validate(model.network, gates_LEH, self._sequences("validate", model))
        return Judgement(
            file=self._write(f"judged-{self.unit_id}", rows=gates_LEH),
            losses=_finite(losses),
            balance=_finite(balance),
        )

    def outputs(self, result: Judgement) -> Sequence[OutputFile]:
        return (result.file,)


class JudgeAverage(_LearningUnit[Floor]):
    """The loss of the experts' plain average on what was set aside: what a router has to beat on every text."""

    result_type: ClassVar[type[BaseModel]] = Floor

    models: tuple[Path, ...] = Field(description="Checkpoint directories of the experts.")

    @property
    def label(self) -> str:
        return "validate the experts' plain average"

    @property
    def memory(self) -> int | None:
        return memory_to_load(*self.models)

    def run(self, context: UnitContext) -> Floor:
        from aidocks.evaluate.domains import load_average
        from aidocks.moe.training import sequence_losses

        average = load_average(self.models, None, context.device, self.tokenizer)
        groups = self._sequences("validate", average)
        return Floor(losses=tuple(sequence_losses(average.network, group) for group in groups))


class TrainGates(_LearningUnit[TrainedGates]):
    """Some steps of :mod:`aidocks.moe.training`, from the mean of where others got to.

    Several of these run side by side on different sequences and are averaged now and then (local SGD, Stich,
    arXiv:1805.09767), so that workers exchange small files, seldom. Their number does not depend on the workers'.
    """

    result_type: ClassVar[type[BaseModel]] = TrainedGates

    starts: tuple[OutputFile, ...] = Field(min_length=1)
    replica: int
    step: int = Field(description="Steps taken before.")
    count: int = Field(description="Steps to take.")
    total_steps: int
    rate: float
    balance: float

    @property
    def label(self) -> str:
        return f"train gates, steps {self.step + 1} to {self.step + self.count}, replica {self.replica + 1}"

    @property
    def weight(self) -> float:
        return float(self.count)

    def run(self, context: UnitContext) -> TrainedGates:
        import torch

        from aidocks.moe.training import Schedule, State, train

        rows = read_gates(self.starts)
        gates_LEH = self._stack(rows)
        moments = [
            self._stack(rows, prefix) if f"{prefix}{self.routers[0]}" in rows else torch.zeros_like(gates_LEH)
            for prefix in (_FIRST, _SECOND)
        ]
        state = State(gates_LEH.clone(), moments[0].clone(), moments[1].clone(), self.step)
        model = self._draft(context)
        seed = (self.seed * 1_000_003 + self.step) * 1_009 + self.replica
        schedule = Schedule(self.rate, self.total_steps, self.balance)
        losses, tokens = train(
            model.network, state, self._sequences("train", model), self.count, schedule, seed
        )
        file = self._write(
            f"trained-{self.unit_id}", rows=state.gates, first=state.first, second=state.second
        )
        return TrainedGates(file=file, losses=_finite(losses), tokens=tokens)

    def outputs(self, result: TrainedGates) -> Sequence[OutputFile]:
        return (result.file,)


def _finite(values: Sequence[float]) -> tuple[float, ...]:
    # JSON knows no infinity; a runaway training is to be outranked, not to fail the job.
    return tuple(round(value, 6) if math.isfinite(value) else _NOT_FINITE for value in values)
