"""Decisions without a model: effects are simulated, so that every path of the search can be walked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aidocks.evaluate.perplexity import PerplexityResult, compare
from aidocks.laser.evaluation import EvaluateReductions
from aidocks.laser.matrices import Matrix
from aidocks.laser.scan import MatrixSpectrum, RuleDecision
from aidocks.laser.selection import Candidate, choose_candidates, compose_greedily

CHUNKS = 16


def candidate(index: int) -> Candidate:
    matrix = Matrix(name=f"layers.{index}.proj.weight", layer=index, kind="proj", shape=(8, 8), dtype="F32")
    return Candidate(matrix=matrix, rank=4, energy=0.9, noise_ratio=1.0)


def losses(delta: float | None) -> PerplexityResult:
    """Losses that differ from the base by ``delta`` on average, with a standard error of about 0.001."""
    wobble = [0.004 * (-1) ** i for i in range(CHUNKS)]
    nll = [
        None if delta is None else 10 * (3.0 + 0.1 * i + delta + w * bool(delta))
        for i, w in enumerate(wobble)
    ]
    return PerplexityResult(
        nll=tuple(nll), tokens=(10,) * CHUNKS, positions=tuple(range(CHUNKS)), dtype="float32"
    )


class Simulation:
    """Effects of sets of reductions: the sum of single effects plus what pairs add."""

    def __init__(
        self, single: Sequence[float | None], pairs: dict[tuple[int, int], float] | None = None
    ) -> None:
        self.single = single
        self.pairs = pairs or {}
        self.measured = 0

    def effect(self, indices: Sequence[int]) -> float | None:
        alone = [self.single[i] for i in indices]
        if any(effect is None for effect in alone):
            return None
        joint = sum(self.pairs.get((a, b), 0.0) for a in indices for b in indices if a < b)
        return sum(effect or 0.0 for effect in alone) + joint

    def run(self, **options: Any) -> tuple[list[int], dict[int, str], PerplexityResult]:
        candidates = [candidate(i) for i in range(len(self.single))]
        baseline = losses(0.0)
        measured = [losses(self.effect([i])) for i in range(len(candidates))]
        candidates = [
            c.model_copy(update={"alone": compare(baseline, result)})
            for c, result in zip(candidates, measured, strict=True)
        ]
        arguments = {"z_threshold": 3.0, "max_accepted": None, "parallelism": 1} | options
        plan = compose_greedily(candidates, measured, baseline, _unit, **arguments)
        try:
            stage = next(plan)
            while True:
                self.measured += len(stage.units)
                results = [losses(self.effect(_indices(unit))) for unit in stage.units]
                stage = plan.send(results)
        except StopIteration as stop:
            accepted, decided, final = stop.value
        verdicts = {c.matrix.layer: c.verdict for c in decided}
        return [c.matrix.layer for c in accepted], verdicts, final


def _unit(reductions: Sequence[Candidate], subject: str) -> EvaluateReductions:
    return EvaluateReductions(
        checkpoint="/nowhere",
        reductions=tuple(c.reduction for c in reductions),
        text="prose",
        split="search",
        seq_length=11,
        chunks=CHUNKS,
        seed=0,
        subject=subject,
    )


def _indices(unit: Any) -> list[int]:
    return [int(reduction.name.split(".")[1]) for reduction in unit.reductions]


def test_the_best_is_first_and_needs_no_second_measurement() -> None:
    simulation = Simulation([0.02, -0.05, None, 0.0])
    accepted, verdicts, final = simulation.run()
    assert accepted == [1]
    assert verdicts == {1: "accepted"}
    assert simulation.measured == 0
    assert compare(losses(0.0), final).delta == pytest.approx(-0.05, abs=1e-9)


def test_what_no_longer_helps_in_company_is_rejected() -> None:
    simulation = Simulation([-0.05, -0.04, -0.03], pairs={(0, 1): 0.06})
    accepted, verdicts, _ = simulation.run()
    assert accepted == [0, 2]
    assert verdicts[1] == "not significant in composition"


def test_the_limit_ends_the_search() -> None:
    accepted, verdicts, _ = Simulation([-0.05, -0.04, -0.03]).run(max_accepted=2)
    assert accepted == [0, 1]
    assert verdicts[2] == "limit reached"


def test_nothing_is_accepted_without_significance() -> None:
    for effects in ([0.05, 0.0], [-0.002, 0.01], [None, None], []):
        simulation = Simulation(effects)
        accepted, _, final = simulation.run()
        assert accepted == []
        assert final == losses(0.0)


@settings(deadline=None)
@given(
    single=st.lists(st.one_of(st.none(), st.floats(-0.1, 0.05)), min_size=1, max_size=8),
    pairs=st.dictionaries(
        st.tuples(st.integers(0, 7), st.integers(0, 7)), st.floats(-0.05, 0.1), max_size=10
    ),
    parallelism=st.integers(2, 9),
    limit=st.one_of(st.none(), st.integers(1, 4)),
)
def test_parallelism_changes_nothing(
    single: list[float | None], pairs: dict[tuple[int, int], float], parallelism: int, limit: int | None
) -> None:
    sequential = Simulation(single, pairs).run(max_accepted=limit)
    speculative = Simulation(single, pairs).run(max_accepted=limit, parallelism=parallelism)
    assert speculative == sequential


def spectrum(index: int, ranks: tuple[int, int], snr: float | None) -> MatrixSpectrum:
    def decision(rank: int, snr: float | None) -> RuleDecision:
        return RuleDecision(rank=rank, sigma=1.0, threshold=1.0, snr=snr, energy=0.5)

    return MatrixSpectrum(
        matrix=candidate(index).matrix,
        decisions={"marchenko_pastur": decision(ranks[0], snr), "laserrmt": decision(ranks[1], 9.0 - index)},
        singular_values=(1.0,),
        frobenius=1.0,
    )


def test_candidates_come_noisiest_first_and_never_include_a_matrix_that_stays_whole() -> None:
    spectra = [
        spectrum(0, (1, 8), 3.0),
        spectrum(1, (2, 5), 1.0),
        spectrum(2, (3, 6), 2.0),
        spectrum(3, (8, 7), None),
    ]
    by_edge = choose_candidates(spectra, "marchenko_pastur", None)
    assert [(c.matrix.layer, c.rank) for c in by_edge] == [(1, 2), (2, 3), (0, 1)]
    assert [(c.matrix.layer, c.rank) for c in choose_candidates(spectra, "laserrmt", 2)] == [(1, 5), (2, 6)]
