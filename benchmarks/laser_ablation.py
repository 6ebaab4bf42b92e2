"""What removing "noise" does when nothing is measured on the way: every matrix of a group cut by one rule, no search.

python -m benchmarks.laser_ablation             prints a table; writes ``benchmarks/results/laser-ablation.json``

For every rule of random matrix theory, both truncations and three groups of matrices: the share of the squared norm
that is kept, and the perplexity of SmolLM2-135M on text that had no part in anything. Needs ``AIDOCKS_BENCH_DATA``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.laser_quality import SEQ_LENGTH
from benchmarks.peers import data_dir, scratch_dir
from benchmarks.small_model import smol_experts

RESULTS = Path(__file__).parent / "results"
RULES = ("laserrmt", "marchenko_pastur", "gavish_donoho", "screenot", "optimal_shrinkage")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
GROUPS = {"attention": ATTENTION, "MLP": MLP, "all": ATTENTION + MLP}
CALIBRATION, MEASURED = 32, 32


def main() -> None:
    from aidocks.evaluate.causal_lm import load
    from aidocks.evaluate.perplexity import compare
    from aidocks.laser.matrices import find_matrices

    model, _ = smol_experts()
    loaded = load(model, "bfloat16", "cpu")
    matrices = find_matrices(_checkpoint(model).entries)
    bases = _Bases(model, loaded, [matrix.address for matrix in matrices])
    base = _measure(loaded)
    print(f"base: {base.perplexity:.2f}")
    rows = []
    for rule, truncation in _cases():
        for group, kinds in GROUPS.items():
            chosen = [matrix for matrix in matrices if matrix.kind in kinds]
            energy = _cut(loaded, bases, chosen, rule, truncation)
            measured = _measure(loaded)
            change = compare(base, measured)
            bases.restore(loaded, chosen)
            row = {"rule": rule, "truncation": truncation, "group": group, "energy": energy}
            rows.append(row | {"perplexity": measured.perplexity, "delta": change.delta, "z": change.z})
            print(
                f"{rule:18s} {truncation:17s} {group:10s} energy {energy:.3f} ppl {measured.perplexity:12.2f}"
            )
    RESULTS.mkdir(exist_ok=True)
    document = {"date": time.strftime("%Y-%m-%d"), "base": base.perplexity, "rows": rows}
    (RESULTS / "laser-ablation.json").write_text(json.dumps(document, indent=1) + "\n")


def _cases() -> Iterator[tuple[str, str]]:
    for rule in RULES:
        for truncation in ("weight", "activation_aware"):
            if (rule, truncation) != ("optimal_shrinkage", "activation_aware"):
                yield rule, truncation


class _Bases:
    """Stored matrices with their directions by both truncations; the directions are kept in files."""

    def __init__(self, model: Path, loaded: Any, addresses: list[str]) -> None:
        from aidocks.evaluate.objectives import ObjectiveSource
        from aidocks.evaluate.scoring import load_task
        from aidocks.laser.calibration import collect_moments

        self._checkpoint = _checkpoint(model)
        self._directory = scratch_dir() / "ablation"
        source = ObjectiveSource(
            metric="perplexity",
            text=_text(),
            seq_length=SEQ_LENGTH,
            sizes={"calibration": CALIBRATION, "search": 8, "held_out": MEASURED, "report": MEASURED},
        )
        task = load_task(source, "calibration", loaded.tokenizer)
        moments = collect_moments(loaded.network, addresses, task.batches)
        self._moments = moments.write(self._directory / "moments.safetensors")

    def values(self, address: str) -> Any:
        return self.basis(address, "weight").values_N.numpy()

    def basis(self, address: str, truncation: str) -> Any:
        from aidocks.laser.calibration import load_covariance
        from aidocks.laser.truncation import activation_basis, load_basis, save_basis, weight_basis

        path = self._directory / f"{address}.{truncation}.safetensors"
        if not path.exists():
            w_OI = self.stored(address)
            covariance_II = load_covariance((self._moments,), address)
            made = weight_basis(w_OI) if truncation == "weight" else activation_basis(w_OI, covariance_II)
            save_basis(path, made)
        return load_basis(path)

    def stored(self, address: str) -> Any:
        return self._checkpoint.tensor(address)

    def restore(self, loaded: Any, matrices: list[Any]) -> None:
        for matrix in matrices:
            loaded.network.get_parameter(matrix.address).data.copy_(self.stored(matrix.address))


def _cut(loaded: Any, bases: _Bases, matrices: list[Any], rule: str, truncation: str) -> float:
    """Cut matrices in the loaded model; return the share of their squared norm that is kept."""
    from aidocks.laser.rules import decide
    from aidocks.laser.truncation import reduce

    kept = total = 0.0
    for matrix in matrices:
        rank = decide(rule, bases.values(matrix.address), matrix.shape).rank
        w_OI = bases.stored(matrix.address)
        basis = bases.basis(matrix.address, truncation)
        reduced_OI = reduce(w_OI, basis, rank, shrink=rule == "optimal_shrinkage")
        loaded.network.get_parameter(matrix.address).data.copy_(reduced_OI)
        kept += float(reduced_OI.double().square().sum())
        total += float(w_OI.double().square().sum())
    return kept / total


def _measure(loaded: Any) -> Any:
    return loaded.measure(_text(), "held_out", SEQ_LENGTH, MEASURED)


def _text() -> Any:
    from aidocks.evaluate.texts import resolve_text

    return resolve_text(str(data_dir("wikitext2_raw_test.txt")), (Path("/"),))


def _checkpoint(model: Path) -> Any:
    from aidocks.checkpoints.reader import Checkpoint

    return Checkpoint(model)


if __name__ == "__main__":
    main()
