"""Which reductions are proposed and measured, and what their measurement says: plain data, without any model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Literal

from pydantic import BaseModel, ConfigDict

from aidocks.evaluate.measurements import Pairs, decide
from aidocks.evaluate.perplexity import Comparison
from aidocks.laser.evaluation import Change
from aidocks.laser.matrices import Matrix, Reduction
from aidocks.laser.scan import MatrixSpectrum, decision_key
from aidocks.laser.screening import Prediction
from aidocks.specs.laser import LaserSpec, Truncation

#: A reduction is refused when a guard gets worse by so many paired standard errors on the search data: less than would
#: prove harm, because small harms add up, and because there is always another reduction to try.
GUARD_Z = 1.0
#: Held-out data object to a result when a guard gets worse by so many.
OBJECTION_Z = 2.0
#: Reductions that helped by at least so many standard errors alone, but not significantly, are tried on top of what is
#: accepted, and in the end together.
PROMISING_Z = 1.0
#: Those that helped by so many on a quarter of the data would have twice as many on all: probably enough.
STRONG_Z = 2.0
Verdict = Literal[
    "accepted",
    "accepted in a group",
    "promising",
    "not significant",
    "hurts a guard",
    "not significant in composition",
    "another reduction of this matrix was accepted",
    "limit reached",
    "taken back",
]


class Proposal(BaseModel):
    """A rank for a matrix.

    Attributes:
        rules: What proposed it, such as ``laserrmt`` or ``fraction 0.1``.
        shrink: Whether the kept singular values shrink, too.
        energy: Share that the components kept have, before any shrinking: by `weight` of the squared Frobenius norm;
            by `activation_aware` of the energy of the layer's output on the calibration data. Before a matrix is
            decomposed, as the rule told it of the weight.
        noise_ratio: Corrected signal-to-noise ratio of the matrix.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    matrix: Matrix
    rules: tuple[str, ...]
    rank: int
    truncation: Truncation
    shrink: bool
    energy: float
    noise_ratio: float | None


