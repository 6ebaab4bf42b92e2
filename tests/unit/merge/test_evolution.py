"""The search itself, on merges whose losses are formulas."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from aidocks.errors import IncompatibleModels, InvalidSpec
from aidocks.evaluate.objectives import ObjectiveSource
from aidocks.evaluate.texts import TextSource
from aidocks.merge.evolve.evolution import Evolution, Findings
from aidocks.merge.evolve.genome import checked_genome
from aidocks.merge.evolve.measuring import Losses, MeasureMerge, MergeLosses, is_hopeless
from aidocks.merge.evolve.report import ledger
from aidocks.specs.merge_evolve import MergeEvolveSpec
from aidocks.specs.read import build_spec

ITEMS = 32
SIZES = {"calibration": 8, "search": ITEMS, "held_out": ITEMS, "report": ITEMS}
OBJECTIVE = ObjectiveSource(metric="perplexity", text=TextSource(name="prose"), sizes=SIZES)
GUARD = ObjectiveSource(metric="log_likelihood", text=TextSource(name="capitals"), sizes=SIZES)

#: (values, part) -> mean loss.
Formula = Callable[[Sequence[float], str], float]


def spec(names: int = 2, **fields: Any) -> MergeEvolveSpec:
    models = [
        {"model": f"model-{number}", "parameters": {"weight": {"min": 0, "max": 1}}}
        for number in range(names)
    ]
    settings = {
        "merge_method": "linear",
        "models": models,
        "objective": "perplexity:prose",
        "generations": 12,
    }
    return build_spec(MergeEvolveSpec, settings | fields)


class Formulas:
    """Merges whose units carry their values in their subject; ``measure`` stands for the worker."""

    def __init__(
        self, *formulas: Formula, refused: Callable[[Sequence[float]], bool] = lambda _: False
    ) -> None:
        self._formulas = formulas
        self._refused = refused
        self.measured: list[tuple[str, str]] = []

    def unit(
        self, values: Any, part: Any, subject: str, *, objectives: Any, start: Any = None
    ) -> MeasureMerge:
        if self._refused(values):
            raise InvalidSpec("The weights sum to 0.")
        return self._unit(repr(tuple(values)), part, objectives, start)

    def alone(self, objectives: Any, part: Any) -> dict[str, MeasureMerge]:
        return {name: self._unit(repr(values), part, objectives, None) for name, values in ALONE.items()}

    def _unit(self, subject: str, part: Any, objectives: Any, start: Any) -> MeasureMerge:
        return MeasureMerge(host="/none", objectives=objectives, part=part, start=start, subject=subject)

    def measure(self, unit: MeasureMerge) -> MergeLosses:
        self.measured.append((unit.subject, unit.part))
        values = eval(unit.subject)
        found: list[Losses] = []
        for source, formula in zip(unit.objectives, self._formulas, strict=False):
            mean = formula(values, unit.part)
            if mean == float("inf"):
                return MergeLosses(losses=(losses(source, [None]),))
            # Items differ from one another, and each answers a little differently to a change.
            noise = random.Random(unit.part)
            all_of_them = [mean * (1 + 0.02 * noise.gauss(0, 1)) + noise.gauss(0, 1) for _ in range(ITEMS)]
            measured = losses(source, all_of_them)
            if unit.start is not None and not found:
                first = losses(source, all_of_them[: ITEMS // 4])
                if is_hopeless(losses(source, unit.start[: ITEMS // 4]), first):
                    return MergeLosses(losses=(first,))
            found.append(measured)
        return MergeLosses(losses=tuple(found))


ALONE = {"model-0": (1.0, 0.0), "model-1": (0.0, 1.0)}


def losses(source: ObjectiveSource, values: Sequence[float | None]) -> Losses:
    return Losses(
        metric=source.metric,
        positions=tuple(range(len(values))),
        losses=tuple(values),
        tokens=len(values),
        dtype="float32",
    )


def bowl(values: Sequence[float], part: str) -> float:
    return 3 + (values[0] - 0.9) ** 2 + (values[1] - 0.2) ** 2


def search(
    asked: MergeEvolveSpec, merges: Formulas, objectives: tuple[ObjectiveSource, ...] = (OBJECTIVE,)
) -> tuple[Findings, list[str]]:
    said: list[str] = []
    plan = Evolution(asked, checked_genome(asked), objectives, merges, said.append).run()
    results: list[Any] | None = None
    try:
        while True:
            stage = next(plan) if results is None else plan.send(results)
            # Backwards: no unit may rely on another having run before.
            measured = [merges.measure(unit) for unit in reversed(stage.units)]
            results = measured[::-1]
    except StopIteration as stop:
        return stop.value, said


def test_it_finds_the_values_and_proves_them() -> None:
    merges = Formulas(bowl)
    findings, said = search(spec(), merges)
    assert findings.accepted
    assert findings.objection is None
    assert findings.values == pytest.approx((0.9, 0.2), abs=0.1)
    assert findings.scores["held_out"][0].improved(1.645)
    assert set(findings.inputs) == {"model-0", "model-1"}
    assert findings.inputs["model-1"]["report"].improved(1.645)
    assert len([line for line in said if line.startswith("Generation")]) == len(findings.spreads)
    # What is proven was not looked at before the end.
    seen = [part for _, part in merges.measured]
    assert "held_out" not in seen[: seen.index("held_out")]
    assert set(seen[seen.index("held_out") :]) == {"held_out", "report"}
    lines = ledger(findings, (OBJECTIVE,))
    assert [line.decision for line in lines].count("the result") >= 1
    assert any("much worse" in line.decision for line in lines)
    assert all(len(line.values) == 2 for line in lines)


def test_equal_requests_find_the_same() -> None:
    one, other = (search(spec(), Formulas(bowl))[0] for _ in range(2))
    assert one.trials == other.trials
    assert one.values == other.values
    assert search(spec(seed=1), Formulas(bowl))[0].trials != one.trials


def test_one_dimension_is_searched_as_well() -> None:
    findings, _ = search(spec(1), Formulas(lambda values, part: 3 + (values[0] - 0.97) ** 2))
    assert findings.accepted
    assert findings.values[0] == pytest.approx(0.97, abs=0.05)


def test_what_held_out_data_do_not_confirm_is_not_kept() -> None:
    def flattering(values: Sequence[float], part: str) -> float:
        return bowl(values, part) if part == "search" else 3.0

    findings, said = search(spec(), Formulas(flattering))
    assert not findings.accepted
    assert "not significantly better" in str(findings.objection)
    assert findings.values == (0.5, 0.5) != findings.found
    assert said[-1].startswith("The initial values stay")


def test_a_start_that_is_the_best_stays() -> None:
    def peak(values: Sequence[float], part: str) -> float:
        return 3 + abs(values[0] - 0.5) + abs(values[1] - 0.5)

    findings, _ = search(spec(), Formulas(peak))
    assert not findings.accepted
    assert findings.values == (0.5, 0.5)


def test_candidates_that_break_a_guard_are_not_chosen() -> None:
    def guard(values: Sequence[float], part: str) -> float:
        return 2.0 if values[0] <= 0.7 else 4.0

    asked = spec(guards=["log_likelihood:capitals"], generations=15)
    findings, _ = search(asked, Formulas(bowl, guard), (OBJECTIVE, GUARD))
    assert findings.accepted
    assert findings.values[0] <= 0.7
    lines = ledger(findings, (OBJECTIVE, GUARD))
    assert any(line.decision == "breaks a guard" and line.guards[GUARD.label] for line in lines)


def test_values_of_which_there_is_no_merge_are_survived() -> None:
    def worse_left(values: Sequence[float], part: str) -> float:
        return float("inf") if values[0] < 0.3 else bowl(values, part)

    findings, _ = search(spec(step=0.5), Formulas(worse_left, refused=lambda values: values[1] > 0.6))
    assert findings.accepted
    lines = ledger(findings, (OBJECTIVE,))
    assert any("cannot be merged" in line.decision and line.loss is None for line in lines)
    assert any(line.loss is None and "cannot" not in line.decision for line in lines)


def test_a_start_that_cannot_be_measured_ends_the_search() -> None:
    with pytest.raises(IncompatibleModels, match="not finite") as caught:
        search(spec(), Formulas(lambda values, part: float("inf")))
    assert caught.value.field == "search"


def test_patience_ends_a_search_that_finds_nothing_more() -> None:
    findings, _ = search(spec(patience=2, generations=500), Formulas(bowl))
    assert findings.stopped_because == "2 generations added nothing"
    assert len(findings.spreads) < 100


def test_a_better_input_is_pointed_out() -> None:
    def pure(values: Sequence[float], part: str) -> float:
        return bowl(values, part) - (2 if tuple(values) == (1.0, 0.0) else 0)

    _, said = search(spec(), Formulas(pure))
    assert any(line.startswith("model-0 alone is better than the result") for line in said)


def test_a_centre_that_breaks_a_guard_is_no_finalist() -> None:
    def guard(values: Sequence[float], part: str) -> float:
        return 6.0 if part == "search" and min(values[:2]) > 0.8 else 1.0

    def corner(values: Sequence[float], part: str) -> float:
        return 3 + (values[0] - 0.9) ** 2 + (values[1] - 0.9) ** 2

    found = []
    for seed in range(6):
        asked = spec(guards=["log_likelihood:capitals"], seed=seed)
        findings, _ = search(asked, Formulas(corner, guard), (OBJECTIVE, GUARD))
        found.append(findings)
        assert min(findings.values) <= 0.8
        assert {trial.values for trial in findings.trials if trial.is_sound} >= {findings.found}
    assert any(not findings.trials[-1].is_sound for findings in found)


def test_a_centre_of_which_there_is_no_merge_is_survived() -> None:
    planned: list[Sequence[float]] = []

    def refused(values: Sequence[float]) -> bool:
        planned.append(values)
        # The start, six candidates of each of two generations, the last of which is none either, then the centre.
        return len(planned) in (13, 14)

    findings, _ = search(spec(generations=2), Formulas(bowl, refused=refused))
    assert [trial.what for trial in findings.trials[1:]] == ["drawn"] * 12
    assert findings.trials[-1].losses.fault
    assert findings.found in {trial.values for trial in findings.trials if trial.is_sound}


def test_a_guard_that_cannot_be_measured_at_the_start_ends_the_search() -> None:
    def guard(values: Sequence[float], part: str) -> float:
        return float("inf")

    with pytest.raises(IncompatibleModels, match="not finite"):
        search(spec(guards=["log_likelihood:capitals"]), Formulas(bowl, guard), (OBJECTIVE, GUARD))


def test_a_model_that_cannot_be_measured_alone_is_left_out() -> None:
    class Overflowing(Formulas):
        def measure(self, unit: MeasureMerge) -> MergeLosses:
            if unit.subject == repr(ALONE["model-1"]):
                return MergeLosses(fault="Its numbers are too large for float16.")
            return super().measure(unit)

    findings, _ = search(spec(), Overflowing(bowl))
    assert findings.accepted
    assert set(findings.inputs) == {"model-0"}
