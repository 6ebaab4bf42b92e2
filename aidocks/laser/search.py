"""From matrices to accepted reductions: scan, measure, compose, verify."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from aidocks.evaluate.perplexity import PerplexityResult, compare
from aidocks.evaluate.texts import Split, TextSource
from aidocks.laser.evaluation import EvaluateReductions
from aidocks.laser.matrices import Matrix
from aidocks.laser.scan import MatrixSpectrum, ScanMatrix
from aidocks.laser.selection import Candidate, choose_candidates, compose_greedily
from aidocks.plan import Stage
from aidocks.specs.laser import BeforeAfter, LaserSpec


@dataclass(frozen=True)
class Findings:
    """What the search found.

    Attributes:
        accepted: Reductions of the result, in order of acceptance.
        candidates: All that were tried, in the order of selection.
        withdrawn: True when the held-out chunks contradicted the search, so nothing is accepted.
    """

    spectra: tuple[MatrixSpectrum, ...]
    candidates: tuple[Candidate, ...]
    accepted: tuple[Candidate, ...]
    search: BeforeAfter
    held_out: BeforeAfter
    withdrawn: bool


@dataclass(frozen=True)
class Search:
    """The search of one request.

    Attributes:
        base: Checkpoint directory of the base.
        parallelism: Measurements at once, without influence on the findings.
        say: Tells people what was found.
    """

    spec: LaserSpec
    base: Path
    text: TextSource
    parallelism: int
    say: Callable[[str], None]

    def run(self, matrices: Sequence[Matrix]) -> Generator[Stage, list[Any], Findings]:
        """Yield the stages of the search over these matrices and return its findings."""
        spectra = yield from self._scan(matrices)
        candidates = choose_candidates(spectra, self.spec.rule, self.spec.num_candidates)
        self.say(
            f"Scanned {len(spectra)} matrices; the rule {self.spec.rule} gives {len(candidates)} candidates."
        )
        (baseline,) = yield Stage("baseline", (self._unit((), "the base", "search", None),))
        self.say(f"The base has perplexity {_number(baseline.perplexity)} on the search chunks.")
        unit = partial(self._unit, split="search", dtype=baseline.dtype)
        measured: list[PerplexityResult] = []
        if candidates:
            measured = yield Stage("candidates", tuple(unit((c,), c.label) for c in candidates))
        candidates = [
            candidate.model_copy(update={"alone": compare(baseline, result)})
            for candidate, result in zip(candidates, measured, strict=True)
        ]
        accepted, decided, final = yield from compose_greedily(
            candidates,
            measured,
            baseline,
            unit,
            z_threshold=self.spec.z_threshold,
            max_accepted=self.spec.max_accepted,
            parallelism=self.parallelism,
        )
        held_out = yield from self._verify(accepted, baseline.dtype)
        return self._conclude(spectra, candidates, accepted, decided, (baseline, final), held_out)

    def _scan(self, matrices: Sequence[Matrix]) -> Generator[Stage, list[Any], tuple[MatrixSpectrum, ...]]:
        # Longest first, so that no worker is left with a long one at the end.
        ordered = sorted(matrices, key=lambda matrix: (-matrix.cost, matrix.layer, matrix.name))
        results = yield Stage("scan", tuple(ScanMatrix(checkpoint=self.base, matrix=m) for m in ordered))
        return tuple(sorted(results, key=lambda s: (s.matrix.layer, s.matrix.name)))

    def _verify(
        self, accepted: Sequence[Candidate], dtype: str
    ) -> Generator[Stage, list[Any], tuple[PerplexityResult, PerplexityResult]]:
        before = self._unit((), "the base on held-out chunks", "held_out", dtype)
        after = self._unit(accepted, "the result on held-out chunks", "held_out", dtype)
        results = yield Stage("verify", (before, after) if accepted else (before,))
        return results[0], results[-1]

    def _conclude(
        self,
        spectra: tuple[MatrixSpectrum, ...],
        candidates: Sequence[Candidate],
        accepted: Sequence[Candidate],
        decided: Sequence[Candidate],
        search: tuple[PerplexityResult, PerplexityResult],
        held_out: tuple[PerplexityResult, PerplexityResult],
    ) -> Findings:
        verdicts = {candidate.matrix.name: candidate for candidate in decided}
        withdrawn = bool(accepted) and compare(*held_out).worsened(self.spec.z_threshold)
        self._tell(accepted, before_after(*held_out), withdrawn)
        if withdrawn:
            withdraw = {"verdict": "withdrawn"}
            verdicts |= {c.matrix.name: c.model_copy(update=withdraw) for c in accepted}
            accepted, search, held_out = (), (search[0], search[0]), (held_out[0], held_out[0])
        return Findings(
            spectra=spectra,
            candidates=tuple(verdicts.get(c.matrix.name, c) for c in candidates),
            accepted=tuple(accepted),
            search=before_after(*search),
            held_out=before_after(*held_out),
            withdrawn=withdrawn,
        )

    def _tell(self, accepted: Sequence[Candidate], held_out: BeforeAfter, withdrawn: bool) -> None:
        if not accepted:
            self.say("No reduction helped significantly: the result is the base, unchanged.")
            return
        names = ", ".join(candidate.label for candidate in accepted)
        change = f"{_number(held_out.before)} -> {_number(held_out.after)} (z {_number(held_out.z)})"
        self.say(f"Accepted: {names}. Held-out perplexity {change}.")
        if withdrawn:
            self.say("The held-out chunks contradict the search: all withdrawn, the result is the base.")

    def _unit(
        self, reductions: Sequence[Candidate], subject: str, split: Split, dtype: str | None
    ) -> EvaluateReductions:
        return EvaluateReductions(
            checkpoint=self.base,
            reductions=tuple(sorted((c.reduction for c in reductions), key=lambda r: r.name)),
            text=self.text,
            split=split,
            seq_length=self.spec.seqlen,
            chunks=self.spec.chunks,
            seed=self.spec.seed,
            dtype=dtype,
            subject=subject,
        )


def before_after(before: PerplexityResult, after: PerplexityResult) -> BeforeAfter:
    """Summarise two measurements on the same chunks."""
    change = compare(before, after)
    return BeforeAfter(
        before=before.perplexity,
        before_standard_error=before.standard_error,
        after=after.perplexity,
        after_standard_error=after.standard_error,
        delta=change.delta,
        delta_standard_error=change.standard_error,
        z=change.z,
        tokens=before.total_tokens,
    )


def _number(value: float | None) -> str:
    return "that is not finite" if value is None else f"{value:.4g}"
