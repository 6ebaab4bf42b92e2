"""Composing reductions: which of the promising ones are kept, one on top of another. Decisions without any model."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field

from aidocks.evaluate.measurements import Pairs
from aidocks.evaluate.perplexity import Comparison
from aidocks.laser.evaluation import Change, MeasureChange
from aidocks.laser.matrices import Reduction
from aidocks.laser.selection import PROMISING_Z, STRONG_Z, Candidate, Verdict, guarded_from, helps
from aidocks.plan import Stage

#: Makes the unit that measures reductions on top of others; the text says what is measured.
MakeUnit = Callable[[Sequence[Candidate], Sequence[Candidate], str], MeasureChange]


@dataclass
class Composition:
    """The composition of measured candidates, one acceptance after another.

    Those that are promising alone are tested on top of what was accepted before, the most helpful first (or, for
    ``backward``, in the order of their matrices, of each the most helpful first). After those that were significant on
    a share of the data come those that nearly were: all of them at once, and one by one only if that does not help. The
    next ``parallelism`` of them are measured at once on the present state; the first that helps is accepted and the
    measurements after it are discarded, because the state has changed. So the answer is that of a strictly sequential
    search, whatever the parallelism.
    Last, those that helped, but not significantly, are tried together: all, the better half, the better quarter of
    them and so on.

    Attributes:
        candidates: As :meth:`Candidate.measured` returns them.
        make_unit: See :data:`MakeUnit`.
        z_threshold: Significance that every test requires.
        max_accepted: Accepted reductions at most; None for no limit.
        parallelism: Measurements at once.
        in_order: Whether to keep the order of the matrices.
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
        waiting = self._promising()
        if not self.in_order:
            yield from self._one_by_one([c for c in waiting if c.decisive])
            yield from self._at_once([c for c in waiting if not c.decisive])
        yield from self._one_by_one(self._open(waiting))
        yield from self._together()
        return [self._verdicts.get(candidate.reduction, candidate) for candidate in self.candidates]

    def _promising(self) -> list[Candidate]:
        waiting = [c for c in self.candidates if c.verdict == "promising"]
        waiting.sort(key=lambda c: (not c.decisive, _delta(c), c.address, c.proposal.rank))
        if self.in_order:
            places = {c.address: number for number, c in enumerate(self.candidates)}
            waiting.sort(key=lambda c: places[c.address])
        return waiting

    def _open(self, waiting: Sequence[Candidate]) -> list[Candidate]:
        return [c for c in waiting if c.reduction not in self._verdicts]

    def _at_once(self, undecided: Sequence[Candidate]) -> Generator[Stage, list[Change], None]:
        """Try those together that all of the data would probably prove one by one, at the cost of one of them."""
        members = self._best_of_matrices(c for c in undecided if c.alone and c.alone.improved(STRONG_Z))
        if len(members) < 2:
            return
        unit = self._unit(members, f"{len(members)} strong ones together")
        (measured,) = yield Stage("compose", (unit,))
        change = guarded_from(self._guards_of_base(), measured)
        if helps(change, self.z_threshold):
            self._take_group(change.objective.comparison, members, change.guards)

    def _one_by_one(self, waiting: Sequence[Candidate]) -> Generator[Stage, list[Change], None]:
        waiting = self._drop_taken(waiting)
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
        if change:
            change = guarded_from(self._guards_of_base(), change)
        effect = change.objective.comparison if change else candidate.alone
        accepted = change is None or helps(change, self.z_threshold)
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
        judged = (self._verdicts.get(c.reduction, c) for c in self.candidates)
        weak = (c for c in judged if self._weakly_helpful(c))
        members = self._best_of_matrices(weak)
        groups = [members[: len(members) >> halvings] for halvings in range(len(members).bit_length())]
        groups = [group for group in groups if len(group) > 1]
        if not groups:
            return
        units = tuple(self._unit(group, f"{len(group)} weaker ones together") for group in groups)
        measured = yield Stage("compose groups", units)
        changes = [guarded_from(self._guards_of_base(), change) for change in measured]
        helpful = [
            (change.objective.comparison, group, change.guards)
            for group, change in zip(groups, changes, strict=True)
            if helps(change, self.z_threshold)
        ]
        if helpful:
            self._take_group(*min(helpful, key=lambda found: (found[0].delta, len(found[1]))))

    def _best_of_matrices(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        """Return of each matrix that no accepted reduction changes the best candidate, as many as there is room for."""
        taken = {candidate.address for candidate in self.accepted}
        best: dict[str, Candidate] = {}
        for candidate in sorted(candidates, key=lambda c: (_z(c), c.address, c.proposal.rank)):
            if candidate.address not in taken:
                best.setdefault(candidate.address, candidate)
        return list(best.values())[: self._remaining()]

    def _take_group(self, effect: Comparison, group: Sequence[Candidate], guards: Sequence[Pairs]) -> None:
        number = 1 + max((candidate.group or 0 for candidate in self.accepted), default=0)
        verdict: Verdict = "accepted in a group"
        members = [c.judged(composed=effect, guards=guards, group=number, verdict=verdict) for c in group]
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


def _delta(candidate: Candidate) -> float:
    return candidate.alone.delta if candidate.alone and candidate.alone.delta is not None else math.inf


def _z(candidate: Candidate) -> float:
    effect = candidate.composed or candidate.alone
    return effect.z if effect and effect.z is not None else math.inf
