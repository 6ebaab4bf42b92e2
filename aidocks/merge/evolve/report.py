"""What is told of a search: its scores, the ledger of all candidates, the picture, and the sections of the card."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from aidocks.checkpoints.files import write_bytes, write_text
from aidocks.evaluate.comparison import shown
from aidocks.evaluate.objectives import ObjectiveSource
from aidocks.evaluate.scores import part_score
from aidocks.laser.ledger import loss_unit, part_title, with_error, written_value, written_z
from aidocks.merge.evolve.evolution import Findings, Trial
from aidocks.models.manifest import Section, Table
from aidocks.plan import UnitContext, WritingUnit, WrittenFiles
from aidocks.specs.merge_evolve_result import FoundValue, InputScores, MergeEvolveResult
from aidocks.specs.objective import Metric
from aidocks.specs.part_score import PartScore, ScoredPart
from aidocks.specs.search_space import Variable, place_text

#: Rows of a table on the model card, at most; the ledger has all.
_MOST_ROWS = 40


class EvolutionLine(BaseModel):
    """One candidate, on the search data.

    Attributes:
        generation: From 1; 0 for the start and for the distribution's centre in the end.
        what: ``start``, ``drawn`` or ``centre``.
        values: Of the searched numbers, in their order.
        loss: Mean loss of the objective; where it was not measured to the end, as its change so far lets expect.
        delta: Change against the start; negative is better. So are the two after it.
        items: Items that it was measured on.
        guards: z of every guard, by its label; positive is worse.
        decision: In words.
        is_sound: Whether it was measured to the end, and breaks no guard.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    generation: int
    what: str
    values: tuple[float, ...]
    loss: float | None
    delta: float | None
    standard_error: float | None
    z: float | None
    items: int
    guards: dict[str, float | None] = Field(default_factory=dict)
    decision: str
    is_sound: bool


def ledger(findings: Findings, objectives: Sequence[ObjectiveSource]) -> tuple[EvolutionLine, ...]:
    """Return one line for every merge that was measured on the search data."""
    labels = [source.label for source in objectives[1:]]
    return tuple(_line(trial, findings, labels) for trial in findings.trials)


def _line(trial: Trial, findings: Findings, labels: Sequence[str]) -> EvolutionLine:
    change = trial.pairs[0].comparison if trial.pairs else None
    delta = change.delta if change else None
    start = findings.trials[0].cost
    return EvolutionLine(
        generation=trial.generation,
        what=trial.what,
        values=trial.values,
        loss=None if delta is None else start + delta,
        delta=delta,
        standard_error=change.standard_error if change else None,
        z=change.z if change else None,
        items=len(trial.pairs[0].positions) if trial.pairs else 0,
        guards={label: p.comparison.z for label, p in zip(labels, trial.pairs[1:], strict=False)},
        decision=_decision(trial, findings),
        is_sound=trial.is_sound,
    )


def _decision(trial: Trial, findings: Findings) -> str:
    if trial.losses.fault is not None:
        return f"cannot be merged: {trial.losses.fault}"
    if not trial.is_sound:
        if trial.pairs[0].comparison.delta is None:
            return "gives losses that are not finite"
        is_whole = len(trial.pairs[0].positions) == len(findings.trials[0].losses.losses[0].positions)
        return "breaks a guard" if is_whole else "not measured to the end: much worse than the start"
    if trial.values == findings.values:
        return "the result"
    return "best found, not accepted" if trial.values == findings.found else "measured"


def scores_of(
    findings: Findings, objectives: Sequence[ObjectiveSource]
) -> tuple[dict[ScoredPart, PartScore], tuple[PartScore, ...]]:
    """Return the scores of the objective by part, and those of the guards on held-out and report data."""
    parts: tuple[ScoredPart, ...] = ("search", "held_out", "report")
    objective = {part: part_score(objectives[0], part, findings.scores[part][0]) for part in parts}
    guards = tuple(
        part_score(source, part, pairs)
        for number, source in enumerate(objectives[1:], 1)
        for part in parts[1:]
        for pairs in findings.scores[part][number : number + 1]
    )
    return objective, guards


def input_scores(findings: Findings, objective: ObjectiveSource) -> tuple[InputScores, ...]:
    """Return the scores of every model alone against the result."""
    parts: tuple[ScoredPart, ...] = ("held_out", "report")
    return tuple(
        InputScores(
            model=shown(reference),
            scores=tuple(part_score(objective, part, pairs[part]) for part in parts),
        )
        for reference, pairs in findings.inputs.items()
    )


