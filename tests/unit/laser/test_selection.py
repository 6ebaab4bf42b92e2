"""Decisions without a model: effects are simulated, so that every path of the search can be walked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aidocks.evaluate.measurements import Pairs
from aidocks.evaluate.objectives import ObjectiveSource
from aidocks.evaluate.texts import TextSource
from aidocks.laser.composition import Composition
from aidocks.laser.evaluation import Change, MeasureChange
from aidocks.laser.matrices import Matrix, Reduction
from aidocks.laser.scan import MatrixSpectrum, RuleDecision
from aidocks.laser.screening import Prediction
from aidocks.laser.selection import (
    Candidate,
    Proposal,
    choose_predicted,
    merits_of,
    order_proposals,
    propose,
)
from aidocks.specs.laser import LaserSpec

ITEMS = 16


def matrix(index: int, rank: int = 8) -> Matrix:
    return Matrix(
        name=f"layers.{index}.proj.weight", layer=index, kind="proj", shape=(rank, rank), dtype="F32"
    )


def candidate(index: int, rank: int = 4) -> Candidate:
    proposal = Proposal(
        matrix=matrix(index),
        rules=("laserrmt",),
        rank=rank,
        truncation="weight",
        shrink=False,
        energy=0.9,
        noise_ratio=1.0,
    )
    reduction = Reduction(address=proposal.matrix.address, rank=rank, basis=Path("/b"), sha256="0" * 64)
    return Candidate(proposal=proposal, reduction=reduction)


def pairs(delta: float | None) -> Pairs:
    """Losses that change by ``delta`` on average, with a standard error of about 0.001."""
    before = tuple(3.0 + 0.1 * i for i in range(ITEMS))
    after = tuple(
        None if delta is None else b + delta + 0.004 * (-1) ** i * bool(delta) for i, b in enumerate(before)
    )
    return Pairs(
        metric="perplexity",
        positions=tuple(range(ITEMS)),
        before=before,
        after=after,
        tokens=ITEMS,
        dtype="float32",
    )


class Simulation:
    """Effects of sets of reductions: the sum of single effects plus what pairs of them add.

    Args:
        single: Of each matrix alone; None is a loss that is not finite.
        joint: Of two matrices, beside their single effects.
        harm: What each matrix does to a guard.
    """

    def __init__(
        self,
        single: Sequence[float | None],
        joint: dict[tuple[int, int], float] | None = None,
        harm: Sequence[float] | None = None,
    ) -> None:
        self.single = single
        self.joint = joint or {}
        self.harm = harm
        self.stages: list[int] = []

    def effect(self, indices: Sequence[int]) -> float | None:
        alone = [self.single[i] for i in indices]
        if any(effect is None for effect in alone):
            return None
        together = sum(self.joint.get((a, b), 0.0) for a in indices for b in indices if a < b)
        return sum(effect or 0.0 for effect in alone) + together

    def change(self, base: Sequence[int], added: Sequence[int]) -> Change:
        before, after = self.effect(base), self.effect([*base, *added])
        delta = None if before is None or after is None else after - before
        return Change(pairs=(pairs(delta), *self._guards(base, added)))

    def _guards(self, base: Sequence[int], added: Sequence[int]) -> Sequence[Pairs]:
        """As they are measured: losses in the state before, and in the one after."""
        if self.harm is None:
            return ()
        before = pairs(sum(self.harm[i] for i in base)).after
        return (pairs(sum(self.harm[i] for i in (*base, *added))).model_copy(update={"before": before}),)

    def run(self, in_order: bool = False, **options: Any) -> tuple[list[int], dict[int, str]]:
        alone = {"z_threshold": 3.0, "max_accepted": None, "parallelism": 1} | options
        candidates = [
            candidate(i).measured(self.change([], [i]), ITEMS, alone["z_threshold"])
            for i in range(len(self.single))
        ]
        composition = Composition(candidates, _unit, in_order=in_order, **alone)
        judged = self.drive(composition)
        assert [c.reduction for c in judged] == [c.reduction for c in candidates]
        accepted = [_index(c.reduction) for c in composition.accepted]
        return accepted, {_index(c.reduction): c.verdict for c in judged}

    def drive(self, composition: Composition) -> list[Candidate]:
        """Answer all that a composition wants measured; return what it makes of its candidates."""
        plan = composition.run()
        changes: list[Change] | None = None
        try:
            while True:
                stage = next(plan) if changes is None else plan.send(changes)
                self.stages.append(len(stage.units))
                changes = [self.change(_indices(u.base), _indices(u.added)) for u in stage.units]  # type: ignore[attr-defined]
        except StopIteration as stop:
            judged: list[Candidate] = stop.value
            return judged


def _unit(base: Sequence[Candidate], added: Sequence[Candidate], subject: str) -> MeasureChange:
    return MeasureChange(
        checkpoint=Path("/nowhere"),
        base=tuple(c.reduction for c in base),
        added=tuple(c.reduction for c in added),
        objectives=(ObjectiveSource(metric="perplexity", text=TextSource(name="prose")),),
        part="search",
        subject=subject,
    )


def _index(reduction: Reduction) -> int:
    return int(reduction.address.split(".")[1])


def _indices(reductions: Sequence[Reduction]) -> list[int]:
    return [_index(reduction) for reduction in reductions]


def test_the_best_is_first_and_needs_no_second_measurement() -> None:
    simulation = Simulation([0.02, -0.05, None, 0.0])
    assert simulation.run() == (
        [1],
        {0: "not significant", 1: "accepted", 2: "not significant", 3: "not significant"},
    )
    assert simulation.stages == []


def test_what_no_longer_helps_in_company_is_rejected() -> None:
    accepted, verdicts = Simulation([-0.05, -0.04, -0.03], joint={(0, 1): 0.06}).run()
    assert accepted == [0, 2]
    assert verdicts[1] == "not significant in composition"


def test_backward_keeps_the_order_of_the_candidates() -> None:
    effects = [-0.03, -0.05, -0.04]
    assert Simulation(effects).run()[0] == [1, 2, 0]
    assert Simulation(effects).run(in_order=True)[0] == [0, 1, 2]


def test_backward_takes_the_best_of_each_matrix_first() -> None:
    effects = {(1, 3): -0.03, (1, 4): -0.05, (1, 5): 0.0, (0, 3): -0.001, (0, 4): -0.09, (0, 5): -0.08}
    candidates = [
        candidate(index, rank).measured(Change(pairs=(pairs(effect),)), ITEMS, 3.0)
        for (index, rank), effect in effects.items()
    ]
    composition = Composition(
        candidates, _unit, z_threshold=3.0, max_accepted=None, parallelism=1, in_order=True
    )
    plan = composition.run()
    (unit,) = next(plan).units
    assert [(_index(r), r.rank) for r in unit.base] == [(1, 4)]  # type: ignore[attr-defined]
    assert [(_index(r), r.rank) for r in unit.added] == [(0, 4)]  # type: ignore[attr-defined]
    with pytest.raises(StopIteration):
        plan.send([Change(pairs=(pairs(-0.02),))])
    assert [(_index(c.reduction), c.proposal.rank) for c in composition.accepted] == [(1, 4), (0, 4)]


def test_guards_tell_what_was_decided_on() -> None:
    """On top of a change that cost a guard a little, the guard is compared with the base."""
    first, second = compose(Simulation([-0.05, -0.04], harm=[0.0007, 0.0008]))
    assert (first.verdict, second.verdict) == ("accepted", "hurts a guard")
    # The second alone is within the tolerance; with the first it is not, and that is what the ledger tells.
    assert [pairs.comparison.delta for pairs in first.guards] == pytest.approx([0.0007])
    assert [pairs.comparison.delta for pairs in second.guards] == pytest.approx([0.0015])
    together = compose(Simulation([-0.05, -0.0024, -0.0024], harm=[0.0007, -0.0003, -0.0003]))
    assert [c.verdict for c in together] == ["accepted", "accepted in a group", "accepted in a group"]
    assert [c.guards[0].comparison.delta for c in together] == pytest.approx([0.0007, 0.0001, 0.0001])


def test_members_of_a_group_share_its_evidence() -> None:
    alone, *members = compose(Simulation([-0.05, -0.0024, -0.0024]))
    assert (alone.verdict, alone.group, alone.is_accepted) == ("accepted", None, True)
    assert [(c.verdict, c.group, c.is_accepted) for c in members] == [("accepted in a group", 1, True)] * 2
    assert [c.composed and c.composed.delta for c in members] == pytest.approx([-0.0048] * 2)


def compose(simulation: Simulation) -> list[Candidate]:
    given = [
        candidate(i).measured(simulation.change([], [i]), ITEMS, 3.0) for i in range(len(simulation.single))
    ]
    return simulation.drive(Composition(given, _unit, z_threshold=3.0, max_accepted=None, parallelism=1))


def test_the_limit_ends_the_search() -> None:
    accepted, verdicts = Simulation([-0.05, -0.04, -0.03, -0.002, -0.002]).run(max_accepted=2)
    assert accepted == [0, 1]
    assert verdicts[2] == "limit reached"


def test_nothing_is_accepted_without_significance() -> None:
    for effects in ([0.05, 0.0], [-0.0005, 0.01], [None, None], []):
        assert Simulation(effects).run()[0] == []


def test_weak_ones_are_accepted_together_or_not_at_all() -> None:
    weak = [-0.0018] * 4
    accepted, verdicts = Simulation(weak).run()
    assert sorted(accepted) == [0, 1, 2, 3]
    assert set(verdicts.values()) == {"accepted in a group"}
    # Of nested groups the one that helps most: the whole spoils itself, the better half does not.
    accepted, _ = Simulation([-0.0022, -0.0021, -0.0018, -0.0017], joint={(2, 3): 0.02}).run()
    assert accepted == [0, 1]
    assert Simulation(weak, joint={(a, b): 0.01 for a in range(4) for b in range(4)}).run()[0] == []
    assert len(Simulation(weak).run(max_accepted=3)[0]) == 3


def measured_on_a_quarter(simulation: Simulation) -> list[Candidate]:
    changes = [simulation.change([], [i]) for i in range(len(simulation.single))]
    return [candidate(i).measured(change, 4 * ITEMS, 3.0) for i, change in enumerate(changes)]


@pytest.mark.parametrize("parallelism", [1, 4])
def test_nearly_proven_ones_are_tried_at_once_and_one_by_one_if_that_fails(parallelism: int) -> None:
    # On a quarter of the data: the first is significant, two nearly are, the last is promising at best.
    effects = [-0.05, -0.004, -0.0038, -0.0018]

    def drive(simulation: Simulation) -> tuple[list[str], list[int]]:
        given = measured_on_a_quarter(simulation)
        assert [c.decisive for c in given] == [True, False, False, False]
        assert {c.verdict for c in given} == {"promising"}
        composition = Composition(given, _unit, 3.0, None, parallelism)
        judged = simulation.drive(composition)
        return [c.verdict for c in judged], composition.steps

    together, apart = Simulation(effects), Simulation(effects, joint={(1, 2): 0.008})
    assert drive(together) == (
        ["accepted", "accepted in a group", "accepted in a group", "not significant in composition"],
        [1, 3],
    )
    assert together.stages == [1, 1]
    assert drive(apart) == (
        ["accepted", "accepted", "not significant in composition", "not significant in composition"],
        [1, 2],
    )
    assert apart.stages[0] == 1


def test_what_hurts_a_guard_is_never_accepted() -> None:
    accepted, verdicts = Simulation([-0.05, -0.04, -0.0018, -0.0018], harm=[0.01, 0.0, 0.01, 0.0]).run()
    assert accepted == [1]
    assert verdicts[0] == "hurts a guard"
    assert verdicts[2] == "not significant"


def test_one_reduction_of_a_matrix_is_enough() -> None:
    change = Simulation([-0.05]).change([], [0])
    candidates = [candidate(0, rank).measured(change, ITEMS, 3.0) for rank in (4, 5)]
    composition = Composition(candidates, _unit, z_threshold=3.0, max_accepted=None, parallelism=2)
    with pytest.raises(StopIteration) as stop:
        next(composition.run())
    assert [c.verdict for c in stop.value.value] == [
        "accepted",
        "another reduction of this matrix was accepted",
    ]


@settings(deadline=None)
@given(
    single=st.lists(st.one_of(st.none(), st.floats(-0.1, 0.05)), min_size=1, max_size=8),
    joint=st.dictionaries(
        st.tuples(st.integers(0, 7), st.integers(0, 7)), st.floats(-0.05, 0.1), max_size=10
    ),
    parallelism=st.integers(2, 9),
    limit=st.one_of(st.none(), st.integers(1, 4)),
    in_order=st.booleans(),
)
def test_parallelism_changes_nothing(
    single: list[float | None],
    joint: dict[tuple[int, int], float],
    parallelism: int,
    limit: int | None,
    in_order: bool,
) -> None:
    sequential = Simulation(single, joint).run(in_order, max_accepted=limit)
    speculative = Simulation(single, joint).run(in_order, max_accepted=limit, parallelism=parallelism)
    assert speculative == sequential
    assert limit is None or len(sequential[0]) <= limit


def spectrum(index: int, ranks: dict[str, int], snr: float | None) -> MatrixSpectrum:
    decisions = {
        key: RuleDecision(rank=rank, sigma=1.0, threshold=1.0, snr=snr, energy=0.5)
        for key, rank in ({"marchenko_pastur": 8} | ranks).items()
    }
    return MatrixSpectrum(
        matrix=matrix(index),
        decisions=decisions,
        singular_values=(1.0,),
        frobenius=1.0,
        sigma=1.0,
        bulk_distance=0.0,
    )


def spec(**fields: Any) -> LaserSpec:
    return LaserSpec.model_validate({"base_model_name": "m", "laser_model_name": "n"} | fields)


def test_every_rule_and_truncation_proposes_and_agreement_is_one_proposal() -> None:
    given = spec(rule=["laserrmt", "fraction"], keep=[0.5], truncation=["weight", "activation_aware"])
    spectra = [
        spectrum(0, {"laserrmt": 4, "fraction 0.5": 4}, 1.0),
        spectrum(1, {"laserrmt": 8, "fraction 0.5": 0}, 1.0),  # keeps everything, or nothing
        spectrum(2, {"laserrmt": 3, "fraction 0.5": 4}, 1.0),
    ]
    proposed = {(p.matrix.layer, p.rank, p.truncation): p.rules for p in propose(spectra, given)}
    both = ("laserrmt", "fraction 0.5")
    assert proposed == {
        (0, 4, "weight"): both,
        (0, 4, "activation_aware"): both,
        (2, 3, "weight"): ("laserrmt",),
        (2, 3, "activation_aware"): ("laserrmt",),
        (2, 4, "weight"): ("fraction 0.5",),
        (2, 4, "activation_aware"): ("fraction 0.5",),
    }


def test_shrinkage_is_of_the_weight() -> None:
    spectra = [spectrum(0, {"optimal_shrinkage": 4, "laserrmt": 4}, 1.0)]
    proposed = propose(spectra, spec(rule=["optimal_shrinkage", "laserrmt"]))
    assert {(p.truncation, p.shrink) for p in proposed} == {("weight", True), ("activation_aware", False)}


def test_without_a_gradient_the_noisiest_or_the_last_come_first() -> None:
    spectra = [spectrum(i, {"laserrmt": 4}, snr) for i, snr in enumerate([3.0, 1.0, 2.0, None])]
    by_noise = spec(rule="laserrmt", selection="snr", candidates=3)
    assert [p.matrix.layer for p in order_proposals(propose(spectra, by_noise), by_noise)] == [1, 2, 0]
    backward = spec(rule="laserrmt", selection="backward")
    assert [p.matrix.layer for p in order_proposals(propose(spectra, backward), backward)] == [3, 2, 1, 0]
    everything = spec(rule="laserrmt", selection="exhaustive")
    assert len(order_proposals(propose(spectra, everything), everything)) == 4


@pytest.mark.parametrize(("selection", "layers"), [("snr", [1, 2, 0]), ("backward", [3, 2, 1])])
def test_a_limit_counts_matrices_and_of_each_all_is_measured(selection: str, layers: list[int]) -> None:
    ranks = {"laserrmt": 4, "marchenko_pastur": 5, "gavish_donoho": 3}
    spectra = [spectrum(i, ranks, snr) for i, snr in enumerate([3.0, 1.0, 2.0, 9.0])]
    alone = spec(selection=selection, top_k_layers=3)
    assert [p.matrix.layer for p in order_proposals(propose(spectra, alone), alone)] == layers
    several = spec(selection=selection, top_k_layers=3, rule=list(ranks))
    ordered = order_proposals(propose(spectra, several), several)
    assert [(p.matrix.layer, p.rank) for p in ordered] == [(n, rank) for n in layers for rank in (3, 4, 5)]


def predicted(index: int, rank: int, change: float, error: float = 0.001) -> Prediction:
    return Prediction(
        address=matrix(index).address,
        truncation="weight",
        rank=rank,
        shrink=False,
        mean=change,
        standard_error=error,
        fisher=0.0,
    )


def test_each_matrix_comes_once_with_its_best_rank_and_predicted_harm_last() -> None:
    changes = {(0, 3): -0.011, (0, 4): -0.012, (1, 3): -0.005, (2, 3): 0.01}
    merits = merits_of([[predicted(*place, change) for place, change in changes.items()]])
    given = [
        candidate(index, rank).judged(merit=merits[matrix(index).address, "weight", rank, False])
        for index, rank in changes
    ]
    chosen = choose_predicted([*given, candidate(3)], 3)
    assert [(c.proposal.matrix.layer, c.proposal.rank) for c in chosen] == [(0, 4), (1, 3), (2, 3)]
    assert len(choose_predicted(given, 2)) == 2


def test_objective_and_guards_count_alike_whatever_their_units() -> None:
    objective = [predicted(0, 3, -0.002), predicted(1, 3, -0.001), predicted(2, 3, -0.003)]
    guard = [predicted(0, 3, 3.0, error=1.0), predicted(1, 3, -1.0, error=1.0)]
    merits = merits_of([objective, guard])
    addresses = {address: merit for (address, *_), merit in merits.items()}
    assert addresses == pytest.approx({matrix(0).address: 1.0, matrix(1).address: -2.0})
