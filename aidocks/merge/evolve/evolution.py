"""The search for a merge's values: generations of candidates, then the proof on data that it never saw."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Protocol

from aidocks.errors import IncompatibleModels, InvalidSpec
from aidocks.evaluate.measurements import Pairs
from aidocks.evaluate.objectives import ObjectiveSource, Part
from aidocks.merge.evolve.measuring import MeasureMerge, MergeLosses
from aidocks.merge.evolve.population import WORST, Population, default_size
from aidocks.plan import Stage
from aidocks.specs.merge_evolve import MergeEvolveSpec
from aidocks.specs.search_space import Genome, Number

Values = tuple[Number, ...]
#: What breaks a guard costs more than anything that does not.
_PENALTY = 1e6
#: A generation that adds less than this share of all that was gained adds nothing.
_LEAST_PROGRESS = 0.01


class Merges(Protocol):
    """The way from values to a unit that measures their merge."""

    def unit(
        self,
        values: Values,
        part: Part,
        subject: str,
        *,
        objectives: tuple[ObjectiveSource, ...],
        start: tuple[float | None, ...] | None = None,
    ) -> MeasureMerge:
        """Return the unit that measures the merge with these values.

        Raises:
            InvalidSpec: There is no merge with these values, such as of weights whose sum is 0.
        """
        ...

    def alone(self, objectives: tuple[ObjectiveSource, ...], part: Part) -> dict[str, MeasureMerge]:
        """Return the units that measure every model of the merge alone, by reference, where it has the same form."""
        ...


@dataclass(frozen=True)
class Trial:
    """One candidate that was measured on the search data.

    Attributes:
        generation: From 1; 0 for the start, and for the centre of the distribution in the end.
        what: ``start``, ``drawn`` or ``centre``.
        values: In the order of the genome.
        losses: As measured; of what cannot be merged, why.
        pairs: Of the objective and the guards, against the start, on the items that were measured.
        cost: What the search minimises.
        is_sound: Whether it was measured to the end, and breaks no guard.
    """

    generation: int
    what: str
    values: Values
    losses: MergeLosses
    pairs: tuple[Pairs, ...]
    cost: float
    is_sound: bool


@dataclass(frozen=True)
class Findings:
    """What the search found.

    Attributes:
        trials: All that was measured on the search data, in order; the first is the start.
        found: The best values, on held-out data.
        accepted: Whether they are the result.
        objection: Why not.
        scores: By part: objective and guards, start against result.
        inputs: Model reference -> part -> objective, that model alone against the result.
        spreads: Of each generation, as shares of the ranges.
        stopped_because: Why the search ended.
    """

    trials: tuple[Trial, ...]
    found: Values
    accepted: bool
    objection: str | None
    scores: Mapping[Part, tuple[Pairs, ...]]
    inputs: Mapping[str, Mapping[Part, Pairs]]
    spreads: tuple[float, ...]
    stopped_because: str

    @property
    def values(self) -> Values:
        """The values of the result."""
        return self.found if self.accepted else self.trials[0].values


@dataclass
class Evolution:
    """The search of one request.

    Attributes:
        objectives: What decides, then the guards, with sizes.
        merges: Makes units of values.
        say: Tells people how it goes.
    """

    spec: MergeEvolveSpec
    genome: Genome
    objectives: tuple[ObjectiveSource, ...]
    merges: Merges
    say: Callable[[str], None]
    _trials: list[Trial] = field(default_factory=list)
    _spreads: list[float] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Candidates of a generation."""
        return self.spec.population or default_size(len(self.genome.variables))

    def run(self) -> Generator[Stage, list[Any], Findings]:
        """Yield the stages of the search and return its findings."""
        initial = self.genome.initial
        (start,) = yield Stage("start", (self._unit(initial, "search", "the initial values"),))
        if any(loss is None for measured in start.losses for loss in measured.losses):
            raise IncompatibleModels(
                "The merge with the initial values gives losses that are not finite.",
                field="search",
                hint="Begin with others (`initial`), or try another method.",
            )
        self._trials.append(self._trial(0, "start", initial, start))
        population = Population(
            self.genome.shares(initial),
            size=self.size,
            step=self.spec.step,
            seed=self.spec.seed,
        )
        stopped = yield from self._search(population)
        return (yield from self._prove(population, stopped))

    def _search(self, population: Population) -> Generator[Stage, list[Any], str]:
        """Measure generation after generation; return why it ended."""
        idle = 0
        for generation in range(1, self.spec.generations + 1):
            before = self._best.cost
            yield from self._generation(generation, population)
            gained = self._trials[0].cost - self._best.cost
            idle = 0 if before - self._best.cost > _LEAST_PROGRESS * gained else idle + 1
            self._tell(generation)
            if idle >= self.spec.patience:
                return f"{idle} generations added nothing"
            if population.has_converged:
                return "all candidates had become alike"
        return "all generations were measured"

    def _generation(self, number: int, population: Population) -> Generator[Stage, list[Any], None]:
        drawn = [self.genome.values(shares) for shares in population.draw()]
        self._spreads.append(population.spread)
        start = self._trials[0].losses.losses[0].losses
        units: list[MeasureMerge] = []
        faults: dict[Values, MergeLosses] = {}
        for place, values in enumerate(drawn, 1):
            try:
                units.append(self._unit(values, "search", f"candidate {number}.{place}", start))
            except InvalidSpec as error:
                faults[values] = MergeLosses(fault=error.message)
        measured = iter((yield Stage(f"generation {number}", tuple(units))) if units else ())
        trials = [self._trial(number, "drawn", v, faults.get(v) or next(measured)) for v in drawn]
        population.learn([trial.cost for trial in trials])
        self._trials += trials

    @property
    def _best(self) -> Trial:
        """The best so far, the start among them; the first of equals."""
        return min(self._trials, key=lambda trial: (not trial.is_sound, trial.cost))

    def _prove(self, population: Population, stopped: str) -> Generator[Stage, list[Any], Findings]:
        """Measure the best candidate and the distribution's centre on data that no choice has seen."""
        start = self._trials[0]
        centre = yield from self._measure_centre(self.genome.values(population.mean))
        merges = {trial.values: trial for trial in (start, self._best, centre) if trial and trial.is_sound}
        units = [self._unit(values, "held_out", "start and finalists on held-out data") for values in merges]
        alone = self.merges.alone(self.objectives[:1], "held_out")
        measured = yield Stage("verify", (*units, *alone.values()))
        held_out = dict(zip(merges, measured, strict=False))
        inputs = dict(zip(alone, measured[len(units) :], strict=True))
        found, objection = self._judge(held_out)
        result = start.values if objection else found
        report = yield from self._figures(result)
        parts: dict[Part, tuple[MergeLosses, MergeLosses]] = {
            "search": (start.losses, merges[result].losses),
            "held_out": (held_out[start.values], held_out[result]),
            "report": report[0],
        }
        findings = Findings(
            trials=tuple(self._trials),
            found=found,
            accepted=objection is None,
            objection=objection,
            scores={part: compare(*both) for part, both in parts.items()},
            inputs={
                reference: {
                    "held_out": compare(losses, held_out[result])[0],
                    "report": compare(report[1][reference], report[0][1])[0],
                }
                for reference, losses in inputs.items()
                if losses.fault is None  # alone, its numbers may be too large for the result's type
            },
            spreads=tuple(self._spreads),
            stopped_because=stopped,
        )
        self._conclude(findings)
        return findings

    def _measure_centre(self, centre: Values) -> Generator[Stage, list[Any], Trial | None]:
        """Measure the distribution's centre, which is often better than anything drawn around it.

        Returns:
            None where there is no merge with its values.
        """
        try:
            unit = self._unit(centre, "search", "the centre of the distribution")
        except InvalidSpec:
            return None
        (losses,) = yield Stage("centre", (unit,))
        trial = self._trial(0, "centre", centre, losses)
        self._trials.append(trial)
        return trial

    def _judge(self, held_out: Mapping[Values, MergeLosses]) -> tuple[Values, str | None]:
        """Return the best of the finalists on held-out data, and what speaks against it."""
        start, *finalists = held_out
        if not finalists:
            return start, "nothing else was better on the search data."
        objections = {values: self._objection(held_out[start], held_out[values]) for values in finalists}

        def merit(values: Values) -> tuple[bool, float]:
            return objections[values] is not None, _mean(held_out[values])

        found = min(finalists, key=merit)
        return found, objections[found]

    def _objection(self, start: MergeLosses, other: MergeLosses) -> str | None:
        if other.fault is not None:
            return other.fault
        objective, *guards = compare(start, other)
        if not objective.improved(self.spec.z_threshold):
            label, z = self.objectives[0].label, _number(objective.comparison.z)
            return f"on held-out data the {label} is not significantly better (z {z})."
        for source, pairs in zip(self.objectives[1:], guards, strict=True):
            if pairs.worsened(self.spec.z_threshold):
                return (
                    f"on held-out data the guard {source.label} is worse (z {_number(pairs.comparison.z)})."
                )
        return None

    def _figures(
        self, result: Values
    ) -> Generator[Stage, list[Any], tuple[tuple[MergeLosses, MergeLosses], dict[str, MergeLosses]]]:
        """Measure start, result and inputs on the data that had no part in anything."""
        start = self._trials[0].values
        merges = tuple(dict.fromkeys((start, result)))
        alone = self.merges.alone(self.objectives[:1], "report")
        units = [self._unit(values, "report", "start and result on report data") for values in merges]
        measured = yield Stage("final figures", (*units, *alone.values()))
        known = dict(zip(merges, measured, strict=False))
        return (known[start], known[result]), dict(zip(alone, measured[len(units) :], strict=True))

    def _unit(
        self, values: Values, part: Part, subject: str, start: tuple[float | None, ...] | None = None
    ) -> MeasureMerge:
        return self.merges.unit(values, part, subject, objectives=self.objectives, start=start)

    def _trial(self, generation: int, what: str, values: Values, losses: MergeLosses) -> Trial:
        start = self._trials[0].losses if self._trials else losses
        pairs = compare(start, losses)
        broken = [guard for guard in pairs[1:] if guard.worsened(self.spec.z_threshold)]
        delta = pairs[0].comparison.delta if pairs else None
        if delta is None:
            cost = WORST
        elif broken:
            cost = min(WORST, _PENALTY + sum(_excess(guard) for guard in broken))
        else:
            # Of one not measured to the end, what its change so far makes of it.
            cost = _mean(start) + delta
        is_whole = bool(pairs) and len(pairs[0].positions) == len(start.losses[0].positions)
        is_sound = is_whole and delta is not None and not broken
        return Trial(generation, what, values, losses, pairs, cost, is_sound)

    def _tell(self, generation: int) -> None:
        best, start = self._best, self._trials[0]
        pairs = best.pairs[0]
        self.say(
            f"Generation {generation} of {self.spec.generations}: best so far "
            f"{_number(pairs.value_after.value)} (start {_number(pairs.value_before.value)}, "
            f"z {_number(pairs.comparison.z if best is not start else 0.0)}), spread {self._spreads[-1]:.3f}."
        )

    def _conclude(self, findings: Findings) -> None:
        pairs = findings.scores["report"][0]
        if not findings.accepted:
            self.say(f"The initial values stay: {findings.objection}")
        else:
            before, after = _number(pairs.value_before.value), _number(pairs.value_after.value)
            self.say(
                f"Found better values. {self.objectives[0].label}, on data never seen: {before} -> {after} "
                f"(z {_number(pairs.comparison.z)})."
            )
        for reference, parts in findings.inputs.items():
            if parts["held_out"].worsened(self.spec.z_threshold):
                self.say(
                    f"{reference} alone is better than the result (z {_number(parts['held_out'].comparison.z)} "
                    "on held-out data)."
                )


def compare(before: MergeLosses, after: MergeLosses) -> tuple[Pairs, ...]:
    """Return the pairs of two merges on every objective that both were measured on."""
    return tuple(b.against(a) for a, b in zip(before.losses, after.losses, strict=False))


def _mean(losses: MergeLosses) -> float:
    known = losses.losses[0].losses if losses.losses else ()
    finite = [loss for loss in known if loss is not None]
    return fmean(finite) if finite and len(finite) == len(known) else math.inf


def _excess(pairs: Pairs) -> float:
    z = pairs.comparison.z
    return WORST if z is None else z


def _number(value: float | None) -> str:
    return "that is not finite" if value is None else f"{value:.4g}"