def found_values(variables: Sequence[Variable], findings: Findings) -> tuple[FoundValue, ...]:
    """Return the searched numbers, with what became of them."""
    return tuple(
        FoundValue(
            name=variable.name,
            places=tuple(map(place_text, variable.places)),
            min=variable.low,
            max=variable.high,
            initial=variable.initial,
            found=found,
            value=value,
        )
        for variable, found, value in zip(variables, findings.found, findings.values, strict=True)
    )


class WriteEvolution(WritingUnit):
    """``report/evolution.json`` and the pictures."""

    directory: Path = Field(description="Directory in which the result is staged.")
    metric: Metric = Field(description="Of the objective.")
    result: MergeEvolveResult
    lines: tuple[EvolutionLine, ...]
    spreads: tuple[float, ...]

    @property
    def label(self) -> str:
        return "ledger and pictures"

    def run(self, context: UnitContext) -> WrittenFiles:
        from aidocks.laser.figures import draw_before_after
        from aidocks.merge.evolve.figures import draw_evolution

        folder = self.directory / "report"
        told = self.result.model_dump(
            mode="json",
            include={"accepted", "objection", "values", "search", "held_out", "report", "guards", "inputs"},
        )
        told |= {
            "unit": loss_unit(self.metric),
            "spreads": self.spreads,
            "candidates": [line.model_dump(mode="json") for line in self.lines],
        }
        pictures = {
            "evolution.png": draw_evolution(self.lines, self.result.values, self.spreads, self.metric),
            "before_after.png": draw_before_after(all_scores(self.result)),
        }
        files = [write_text(folder / "evolution.json", json.dumps(told, indent=1) + "\n")]
        files += [write_bytes(folder / name, image) for name, image in pictures.items() if image]
        return WrittenFiles(files=tuple(files))


def all_scores(result: MergeEvolveResult) -> tuple[PartScore, ...]:
    """Return the scores of the objective, then those of the guards."""
    objective = (score for score in (result.search, result.held_out, result.report) if score is not None)
    return (*objective, *result.guards)


def sections(result: MergeEvolveResult) -> tuple[Section, ...]:
    """Return what the model card tells: the values, initial against result, and the models alone."""
    return tuple(filter(None, (_values(result), _comparison(result), _inputs(result))))


def _values(result: MergeEvolveResult) -> Section:
    effort = (
        f"{result.candidates} merges measured on the search data in {result.generations} generations (CMA-ES); it "
        f"ended because {result.stopped_because}."
    )
    if result.accepted:
        text = "The values in the column `value` were found by a search, and confirmed on held-out data."
    else:
        text = f"What was found was not kept: {result.objection} The values are the initial ones."
    rows = tuple(
        (v.name, f"{v.min:g} … {v.max:g}", f"{v.initial:g}", f"{v.found:g}", f"{v.value:g}")
        for v in result.values[:_MOST_ROWS]
    )
    left_out = len(result.values) - len(rows)
    more = (f"{left_out} more are in report/evolution.json.",) if left_out else ()
    table = Table(header=("searched", "range", "initial", "found", "value"), rows=rows)
    return Section(title="Search", text=(text, effort, *more), table=table)


def _comparison(result: MergeEvolveResult) -> Section:
    text = (
        "The search items chose the values, so their figures flatter the result; the held-out items had to confirm "
        "them; the report items had no part in any decision. Both merges saw the same items: z is the mean change of "
        "the loss over its paired standard error (negative is better)."
    )
    rows = ((score.label, *_cells(score)) for score in all_scores(result))
    return Section(
        title="Initial values and result", text=(text,), table=_table("measured", "initial values", rows)
    )


def _inputs(result: MergeEvolveResult) -> Section | None:
    if not result.inputs:
        return None
    rows = ((shown(alone.model), *_cells(score)) for alone in result.inputs for score in alone.scores)
    label = result.inputs[0].scores[0].label
    text = f"Every model alone beside the result: {label}."
    return Section(title="Models and result", text=(text,), table=_table("model", "alone", rows))


def _table(first: str, before: str, rows: Iterable[tuple[str, ...]]) -> Table:
    return Table(
        header=(first, "part", before, "this model", "change of the loss", "z", "items"), rows=tuple(rows)
    )


def _cells(score: PartScore) -> tuple[str, ...]:
    change = (
        "" if score.z is None and not score.delta else with_error(score.delta, score.delta_standard_error)
    )
    return (
        part_title(score.part),
        written_value(score, score.before, score.before_standard_error),
        written_value(score, score.after, score.after_standard_error),
        change,
        written_z(score.z),
        f"{score.items:,}",
    )
