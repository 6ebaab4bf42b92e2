"""Which reductions are measured, and which are kept: decisions as plain data, without any model."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

from pydantic import BaseModel, ConfigDict

from aidocks.evaluate.measurements import Pairs, decide
from aidocks.evaluate.perplexity import Comparison
from aidocks.laser.evaluation import Change, MeasureChange
from aidocks.laser.matrices import Matrix, Reduction
from aidocks.laser.scan import MatrixSpectrum, decision_key
from aidocks.laser.screening import Prediction
from aidocks.plan import Stage
from aidocks.specs.laser import LaserSpec, Truncation

#: A reduction is refused when a guard gets worse by so many paired standard errors on the search data: less than would
#: prove harm, because small harms add up, and because there is always another reduction to try.
GUARD_Z = 1.0
#: Held-out data object to a result when a guard gets worse by so many.
OBJECTION_Z = 2.0
#: Reductions that helped by at least so many standard errors alone, but not significantly, are tried on top of what is
#: accepted, and in the end together.
PROMISING_Z = 1.0
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
        energy: Share of the squared Frobenius norm in the components that a cut by weight would keep.
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
        guards: Losses of every guard on base and candidate; empty when the objective already said no.
        composed: Effect on top of the reductions accepted before it; None when that was not measured.
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
    verdict: Verdict = "not significant"

    @property
    def address(self) -> str:
        return self.proposal.matrix.address

    @property
    def label(self) -> str:
        return f"{self.address} rank {self.proposal.rank}/{self.proposal.matrix.full_rank}"

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
        elif decision == "continue" and alone.improved(PROMISING_Z):
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
    """Return the proposals that are measured where no gradient chooses, in the order in which they are.

    ``backward`` goes from the last layer to the first, everything else from the noisiest matrix on.
    """
    if spec.selection == "backward":
        ordered = sorted(proposals, key=lambda p: (-_layer(p.matrix), p.matrix.address, p.rank))
    else:
        ordered = sorted(proposals, key=lambda p: (_ratio(p), _layer(p.matrix), p.matrix.address, p.rank))
    return ordered[: spec.num_candidates]


#: What tells one reduction from all others: address, truncation, rank, shrink.
Cut = tuple[str, Truncation, int, bool]


def cut_of(prediction: Prediction) -> Cut:
    """Return the reduction that a prediction is of."""
    return prediction.address, prediction.truncation, prediction.rank, prediction.shrink


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


def helps(change: Change, z_threshold: float, base: Sequence[Pairs] = ()) -> bool:
    """Say whether the objective improved significantly while no guard was hurt.

    Args:
        change: What was measured.
        z_threshold: Significance that the objective needs.
        base: The guards' pairs of some change of the base itself: a guard is compared with the base, because many
            small harms, none of them significant, add up.
    """
    if not change.objective.comparison.improved(z_threshold):
        return False
    guards = change.guards
    if base:
        origin = zip(base, guards, strict=True)
        guards = tuple(pairs.model_copy(update={"before": first.before}) for first, pairs in origin)
    return not any(pairs.comparison.worsened(GUARD_Z) for pairs in guards)


#: Makes the unit that measures reductions on top of others; the text says what is measured.
MakeUnit = Callable[[Sequence[Candidate], Sequence[Candidate], str], MeasureChange]


@dataclass
class Composition:
    """The composition of measured candidates, one acceptance after another.

    Those that are promising alone are tested on top of what was accepted before, the most helpful first (or, for
    ``backward``, in the order of the candidates). The next ``parallelism`` of them are measured at once on the present
    state; the first that helps is accepted and the measurements after it are discarded, because the state has changed.
    So the answer is that of a strictly sequential search, whatever the parallelism. Last, those that helped, but not
    significantly, are tried together: all, the better half, the better quarter of them and so on.

    Attributes:
        candidates: As :meth:`Candidate.measured` returns them.
        make_unit: See :data:`MakeUnit`.
        z_threshold: Significance that every test requires.
        max_accepted: Accepted reductions at most; None for no limit.
        parallelism: Measurements at once.
        in_order: Whether to keep the order of the candidates.
        accepted: In order of acceptance.
        steps: How many were accepted after each acceptance, of one or of a group.
    """

    candidates: Sequence[Candidate]
    make_unit: MakeUnit
    z_threshold: float
    max_accepted: int | None
    parallelism: int
    in_order: bool = False
    accepted: list[Candidate] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    _verdicts: dict[Reduction, Candidate] = field(default_factory=dict)

    def run(self) -> Generator[Stage, list[Change], list[Candidate]]:
        """Yield the stages of the composition; return all candidates with their verdicts, in the order given."""
        yield from self._one_by_one()
        yield from self._together()
        return [self._verdicts.get(candidate.reduction, candidate) for candidate in self.candidates]

    def _one_by_one(self) -> Generator[Stage, list[Change], None]:
        waiting = [c for c in self.candidates if c.verdict == "promising"]
        if not self.in_order:
            waiting.sort(key=lambda c: (not c.decisive, _delta(c), c.address, c.proposal.rank))
        while waiting and self._room():
            # What was significant on the base needs no second measurement while the base is the present state.
            known = not self.accepted and waiting[0].decisive
            batch = waiting[:1] if known else waiting[: self.parallelism]
            tried: Sequence[Change | None] = [None]
            if not known:
                tried = yield Stage("compose", tuple(self._unit((c,), f"+ {c.label}") for c in batch))
            for candidate, change in zip(batch, tried, strict=True):
                waiting.remove(candidate)
                if self._decide(candidate, change):
                    break
            waiting = self._drop_taken(waiting)
        for candidate in waiting:
            self._note(candidate.judged(verdict="limit reached"))

    def _decide(self, candidate: Candidate, change: Change | None) -> bool:
        """Accept a candidate or not; without a change, because it helped alone and nothing was accepted yet."""
        effect = change.objective.comparison if change else candidate.alone
        accepted = change is None or helps(change, self.z_threshold, self._guards_of_base())
        verdict: Verdict = "accepted" if accepted else "not significant in composition"
        if not accepted and effect and effect.improved(self.z_threshold):
            verdict = "hurts a guard"
        guards = change.guards if change and change.guards else candidate.guards
        candidate = candidate.judged(composed=effect, verdict=verdict, guards=guards)
        self._note(candidate)
        if accepted:
            self._take([candidate])
        return accepted

    def _take(self, members: Sequence[Candidate]) -> None:
        self.accepted += members
        self.steps.append(len(self.accepted))

    def _guards_of_base(self) -> Sequence[Pairs]:
        """Return the guards' losses on the base, which the first accepted one was compared with."""
        return self.accepted[0].guards if self.accepted else ()

    def _together(self) -> Generator[Stage, list[Change], None]:
        """Try the weakly helpful ones in nested groups; accept the group that helps most, if one does."""
        if not self._room():
            return
        taken = {candidate.address for candidate in self.accepted}
        judged = (self._verdicts.get(c.reduction, c) for c in self.candidates)
        weak = [c for c in judged if c.address not in taken and self._weakly_helpful(c)]
        best_of_matrix: dict[str, Candidate] = {}
        for candidate in sorted(weak, key=lambda c: (_z(c), c.address, c.proposal.rank)):
            best_of_matrix.setdefault(candidate.address, candidate)
        members = list(best_of_matrix.values())[: self._remaining()]
        groups = [members[: len(members) >> halvings] for halvings in range(len(members).bit_length())]
        groups = [group for group in groups if len(group) > 1]
        if not groups:
            return
        units = tuple(self._unit(group, f"{len(group)} weaker ones together") for group in groups)
        changes = yield Stage("compose groups", units)
        helpful = [
            (change.objective.comparison, group)
            for group, change in zip(groups, changes, strict=True)
            if helps(change, self.z_threshold, self._guards_of_base())
        ]
        if not helpful:
            return
        effect, group = min(helpful, key=lambda pair: (pair[0].delta, len(pair[1])))
        members = [c.judged(composed=effect, verdict="accepted in a group") for c in group]
        for candidate in members:
            self._note(candidate)
        self._take(members)

    def _weakly_helpful(self, candidate: Candidate) -> bool:
        effect = candidate.composed or candidate.alone
        weak = candidate.verdict in ("not significant", "not significant in composition")
        return weak and effect is not None and effect.improved(PROMISING_Z)

    def _drop_taken(self, waiting: Sequence[Candidate]) -> list[Candidate]:
        """Return those whose matrix no accepted reduction changes; note that of the others."""
        taken = {candidate.address for candidate in self.accepted}
        for candidate in waiting:
            if candidate.address in taken:
                self._note(candidate.judged(verdict="another reduction of this matrix was accepted"))
        return [candidate for candidate in waiting if candidate.address not in taken]

    def _room(self) -> bool:
        return self.max_accepted is None or len(self.accepted) < self.max_accepted

    def _remaining(self) -> int | None:
        return None if self.max_accepted is None else self.max_accepted - len(self.accepted)

    def _unit(self, added: Sequence[Candidate], subject: str) -> MeasureChange:
        return self.make_unit(self.accepted, added, subject)

    def _note(self, candidate: Candidate) -> None:
        self._verdicts[candidate.reduction] = candidate


def _layer(matrix: Matrix) -> int:
    return -1 if matrix.layer is None else matrix.layer


def _ratio(proposal: Proposal) -> float:
    return math.inf if proposal.noise_ratio is None else proposal.noise_ratio


def _delta(candidate: Candidate) -> float:
    return candidate.alone.delta if candidate.alone and candidate.alone.delta is not None else math.inf


def _z(candidate: Candidate) -> float:
    effect = candidate.composed or candidate.alone
    return effect.z if effect and effect.z is not None else math.inf
