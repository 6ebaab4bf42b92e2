"""Which reductions are tried, and which are kept: decisions as plain data, without any model."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from aidocks.evaluate.perplexity import Comparison, PerplexityResult, compare
from aidocks.laser.matrices import Matrix, Reduction
from aidocks.laser.scan import MatrixSpectrum
from aidocks.plan import Stage, Unit
from aidocks.specs.laser import Rule

Verdict = Literal[
    "accepted", "not significant", "not significant in composition", "limit reached", "withdrawn"
]


class Candidate(BaseModel):
    """One reduction that is tried, with all that the trial told: a line of the ledger.

    Attributes:
        rank: Rank that the rule keeps.
        energy: Share of the squared Frobenius norm that is kept.
        alone: Effect of this reduction alone on the base.
        composed: Effect on top of the reductions accepted before it; None when that was not measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    matrix: Matrix
    rank: int
    energy: float
    noise_ratio: float | None = Field(description="Corrected signal-to-noise ratio, the order of `snr`.")
    alone: Comparison | None = None
    composed: Comparison | None = None
    verdict: Verdict = "not significant"

    @property
    def reduction(self) -> Reduction:
        return Reduction(name=self.matrix.name, rank=self.rank)

    @property
    def label(self) -> str:
        return f"{self.matrix.name} rank {self.rank}/{self.matrix.full_rank}"


def choose_candidates(spectra: Sequence[MatrixSpectrum], rule: Rule, limit: int | None) -> list[Candidate]:
    """Return the reductions to try, the noisiest matrix first.

    Args:
        spectra: Of all matrices that the request covers.
        rule: Decides the rank. A matrix of which it keeps everything is no candidate.
        limit: How many, at most; None for all.
    """
    reducible = [s for s in spectra if s.decisions[rule].rank < s.matrix.full_rank]
    ordered = sorted(reducible, key=lambda s: (s.noise_ratio, s.matrix.layer, s.matrix.name))
    return [
        Candidate(
            matrix=spectrum.matrix,
            rank=spectrum.decisions[rule].rank,
            energy=spectrum.decisions[rule].energy,
            noise_ratio=spectrum.decisions["marchenko_pastur"].snr,
        )
        for spectrum in ordered[:limit]
    ]


#: Makes the unit that measures a set of reductions; the text says what is measured.
MakeUnit = Callable[[Sequence[Candidate], str], Unit[PerplexityResult]]


def compose_greedily(
    candidates: Sequence[Candidate],
    measured: Sequence[PerplexityResult],
    baseline: PerplexityResult,
    make_unit: MakeUnit,
    *,
    z_threshold: float,
    max_accepted: int | None,
    parallelism: int,
) -> Generator[Stage, list[PerplexityResult], tuple[list[Candidate], list[Candidate], PerplexityResult]]:
    """Accept one reduction after another, each because it helps on top of those accepted before.

    Those that helped significantly alone are tested again, the most helpful first. The next ``parallelism``
    of them are measured at once on the present state; the first that helps is accepted and the measurements
    after it are discarded, because the state has changed. So the answer is that of a strictly sequential
    search.

    Args:
        candidates: With ``alone`` set.
        measured: The result of each candidate alone, in the same order.
        baseline: Result of the base.
        make_unit: See :data:`MakeUnit`.
        z_threshold: Significance that both tests require.
        max_accepted: Accepted reductions at most.
        parallelism: Measurements at once. Without influence on the result.

    Returns:
        The accepted candidates in order of acceptance, all that were looked at here with their verdicts,
        and the result of the last accepted state.
    """
    results = {c.matrix.name: result for c, result in zip(candidates, measured, strict=True)}
    waiting = sorted(
        (c for c in candidates if c.alone is not None and c.alone.improved(z_threshold)),
        key=lambda c: (c.alone.delta if c.alone else None, c.matrix.name),
    )
    accepted: list[Candidate] = []
    decided: list[Candidate] = []
    current = baseline
    while waiting and (max_accepted is None or len(accepted) < max_accepted):
        batch = waiting[: parallelism if accepted else 1]
        if accepted:
            tried = yield Stage("compose", tuple(make_unit([*accepted, c], f"+ {c.label}") for c in batch))
        else:
            tried = [results[batch[0].matrix.name]]
        for candidate, result in zip(batch, tried, strict=True):
            waiting.remove(candidate)
            effect = compare(current, result)
            helps = effect.improved(z_threshold)
            verdict: Verdict = "accepted" if helps else "not significant in composition"
            candidate = candidate.model_copy(update={"composed": effect, "verdict": verdict})
            decided.append(candidate)
            if helps:
                accepted.append(candidate)
                current = result
                break
    decided += [c.model_copy(update={"verdict": "limit reached"}) for c in waiting]
    return accepted, decided, current
