"""From matrices to accepted reductions: scan, propose, screen, measure, compose, verify."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from aidocks.checkpoints.files import OutputFile
from aidocks.checkpoints.reader import Checkpoint
from aidocks.evaluate.measurements import Pairs
from aidocks.evaluate.objectives import ObjectiveSource, Part
from aidocks.laser.batches import Device, look_at_device, run_in_batches
from aidocks.laser.calibration import CollectCovariances, calibration_groups
from aidocks.laser.checks import COVARIANCE_SHARDS
from aidocks.laser.composition import Composition
from aidocks.laser.decomposition import DecomposeMatrices, DecomposeMatrix, Decomposition
from aidocks.laser.evaluation import Change, MeasureChange
from aidocks.laser.matrices import Matrix, Reduction
from aidocks.laser.scan import MatrixSpectrum
from aidocks.laser.scan_operation import HashWeights, scan
from aidocks.laser.screening import ScreenCandidate, ScreenCandidates, combine
from aidocks.laser.selection import (
    OBJECTION_Z,
    Candidate,
    Cut,
    Proposal,
    choose_predicted,
    cut_of,
    merits_of,
    order_proposals,
    propose,
)
from aidocks.plan import Stage, Unit
from aidocks.specs.laser import LaserSpec, Truncation

#: Shares of the calibration data, fixed, so that sums do not depend on the number of workers.
GRADIENT_GROUPS = 8
#: How often the rest is composed anew when held-out data contradict everything that was accepted.
MOST_COMPOSITIONS = 4
#: Held-out data confirm a result when the objective improves there by so many paired standard errors: what the search
#: accepted by chance fails that in five cases of six.
CONFIRMATION_Z = 1.0
#: Of the search items that predicted candidates are measured on alone, before the promising ones are composed.
QUALIFYING_SHARE = 0.25


@dataclass(frozen=True)
class Findings:
    """What the search found.

    Attributes:
        file_hashes: SHA-256 of the base's weight files by name.
        candidates: All that were measured, in the order of selection.
        accepted: Reductions of the result, in order of acceptance.
        screened: Reductions that the gradient pass judged.
        scores: Of objective and guards, base against result, on each part that was measured.
        objection: What spoke against keeping all that the search accepted; None when nothing did.
    """

    file_hashes: Mapping[str, str]
    spectra: tuple[MatrixSpectrum, ...]
    candidates: tuple[Candidate, ...]
    accepted: tuple[Candidate, ...]
    screened: int
    scores: Mapping[Part, tuple[Pairs, ...]]
    objection: str | None


@dataclass(frozen=True)
class Search:
    """The search of one request.

    Attributes:
        base: The model.
        objectives: The one that decides, then the guards.
        workspace: Directory of the job; what is computed on the way is written there.
        cache_dir: Where singular values are kept.
        parallelism: Measurements at once, without influence on the findings.
        say: Tells people what was found.
    """

    spec: LaserSpec
    base: Checkpoint
    objectives: tuple[ObjectiveSource, ...]
    workspace: Path
    cache_dir: Path
    parallelism: int
    say: Callable[[str], None]

    def run(self, matrices: Sequence[Matrix]) -> Generator[Stage, list[Any], Findings]:
        """Yield the stages of the search over these matrices and return its findings."""
        (hashes,) = yield Stage("hash", (HashWeights(checkpoint=self.base.path, cache_dir=self.cache_dir),))
        keeps = tuple(sorted({share for _, share in self.spec.decisions if share is not None}))
        device = yield from look_at_device()
        spectra = yield from scan(self.base, matrices, hashes.files, keeps, self.cache_dir, device)
        proposals = propose(spectra, self.spec)
        self.say(f"Scanned {len(spectra)} matrices; the rules propose {len(proposals)} reductions.")
        candidates = yield from self._candidates(proposals, device)
        candidates = yield from self._measure(candidates)
        judged = yield from self._settle(candidates)
        return Findings(
            file_hashes=hashes.files,
            spectra=spectra,
            screened=len(proposals) if self.spec.selection == "gradient" else 0,
            **judged,
        )

    def _settle(self, candidates: Sequence[Candidate]) -> Generator[Stage, list[Any], dict[str, Any]]:
        """Compose and confirm; what held-out data contradict from the first is left out, and the rest composed anew."""
        gone: list[Candidate] = []
        first_objection = None
        for _ in range(MOST_COMPOSITIONS):
            left = [c for c in candidates if c.reduction not in {other.reduction for other in gone}]
            composition = Composition(
                left,
                self._unit,
                z_threshold=self.spec.z_threshold,
                max_accepted=self.spec.max_accepted,
                parallelism=self.parallelism,
                in_order=self.spec.selection == "backward",
            )
            verdicts = yield from composition.run()
            accepted, held_out, objection = yield from self._confirm(composition)
            first_objection = first_objection or objection
            if accepted or not composition.accepted:
                break
            gone += composition.accepted[: composition.steps[0]]
        gone += composition.accepted[len(accepted) :]
        figures = yield from self._figures(accepted, held_out)
        known = {c.reduction: c for c in verdicts} | {
            c.reduction: c.judged(verdict="taken back") for c in gone
        }
        return figures | {
            "candidates": tuple(known[c.reduction] for c in candidates),
            "accepted": tuple(accepted),
            "objection": first_objection,
        }

    def _confirm(
        self, composition: Composition
    ) -> Generator[Stage, list[Any], tuple[list[Candidate], Change, str | None]]:
        """Take back the last acceptances as long as held-out data object.

        Returns:
            What is left, its measurement on held-out data, and the first objection.
        """
        accepted, first_objection = list(composition.accepted), None
        (held_out,) = yield Stage("verify", (self._final_unit(accepted, "held_out"),))
        for step in reversed([0, *composition.steps[:-1]]):
            objection = _objection(held_out, self.objectives) if accepted else None
            if objection is None:
                break
            first_objection = first_objection or objection
            self.say(f"Taken back: {', '.join(c.label for c in accepted[step:])}; {objection}")
            del accepted[step:]
            (held_out,) = yield Stage("verify", (self._final_unit(accepted, "held_out"),))
        return accepted, held_out, first_objection

    def _figures(
        self, accepted: Sequence[Candidate], held_out: Change
    ) -> Generator[Stage, list[Any], dict[str, Any]]:
        # The search data told enough before; here their figures end as soon as they are significant.
        on_search = self._unit((), accepted, "base and result on the search data")
        on_report = self._final_unit(accepted, "report")
        search, report = yield Stage("final figures", (on_search, on_report))
        self._tell(accepted, report.pairs)
        return {"scores": {"search": search.pairs, "held_out": held_out.pairs, "report": report.pairs}}

    def _candidates(
        self, proposals: Sequence[Proposal], device: Device
    ) -> Generator[Stage, list[Any], list[Candidate]]:
        """Return what is measured: chosen by gradient, or by the order that the request asks for."""
        if self.spec.selection != "gradient":
            return (yield from self._decompose(order_proposals(proposals, self.spec), device))
        candidates = yield from self._decompose(proposals, device)
        if not candidates:
            return []
        candidates = yield from self._screen(candidates)
        chosen = choose_predicted(candidates, self.spec.num_candidates)
        self.say(
            f"The gradient pass judged {len(candidates)} reductions; the best {len(chosen)} are measured."
        )
        return chosen

    def _screen(self, candidates: Sequence[Candidate]) -> Generator[Stage, list[Any], list[Candidate]]:
        """Return the candidates with what one gradient pass over objective and guards predicts of them."""
        asked = _screen_candidates(candidates)
        units = tuple(
            ScreenCandidates(
                checkpoint=self.base.path,
                objective=source,
                group=group,
                groups=GRADIENT_GROUPS,
                candidates=asked,
            )
            for source in self.objectives
            for group in range(GRADIENT_GROUPS)
        )
        screened = yield Stage("screen", units)
        by_objective = [
            combine(asked, screened[first : first + GRADIENT_GROUPS])
            for first in range(0, len(screened), GRADIENT_GROUPS)
        ]
        merits = merits_of(by_objective)
        predictions = {cut_of(prediction): prediction for prediction in by_objective[0]}
        return [
            candidate.judged(prediction=predictions[cut], merit=merits[cut])
            for candidate in candidates
            if (cut := cut_of(candidate.reduction)) in merits
        ]

    def _decompose(
        self, proposals: Sequence[Proposal], device: Device
    ) -> Generator[Stage, list[Any], list[Candidate]]:
        covariances: tuple[OutputFile, ...] = ()
        informed = {p.matrix.address: p.matrix for p in proposals if p.truncation == "activation_aware"}
        if informed:
            written = yield Stage("calibrate", self._calibration_units(tuple(informed.values())))
            covariances = tuple(file for part in written for file in part.files)
        wanted: dict[tuple[str, Truncation], list[Proposal]] = {}
        for proposal in proposals:
            wanted.setdefault((proposal.matrix.address, proposal.truncation), []).append(proposal)
        order = sorted(wanted, key=lambda key: (-wanted[key][0].matrix.cost, key))
        units = tuple(self._decomposition_unit(wanted[key], key[1], covariances) for key in order)
        made: list[Decomposition] = yield from run_in_batches(
            "decompose", units, device, lambda group: DecomposeMatrices(units=group)
        )
        bases = dict(zip(order, made, strict=True))
        found: dict[Cut, Candidate] = {}
        for proposal in proposals:
            candidate = _candidate(proposal, bases[proposal.matrix.address, proposal.truncation])
            # Where nothing is known of the inputs, both truncations are the same.
            found.setdefault(cut_of(candidate.reduction), candidate)
        return list(found.values())

    def _measure(self, candidates: Sequence[Candidate]) -> Generator[Stage, list[Any], list[Candidate]]:
        """Measure every candidate alone, layer by layer, so that what a worker keeps of a layer serves again."""
        if not candidates:
            return []
        ordered = sorted(candidates, key=lambda c: (c.proposal.matrix.order, c.proposal.rank))
        # A prediction chose few and good ones: what a share of the chunks makes of them is enough to go on. The answers
        # to a share of the questions tell too little.
        predicted = self.spec.selection == "gradient" and self.objectives[0].metric == "perplexity"
        share = QUALIFYING_SHARE if predicted else 1.0
        units = tuple(self._unit((), (c,), c.label).model_copy(update={"share": share}) for c in ordered)
        changes = yield Stage("candidates", units)
        known = {c.reduction: change for c, change in zip(ordered, changes, strict=True)}
        total = self.objectives[0].sizes["search"]
        return [c.measured(known[c.reduction], total, self.spec.z_threshold) for c in candidates]

    def _tell(self, accepted: Sequence[Candidate], scores: Sequence[Pairs]) -> None:
        if not accepted:
            self.say("No reduction helped significantly: the result is the base, unchanged.")
            return
        names = ", ".join(candidate.label for candidate in accepted)
        before, after = scores[0].value_before.value, scores[0].value_after.value
        z = _number(scores[0].comparison.z)
        change = f"{_number(before)} -> {_number(after)} (z {z})"
        self.say(f"Accepted: {names}. {self.objectives[0].label}, on data never seen: {change}.")

    def _calibration_units(self, matrices: Sequence[Matrix]) -> tuple[Unit[Any], ...]:
        return tuple(
            CollectCovariances(
                checkpoint=self.base.path,
                objectives=self.objectives,
                matrices=addresses,
                directory=self.workspace / "calibration",
                shard=shard,
                shards=COVARIANCE_SHARDS,
            )
            for addresses in calibration_groups(matrices)
            for shard in range(COVARIANCE_SHARDS)
        )

    def _decomposition_unit(
        self, proposals: Sequence[Proposal], truncation: Truncation, covariances: tuple[OutputFile, ...]
    ) -> DecomposeMatrix:
        return DecomposeMatrix(
            checkpoint=self.base.path,
            matrix=proposals[0].matrix,
            truncation=truncation,
            covariances=covariances if truncation == "activation_aware" else (),
            directory=self.workspace / "bases",
            ranks=tuple(sorted({proposal.rank for proposal in proposals})),
        )

    def _unit(self, base: Sequence[Candidate], added: Sequence[Candidate], subject: str) -> MeasureChange:
        return self._change(base, added, "search", self.spec.z_threshold, subject)

    def _final_unit(self, accepted: Sequence[Candidate], part: Part) -> MeasureChange:
        return self._change((), accepted, part, None, f"base and result on the {part.replace('_', '-')} data")

    def _change(
        self,
        base: Sequence[Candidate],
        added: Sequence[Candidate],
        part: Part,
        z_threshold: float | None,
        subject: str,
    ) -> MeasureChange:
        return MeasureChange(
            checkpoint=self.base.path,
            base=_in_order(base),
            added=_in_order(added),
            objectives=self.objectives,
            part=part,
            z_threshold=z_threshold,
            subject=subject,
        )


def _candidate(proposal: Proposal, basis: Decomposition) -> Candidate:
    reduction = Reduction(
        address=proposal.matrix.address,
        rank=proposal.rank,
        basis=basis.file.path,
        sha256=basis.file.sha256,
        truncation=basis.truncation,
        shrink=proposal.shrink,
    )
    energy = dict(zip(basis.ranks, basis.energies, strict=True))[proposal.rank]
    proposal = proposal.model_copy(update={"truncation": basis.truncation, "energy": energy})
    return Candidate(proposal=proposal, reduction=reduction)


def _screen_candidates(candidates: Sequence[Candidate]) -> tuple[ScreenCandidate, ...]:
    """Return what a gradient pass is asked: every basis once, with all cuts that it serves."""
    reductions = sorted((candidate.reduction for candidate in candidates), key=cut_of)
    return tuple(
        ScreenCandidate(
            address=address,
            truncation=truncation,
            basis=members[0].basis,
            sha256=members[0].sha256,
            ranks=tuple(member.rank for member in members if not member.shrink),
            shrunken_ranks=tuple(member.rank for member in members if member.shrink),
        )
        for (address, truncation), group in groupby(reductions, key=lambda r: (r.address, r.truncation))
        for members in [list(group)]
    )


def _in_order(candidates: Sequence[Candidate]) -> tuple[Reduction, ...]:
    """Return the reductions by address, so that equal sets are equal units."""
    return tuple(sorted((c.reduction for c in candidates), key=lambda reduction: reduction.address))


def _objection(change: Change, objectives: Sequence[ObjectiveSource]) -> str | None:
    """Say what speaks against publishing a result, on data that no choice has seen; None when nothing does."""
    if not change.objective.improved(CONFIRMATION_Z):
        z = _number(change.objective.comparison.z)
        return f"on held-out data the {objectives[0].label} is not clearly better (z {z})."
    for guard, pairs in zip(objectives[1:], change.guards, strict=True):
        if pairs.worsened(OBJECTION_Z):
            return f"on held-out data the guard {guard.label} is worse (z {_number(pairs.comparison.z)})."
    return None


def _number(value: float | None) -> str:
    return "that is not finite" if value is None else f"{value:.4g}"
