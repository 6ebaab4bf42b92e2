"""The report of a search: the files of the ledger, the pictures, and what the model card tells."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import Field

from aidocks.checkpoints.files import OutputFile, write_bytes, write_text
from aidocks.laser.ledger import (
    LedgerLine,
    loss_unit,
    part_title,
    short_truncation,
    with_error,
    written_value,
    written_z,
)
from aidocks.laser.matrices import Matrix
from aidocks.laser.scan import MatrixSpectrum, ScanMatrix
from aidocks.models.manifest import Section, Table
from aidocks.plan import UnitContext, WritingUnit, WrittenFiles
from aidocks.specs.laser_result import AcceptedReduction, LaserResult
from aidocks.specs.objective import Metric
from aidocks.specs.part_score import PartScore, ScoredPart

#: Matrices whose spectrum is drawn, at most.
PICTURED = 6
#: Rows of a table on the model card, at most; the ledger has all.
_MOST_ROWS = 40
#: A change that is so many standard errors large stands out in a table.
_CLEAR = 2.0


def choose_pictured(spectra: Sequence[MatrixSpectrum], lines: Sequence[LedgerLine]) -> tuple[Matrix, ...]:
    """Return the matrices whose spectrum is drawn: accepted ones first, then one of each kind not shown yet.

    Args:
        spectra: Of all matrices that were scanned.
        lines: Of the ledger.
    """
    matrices = {spectrum.matrix.address: spectrum.matrix for spectrum in spectra}
    shown = {
        line.address: matrices[line.address] for line in lines if line.accepted and line.address in matrices
    }
    tried = [matrices[line.address] for line in lines if line.address in matrices]
    for matrix in (*tried, *matrices.values()):
        if matrix.kind not in {other.kind for other in shown.values()}:
            shown[matrix.address] = matrix
    return tuple(shown.values())[:PICTURED]


class WriteReport(WritingUnit):
    """``report/ledger.json``, ``report/spectra.json`` and the PNG pictures."""

    directory: Path = Field(description="Directory in which the result is staged.")
    metric: Metric = Field(description="Of the objective.")
    z_threshold: float
    lines: tuple[LedgerLine, ...]
    spectra: tuple[MatrixSpectrum, ...]
    pictured: tuple[ScanMatrix, ...] = Field(
        (),
        description="Scans of the matrices whose spectrum is drawn; their values are kept since they were scanned.",
    )
    scores: tuple[PartScore, ...] = Field((), description="Of the objective, then of the guards.")
    taken_back_because: str | None = None

    @property
    def label(self) -> str:
        return "ledger and pictures"

    def run(self, context: UnitContext) -> WrittenFiles:
        from aidocks.laser import figures
        from aidocks.laser.scan_figures import draw_spectra

        folder = self.directory / "report"
        written = [
            _write_json(folder / "ledger.json", self._ledger()),
            _write_json(folder / "spectra.json", [s.model_dump(mode="json") for s in self.spectra]),
        ]
        values = [(scan.matrix, scan.values(context)) for scan in self.pictured]
        pictures = {
            "spectra.png": draw_spectra(values) if values else None,
            "candidates.png": figures.draw_candidates(self.lines, self.z_threshold, self.metric),
            "predictions.png": figures.draw_predictions(self.lines, self.metric),
            "before_after.png": figures.draw_before_after(self.scores),
        }
        written += [write_bytes(folder / name, image) for name, image in pictures.items() if image]
        return WrittenFiles(files=tuple(written))

    def _ledger(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "unit": loss_unit(self.metric),
            "z_threshold": self.z_threshold,
            "taken_back_because": self.taken_back_because,
            "scores": [score.model_dump(mode="json") for score in self.scores],
            "candidates": [line.model_dump(mode="json") for line in self.lines],
        }


def scores_of(result: LaserResult) -> tuple[PartScore, ...]:
    """Return everything that a result was measured on: the objective's parts, then the parts of each guard."""
    objective = (score for score in (result.search, result.held_out, result.report) if score is not None)
    guards = list(dict.fromkeys(score.label for score in result.guards))
    parts = get_args(ScoredPart)
    ordered = sorted(result.guards, key=lambda score: (guards.index(score.label), parts.index(score.part)))
    return (*objective, *ordered)


def sections(result: LaserResult, lines: Sequence[LedgerLine]) -> tuple[Section, ...]:
    """Return what the model card tells: what was changed and why, base against result, and how it is stored.

    Args:
        result: What the job found.
        lines: Of the ledger.
    """
    made = [_evidence(result, lines)]
    scores = scores_of(result)
    if scores:
        made.append(_comparison(scores))
    if result.output == "factored" and result.parameters < result.parameters_before:
        made.append(_storage(result))
    return tuple(made)