class Candidate(BaseModel):
    """A proposal that is measured, with all that was found out about it.

    Attributes:
        reduction: The same as units are told.
        prediction: What one gradient pass said of the objective.
        merit: What it said of objective and guards together; less is better, see :func:`merits_of`.
        alone: Effect on the base; None when it was not measured.
        decisive: Whether that is significant as it stands.
        items: Chunks or questions that it was measured on.
        guards: Losses of every guard on the base, and with what was decided on: the candidate alone, or on top of the
            reductions accepted before it; empty when the objective already said no.
        composed: Effect on top of the reductions accepted before it, of its whole group if it has one; None when that
            was not measured.
        group: Number of the group with which it was accepted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    proposal: Proposal
    reduction: Reduction
    prediction: Prediction | None = None
    merit: float | None = None
    alone: Comparison | None = None
    decisive: bool = False
    items: int = 0
    guards: tuple[Pairs, ...] = ()
    composed: Comparison | None = None
    group: int | None = None
    verdict: Verdict = "not significant"

    @property
    def address(self) -> str:
        return self.proposal.matrix.address

    @property
    def label(self) -> str:
        return f"{self.address} rank {self.proposal.rank}/{self.proposal.matrix.full_rank}"

    @property
    def is_accepted(self) -> bool:
        return self.verdict in ("accepted", "accepted in a group")

    def judged(self, **update: object) -> Candidate:
        """Return the candidate with more known about it."""
        return self.model_copy(update=update)

    def measured(self, change: Change, total: int, z_threshold: float) -> Candidate:
        """Return the candidate with its effect alone, and the verdict on that.

        Args:
            change: What was measured.
            total: Items that a whole measurement has.
            z_threshold: Significance that it would need.
        """
        alone, decision = change.objective.comparison, decide(change.objective, total, z_threshold)
        verdict: Verdict = "not significant"
        if decision == "accept":
            verdict = "promising" if helps(change, z_threshold) else "hurts a guard"
        elif decision == "continue" and change.objective.improved(PROMISING_Z):
            verdict = "promising"
        return self.judged(
            alone=alone,
            decisive=decision == "accept",
            items=len(change.objective.positions),
            guards=change.guards,
            verdict=verdict,
        )


def propose(spectra: Iterable[MatrixSpectrum], spec: LaserSpec) -> list[Proposal]:
    """Return every rank that a rule of the request gives to a matrix; equal ones once, with all of their rules.

    A rule that keeps everything, or nothing, proposes nothing.
    """
    found: dict[tuple[str, int, Truncation, bool], Proposal] = {}
    for spectrum in spectra:
        for rule, share in spec.decisions:
            key = decision_key(rule, share)
            decision = spectrum.decisions[key]
            if not 0 < decision.rank < spectrum.matrix.full_rank:
                continue
            for truncation in spec.truncations_of(rule):
                shrink = rule == "optimal_shrinkage"
                place = (spectrum.matrix.address, decision.rank, truncation, shrink)
                known = found.get(place)
                found[place] = Proposal(
                    matrix=spectrum.matrix,
                    rules=(*known.rules, key) if known else (key,),
                    rank=decision.rank,
                    truncation=truncation,
                    shrink=shrink,
                    energy=decision.energy,
                    noise_ratio=spectrum.noise_ratio,
                )
    return list(found.values())


def order_proposals(proposals: Sequence[Proposal], spec: LaserSpec) -> list[Proposal]:
    """Return the proposals that are measured where no gradient chooses, in the order in which they are: all of as many
    matrices as the request wants.

    ``backward`` goes from the last layer to the first, everything else from the noisiest matrix on.
    """
    if spec.selection == "backward":
        ordered = sorted(proposals, key=lambda p: (-_layer(p.matrix), p.matrix.address, p.rank))
    else:
        ordered = sorted(proposals, key=lambda p: (_ratio(p), _layer(p.matrix), p.matrix.address, p.rank))
    addresses = list(dict.fromkeys(proposal.matrix.address for proposal in ordered))
    tried = set(addresses[: spec.num_candidates])
    return [proposal for proposal in ordered if proposal.matrix.address in tried]


#: What tells one reduction from all others: address, truncation, rank, shrink.
Cut = tuple[str, Truncation, int, bool]


def cut_of(told: Prediction | Reduction) -> Cut:
    """Return what tells a reduction, or what a prediction is of, from all others."""
    return told.address, told.truncation, told.rank, told.shrink


def merits_of(predictions: Sequence[Sequence[Prediction]]) -> dict[Cut, float]:
    """Return the predicted change of objective and guards together, for all cuts that every one of them judged.

    Losses of different metrics have different units, so each change counts in units of the median standard error of
    its objective's predictions.

    Args:
        predictions: Of the objective, then of each guard.
    """
    parts = []
    for judged in predictions:
        errors = [p.standard_error for p in judged if p.standard_error > 0]
        unit = median(errors) if errors else 1.0
        parts.append({cut_of(p): p.change / unit for p in judged})
    common = set.intersection(*map(set, parts)) if parts else set()
    return {cut: math.fsum(part[cut] for part in parts) for cut in common}


def choose_predicted(candidates: Sequence[Candidate], limit: int | None) -> list[Candidate]:
    """Return the candidates that the gradient pass thinks best of, the best first: one of each matrix."""
    judged = [(candidate.merit, candidate) for candidate in candidates if candidate.merit is not None]
    judged.sort(key=lambda pair: (pair[0], pair[1].address, pair[1].proposal.rank))
    best: dict[str, Candidate] = {}
    for _, candidate in judged:
        best.setdefault(candidate.address, candidate)
    return list(best.values())[:limit]


def helps(change: Change, z_threshold: float) -> bool:
    """Say whether the objective improved significantly while no guard was hurt."""
    if not change.objective.improved(z_threshold):
        return False
    return not any(pairs.worsened(GUARD_Z) for pairs in change.guards)


def guarded_from(base: Sequence[Pairs], change: Change) -> Change:
    """Return a change whose guards are compared with the base: many small harms, none of them significant, add up.

    Args:
        base: The guards' pairs of some change of the base itself; none where ``change`` is one.
        change: On top of other reductions. Its guards were not measured where the objective had said no.
    """
    if not base or not change.guards:
        return change
    guards = (
        pairs.model_copy(update={"before": first.before})
        for first, pairs in zip(base, change.guards, strict=True)
    )
    return Change(pairs=(change.objective, *guards))


def _layer(matrix: Matrix) -> int:
    return -1 if matrix.layer is None else matrix.layer


def _ratio(proposal: Proposal) -> float:
    return math.inf if proposal.noise_ratio is None else proposal.noise_ratio
