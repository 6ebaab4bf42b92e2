"""The unit that writes the report: the ledger of all candidates, and the pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field

from aidocks.checkpoints.files import OutputFile, write_bytes, write_text
from aidocks.laser.matrices import Matrix
from aidocks.laser.scan import MatrixSpectrum
from aidocks.laser.selection import Candidate
from aidocks.plan import UnitContext, WritingUnit, WrittenFiles
from aidocks.specs.laser import BeforeAfter, Rule

#: Matrices whose spectrum is drawn, at most.
PICTURED = 4


class WriteReport(WritingUnit):
    """``report/ledger.json``, ``report/spectra.json`` and the PNG pictures."""

    checkpoint: Path = Field(description="Checkpoint directory of the base.")
    directory: Path = Field(description="Directory in which the result is staged.")
    rule: Rule
    z_threshold: float
    spectra: tuple[MatrixSpectrum, ...]
    candidates: tuple[Candidate, ...]
    search: BeforeAfter
    held_out: BeforeAfter

    @property
    def label(self) -> str:
        return "ledger and pictures"

    def run(self, context: UnitContext) -> WrittenFiles:
        from aidocks.laser import figures
        from aidocks.laser.scan import open_checkpoint
        from aidocks.laser.spectrum import singular_values

        folder = self.directory / "report"
        checkpoint = open_checkpoint(self.checkpoint, context)
        written = [
            _write_json(folder / "ledger.json", self._ledger()),
            _write_json(folder / "spectra.json", [s.model_dump(mode="json") for s in self.spectra]),
        ]
        pictured = [
            (matrix, singular_values(checkpoint.tensor(matrix.name).to(context.device)).numpy())
            for matrix in self._pictured()
        ]
        pictures = {
            "spectra.png": figures.draw_spectra(pictured),
            "candidates.png": figures.draw_candidates(self.candidates, self.z_threshold),
            "before_after.png": figures.draw_before_after(self.search, self.held_out),
        }
        written += [write_bytes(folder / name, image) for name, image in pictures.items()]
        return WrittenFiles(files=tuple(written))

    def _pictured(self) -> list[Matrix]:
        """Accepted matrices first, then one of each kind that is not shown yet."""
        shown = [c.matrix for c in self.candidates if c.verdict == "accepted"]
        for matrix in [*(c.matrix for c in self.candidates), *(s.matrix for s in self.spectra)]:
            if matrix.kind not in {m.kind for m in shown}:
                shown.append(matrix)
        return shown[:PICTURED]

    def _ledger(self) -> dict[str, Any]:
        return {
            "rule": self.rule,
            "z_threshold": self.z_threshold,
            "search": self.search.model_dump(mode="json"),
            "held_out": self.held_out.model_dump(mode="json"),
            "candidates": [_line(candidate) for candidate in self.candidates],
        }


def _line(candidate: Candidate) -> dict[str, Any]:
    line: dict[str, Any] = {
        "name": candidate.matrix.name,
        "layer": candidate.matrix.layer,
        "kind": candidate.matrix.kind,
        "rank": candidate.rank,
        "full_rank": candidate.matrix.full_rank,
        "energy": candidate.energy,
        "snr": candidate.noise_ratio,
        "accepted": candidate.verdict == "accepted",
        "verdict": candidate.verdict,
    }
    for prefix, effect in (("", candidate.alone), ("composed_", candidate.composed)):
        line[f"{prefix}delta"] = effect.delta if effect else None
        line[f"{prefix}standard_error"] = effect.standard_error if effect else None
        line[f"{prefix}z"] = effect.z if effect else None
    return line


def _write_json(target: Path, content: Any) -> OutputFile:
    return write_text(target, json.dumps(content, indent=1) + "\n")
