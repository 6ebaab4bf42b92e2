"""What a truncation that knows the inputs costs in loss, beside one of the same rank by the weights alone.

15 matrices of SmolLM2-135M, over all kinds and the whole depth, each alone; at laserRMT's rank and at that of the
Marchenko-Pastur edge. The inputs are known from other chunks than those that are measured.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from aidocks.checkpoints.files import OutputFile
from aidocks.checkpoints.reader import Checkpoint
from aidocks.evaluate.objectives import ObjectiveSource
from aidocks.laser.matrices import Matrix, Reduction, find_matrices
from aidocks.plan import UnitContext
from aidocks.specs.laser import Rule, Truncation
from benchmarks.comparison import Comparison
from benchmarks.peers import data_dir
from benchmarks.small_model import smollm2

MATRICES = 15
RULES: tuple[Rule, ...] = ("laserrmt", "marchenko_pastur")
TRUNCATIONS: tuple[Truncation, ...] = ("activation_aware", "weight")
#: Chunks of 128 tokens that the inputs are taken from, and that each loss is measured on.
CALIBRATION, MEASURED = 96, 16


def run() -> list[Comparison]:
    import torch

    torch.set_num_threads(1)
    text = data_dir("wikitext2_raw_test.txt")
    with smollm2() as (scratch, model):
        damage = _damage(model, UnitContext(scratch), _objective(text))
    return [_compare(damage, (rule,)) for rule in RULES] + [_compare(damage, RULES)]


def _compare(damage: list[dict[tuple[Rule, Truncation], float]], rules: tuple[Rule, ...]) -> Comparison:
    aware, plain = ([row[rule, cut] for rule in rules for row in damage] for cut in TRUNCATIONS)
    facts = {
        "truncations": len(aware),
        "smaller for": sum(a < b for a, b in zip(aware, plain, strict=True)),
        "ratio of means": round(statistics.mean(aware) / statistics.mean(plain), 3),
        "chunks of 128 tokens": MEASURED,
    }
    # Of medians, since some of the truncations help: the ratio of a pair can mean nothing.
    ours, other = (statistics.median(values) for values in (aware, plain))
    name = f"median loss damage at the rank of {' and '.join(rules)}, activation-aware"
    return Comparison(name, (ours,), (other,), "by the weights", "nats per token", facts)


def spread(matrices: tuple[Matrix, ...], count: int) -> list[Matrix]:
    """Choose matrices of all kinds in turn, from the first layer to the last."""
    kinds = sorted({matrix.kind for matrix in matrices})
    depth = max(matrix.layer or 0 for matrix in matrices)
    places = {(matrix.layer, matrix.kind): matrix for matrix in matrices}
    return [places[round(i * depth / (count - 1)), kinds[i % len(kinds)]] for i in range(count)]


def _objective(text: Path) -> ObjectiveSource:
    from aidocks.evaluate.texts import resolve_text

    return ObjectiveSource(
        metric="perplexity",
        text=resolve_text(str(text), (text.parent,)),
        seq_length=128,
        sizes={"calibration": CALIBRATION, "search": MEASURED, "held_out": MEASURED, "report": MEASURED},
    )


def _damage(
    model: Path, context: UnitContext, objective: ObjectiveSource
) -> list[dict[tuple[Rule, Truncation], float]]:
    """Return, for each matrix, the change of the loss by rule and truncation, in nats per token; prints a table."""
    from aidocks.laser.calibration import CollectCovariances

    matrices = spread(find_matrices(Checkpoint(model).entries), MATRICES)
    covariances = CollectCovariances(
        checkpoint=model,
        objectives=(objective,),
        matrices=tuple(matrix.address for matrix in matrices),
        directory=context.workspace,
    )
    files = covariances.run(context).files
    reductions = [_reductions(model, matrix, files, context) for matrix in matrices]
    print(f"{'matrix':42}{'rule':18}{'rank':>10}{'aware':>10}{'weights':>10}", flush=True)
    damage = []
    for matrix, cuts in zip(matrices, reductions, strict=True):
        changes = {key: _measure(model, cut, objective, context) for key, cut in cuts.items()}
        for rule in RULES:
            aware, plain = (changes[rule, truncation] for truncation in TRUNCATIONS)
            rank = f"{cuts[rule, 'weight'].rank}/{matrix.full_rank}"
            print(f"{matrix.name:42}{rule:18}{rank:>10}{aware:+10.4f}{plain:+10.4f}", flush=True)
        damage.append(changes)
    return damage


def _reductions(
    model: Path, matrix: Matrix, covariances: tuple[OutputFile, ...], context: UnitContext
) -> dict[tuple[Rule, Truncation], Reduction]:
    from aidocks.laser.decomposition import DecomposeMatrix
    from aidocks.laser.rules import decide
    from aidocks.laser.truncation import load_basis

    bases = {
        truncation: DecomposeMatrix(
            checkpoint=model,
            matrix=matrix,
            truncation=truncation,
            covariances=covariances,
            directory=context.workspace,
        ).run(context)
        for truncation in TRUNCATIONS
    }
    values = load_basis(bases["weight"].file.path).values_N.numpy()
    return {
        (rule, truncation): Reduction(
            address=matrix.address,
            rank=decide(rule, values, matrix.shape).rank,
            basis=basis.file.path,
            sha256=basis.file.sha256,
            truncation=basis.truncation,
        )
        for rule in RULES
        for truncation, basis in bases.items()
    }


def _measure(model: Path, cut: Reduction, objective: ObjectiveSource, context: UnitContext) -> float:
    from aidocks.laser.evaluation import MeasureChange

    unit = MeasureChange(
        checkpoint=model, added=(cut,), objectives=(objective,), part="report", subject=cut.address
    )
    delta = unit.run(context).objective.comparison.delta
    assert delta is not None, "losses are finite"
    return delta