def _evidence(result: LaserResult, lines: Sequence[LedgerLine]) -> Section:
    objective = next(iter(scores_of(result)), None)
    goal = objective.label if objective else "the objective"
    effort = f"{_count(result.candidates_tried, 'reduction')} measured on {goal}"
    if result.candidates_screened:
        effort = f"{_count(result.candidates_screened, 'reduction')} screened by a gradient, " + effort
    effort = f"{_count(result.matrices_scanned, 'matrix', 'matrices')} scanned, {effort}."
    if not result.accepted:
        return Section(title="What was changed", text=(_nothing_helped(result, lines), effort))
    unit = loss_unit(objective.metric) if objective else "per item"
    text = [
        f"{_count(len(result.accepted), 'matrix', 'matrices')} of lower rank; everything else is the base's, byte for "
        f"byte. {effort}",
        f"Change: of the mean loss when it was accepted, in {unit}, ± its paired standard error; negative is better.",
    ]
    if any(accepted.group is not None for accepted in result.accepted):
        text.append("Those marked (group) were accepted together; their change is that of the whole group.")
    if result.taken_back:
        text.append(_taken_back(result))
    left_out = len(result.accepted) - _MOST_ROWS
    if left_out > 0:
        text.append(f"{left_out} more are in report/ledger.json.")
    table = Table(
        header=("matrix", "rank", "directions", "proposed by", "energy", "change", "z"),
        rows=tuple(_accepted_row(accepted) for accepted in result.accepted[:_MOST_ROWS]),
    )
    return Section(title="What was changed", text=tuple(text), table=table)


def _accepted_row(accepted: AcceptedReduction) -> tuple[str, ...]:
    return (
        accepted.name,
        f"{accepted.rank} of {accepted.full_rank}",
        short_truncation(accepted.truncation) + (", shrunk" if accepted.shrink else ""),
        accepted.rule,
        "" if accepted.energy is None else f"{accepted.energy:.1%}",
        with_error(accepted.delta, accepted.standard_error) + ("" if accepted.group is None else " (group)"),
        written_z(accepted.z),
    )


def _nothing_helped(result: LaserResult, lines: Sequence[LedgerLine]) -> str:
    if result.taken_back:
        return f"Nothing. {_taken_back(result)} The weights are those of the base, byte for byte."
    known = [(line.z, line) for line in lines if line.z is not None and line.delta is not None]
    closest = ""
    if known:
        z, line = min(known, key=lambda pair: pair[0])
        change = with_error(line.delta, line.standard_error)
        closest = f" The closest was {line.label}, with a change of {change} (z = {written_z(z)})."
    return (
        "Nothing: no reduction made the model significantly better without hurting a guard."
        f"{closest} The weights are those of the base, byte for byte."
    )


def _taken_back(result: LaserResult) -> str:
    names = ", ".join(result.taken_back[:_MOST_ROWS])
    return f"The search had also accepted {names}; that was taken back: {result.taken_back_because}"


def _comparison(scores: Sequence[PartScore]) -> Section:
    rows, strong = [], []
    for number, score in enumerate(scores):
        rows.append(
            (
                score.label,
                part_title(score.part),
                written_value(score, score.before, score.before_standard_error),
                written_value(score, score.after, score.after_standard_error),
                "" if score.z is None and not score.delta else _change(score),
                written_z(score.z),
                f"{score.items:,}",
            )
        )
        if score.z is not None and abs(score.z) >= _CLEAR:
            strong.append((number, 5))
    return Section(
        title="Base and result",
        text=(
            "The search items chose the reductions, so their figures flatter the result; the held-out items had to "
            "confirm it; the report items had no part in any decision. Both models saw the same items: z is the mean "
            "change of the loss over its paired standard error (negative is better; bold from 2 on), and says more "
            "than the two values do, whose own errors are those of drawing other items.",
        ),
        table=Table(
            header=("measured", "part", "base", "this model", "change of the loss", "z", "items"),
            rows=tuple(rows),
            strong=tuple(strong),
        ),
    )


def _change(score: PartScore) -> str:
    return f"{with_error(score.delta, score.delta_standard_error)} {loss_unit(score.metric)}"


def _storage(result: LaserResult) -> Section:
    saved = 1 - result.parameters / result.parameters_before
    return Section(
        title="Stored as factors",
        text=(
            f"Reduced matrices are stored as two factors: {result.parameters:,} parameters, {saved:.1%} fewer than "
            f"the base's {result.parameters_before:,}. transformers refuses such a model until one has written: "
            "import aidocks.laser.factored. Where that is not possible, aidocks.laser.factors.to_dense makes an "
            "ordinary checkpoint of it.",
        ),
    )


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _write_json(target: Path, content: Any) -> OutputFile:
    return write_text(target, json.dumps(content, indent=1) + "\n")
