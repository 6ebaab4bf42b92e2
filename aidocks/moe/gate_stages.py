"""From the experts' texts to router rows: the stages of the gate modes ``fitted`` and ``trained``."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from aidocks.checkpoints.files import OutputFile
from aidocks.checkpoints.writer import ShardPlan
from aidocks.moe.examples import Examples
from aidocks.moe.learning import (
    FitGates,
    Floor,
    GateFile,
    JudgeAverage,
    JudgeGates,
    Judgement,
    PrepareDraft,
    TrainedGates,
    TrainGates,
)
from aidocks.moe.report import TrainingPoint
from aidocks.plan import Stage
from aidocks.specs.moe import MoESpec
from aidocks.specs.moe_result import GateTraining

#: Scales of fitted rows to choose from: how decided a router is.
SCALES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
#: The scale where an expert has prompts alone: a few short sequences cannot tell which is best.
PROMPT_SCALE = 4.0
#: Steps between two averages, and trainings that run side by side: fixed, so that the result does not depend on the
#: number of workers.
ROUND_STEPS = 25
REPLICAS = 2


@dataclass(frozen=True)
class Learned:
    """Router rows that were learned.

    Attributes:
        file: The rows in float32.
        scale: The factor that was best for the fitted rows.
        curve: Of a training.
    """

    file: OutputFile
    scale: float
    training: GateTraining | None = None
    curve: tuple[TrainingPoint, ...] = ()


class Learner:
    """Learns the router of one MoE whose weights are staged.

    Args:
        spec: The request.
        workspace: Of the job.
        staged: Directory of the staged weights.
        router: The router's weight file.
        routers: Name of each layer's router.
        examples: Texts of every expert.
        tokenizer: Checkpoint directory whose tokenizer reads the texts.
        averaged: Checkpoint directory of every expert, where their plain average exists.
    """

    def __init__(
        self,
        spec: MoESpec,
        workspace: Path,
        staged: Path,
        router: ShardPlan,
        routers: tuple[str, ...],
        examples: Sequence[Examples],
        tokenizer: Path,
        averaged: tuple[Path, ...],
    ) -> None:
        self._spec = spec
        self._prepare = PrepareDraft(staged=staged, directory=workspace / "draft", router=router)
        self._shared: dict[str, Any] = {
            "draft": workspace / "draft",
            "directory": workspace / "gates",
            "routers": routers,
            "experts": tuple(examples),
            "seq_length": spec.seqlen,
            "fit_tokens": spec.fit_tokens,
            "seed": spec.seed,
            "tokenizer": tokenizer,
        }
        self._average = (JudgeAverage(**self._shared, models=averaged),) if averaged else ()

    def run(self) -> Generator[Stage, list[Any], Learned]:
        """Yield the stages; return the best rows that were found."""
        yield Stage("draft", (self._prepare,))
        fitted: GateFile
        (fitted,) = yield Stage("fit", (FitGates(**self._shared),))
        scales = SCALES if all(texts.chunks for texts in self._shared["experts"]) else (PROMPT_SCALE,)
        candidates = tuple(self._judge((fitted.file,), scale) for scale in scales)
        results: list[Any] = yield Stage("scale", (*self._average, *candidates))
        floor = results.pop(0) if self._average else Floor(losses=(inf,) * len(self._shared["experts"]))
        judged: list[Judgement] = results
        best = min(range(len(scales)), key=lambda number: judged[number].rank(floor))
        if self._spec.gate_mode == "fitted":
            return Learned(judged[best].file, scales[best])
        return (yield from self._train(judged[best], scales[best], floor))

    def _judge(self, files: tuple[OutputFile, ...], scale: float = 1.0) -> JudgeGates:
        return JudgeGates(**self._shared, files=files, scale=scale)

    def _train(self, start: Judgement, scale: float, floor: Floor) -> Generator[Stage, list[Any], Learned]:
        """Train round after round; each round's average is judged beside the next round's steps."""
        best, curve = start, [_point(0, start)]
        files: tuple[OutputFile, ...] = (start.file,)
        tokens, step, total = 0, 0, self._spec.gate_steps
        while step < total:
            count = min(ROUND_STEPS, total - step)
            units: list[Any] = [self._steps(files, replica, step, count) for replica in range(REPLICAS)]
            if step:
                units.append(self._judge(files))
            results: list[Any] = yield Stage(f"train to step {step + count}", tuple(units))
            if step:
                best = _record(curve, step, results.pop(), best, floor)
            trained: list[TrainedGates] = results
            tokens += sum(result.tokens for result in trained)
            files = tuple(result.file for result in trained)
            step += count
        (last,) = yield Stage("validate", (self._judge(files),))
        best = _record(curve, step, last, best, floor)
        training = GateTraining(
            steps=total,
            tokens=tokens,
            loss_before=start.loss,
            loss_after=best.loss,
            aux_loss_before=start.mean_balance,
            aux_loss_after=best.mean_balance,
        )
        return Learned(best.file, scale, training, tuple(curve))

    def _steps(self, starts: tuple[OutputFile, ...], replica: int, step: int, count: int) -> TrainGates:
        return TrainGates(
            **self._shared,
            starts=starts,
            replica=replica,
            step=step,
            count=count,
            total_steps=self._spec.gate_steps,
            rate=self._spec.gate_learning_rate,
            balance=self._spec.router_aux_loss_coef,
        )


def _record(
    curve: list[TrainingPoint], step: int, judged: Judgement, best: Judgement, floor: Floor
) -> Judgement:
    """Note a judgement in the curve; return the better one: training never ends worse than it began."""
    curve.append(_point(step, judged))
    return min(best, judged, key=lambda judgement: judgement.rank(floor))


def _point(step: int, judged: Judgement) -> TrainingPoint:
    losses = {f"experts[{number}]": loss for number, loss in enumerate(judged.losses)}
    return TrainingPoint(step=step, losses=losses, aux_loss=judged.mean_balance)
