"""What merges of three experts are worth: perplexity on each expert's domain, beside base, experts and plain average.

python -m benchmarks.merge_quality            the experts of 260 thousand parameters
python -m benchmarks.merge_quality smol       those of SmolLM2-135M

All models see the same chunks of the texts' held-out halves. The experts learned from all of these texts, so that they
and their merges look better than on new ones; what is compared is how much of each expert a merge keeps. Needs
``AIDOCKS_BENCH_DATA``; writes ``benchmarks/results/merge-quality-<set>.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.local_merge import NAME, run_ours, write_config
from benchmarks.peers import data_dir, scratch_dir
from benchmarks.small_model import DOMAINS, smol_experts

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merge_quality", description=__doc__)
    parser.add_argument("set", nargs="?", choices=("tiny", "smol"), default="tiny")
    chosen = parser.parse_args().set
    base, experts = smol_experts() if chosen == "smol" else _tiny()
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="merge-quality-", dir=scratch_dir()) as place:
        for name, config in _merges(base, experts):
            found = _measure(name, config, Path(place), 128 if chosen == "tiny" else 24)
            # Base, experts and average are the same in all runs.
            rows |= {key: row for key, row in found.items() if key not in rows}
            print(name, json.dumps(rows[name]), flush=True)
    for name, row in rows.items():
        values = [f"{row[domain][0]:8.2f} ± {row[domain][1]:.2f}" for domain in DOMAINS]
        print(f"{name:32} {'  '.join(values)}  {_mean(row):8.2f}")
    RESULTS.mkdir(exist_ok=True)
    document = {"date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(), "perplexities": rows}
    (RESULTS / f"merge-quality-{chosen}.json").write_text(json.dumps(document, indent=1) + "\n")


def _tiny() -> tuple[Path, tuple[Path, ...]]:
    experts = tuple(data_dir(f"models/expert-260k-{domain}") for domain in DOMAINS)
    return data_dir("models/stories260k"), experts


def _merges(base: Path, experts: tuple[Path, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    def of(method: str, **parameters: Any) -> dict[str, Any]:
        per_model = {name: parameters.pop(name) for name in ("weight", "density") if name in parameters}
        return {
            "merge_method": method,
            "base_model": str(base),
            "models": [{"model": str(m), "parameters": per_model} for m in experts],
            "parameters": parameters,
        }

    def without_base(config: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in config.items() if key != "base_model"}

    python, math_, story = map(str, experts)
    pair = {"name": "pair", "merge_method": "slerp", "base_model": python, "parameters": {"t": 0.5}}
    pair["models"] = [{"model": python}, {"model": math_}]
    yield (
        "SLERP, python and math, then story",
        {
            "stages": [pair],
            "merge_method": "slerp",
            "base_model": "pair",
            "models": [{"model": "pair"}, {"model": story}],
            "parameters": {"t": 1 / 3},
        },
    )
    yield "multi-SLERP", without_base(of("multislerp", weight=1.0))
    yield "Karcher mean", without_base(of("karcher"))
    yield "model stock", of("model_stock")
    for scale in (1 / 3, 0.6, 1.0):
        yield f"task arithmetic, weight {scale:.2f}", of("task_arithmetic", weight=scale)
    for density in (0.2, 0.5, 0.8):
        yield f"TIES, density {density}", of("ties", weight=1.0, density=density)
    yield "TIES, density 0.5, lambda 1.5", of("ties", weight=1.0, density=0.5, **{"lambda": 1.5})
    for density in (0.5, 0.8):
        yield f"DARE linear, density {density}", of("dare_linear", weight=0.5, density=density)
        yield f"DARE TIES, density {density}", of("dare_ties", weight=0.5, density=density)
    yield "DELLA, density 0.7", of("della", weight=0.5, density=0.7, epsilon=0.2)
    yield "breadcrumbs, density 0.8", of("breadcrumbs", weight=0.5, density=0.8)
    yield "SCE, top 50 %", of("sce", select_topk=0.5)


def _measure(name: str, config: dict[str, Any], scratch: Path, chunks: int) -> dict[str, dict[str, Any]]:
    texts = [str(data_dir(f"domain_{domain}.jsonl")) for domain in DOMAINS]
    request = {**config, "evaluate": True, "text": texts, "chunks": chunks, "seqlen": 128}
    run_ours(write_config(scratch / "request.yaml", request), scratch / "home", fresh=False)
    manifest = json.loads((scratch / "home" / "models" / NAME / "aidocks.json").read_text())
    rows = {}
    for model in manifest["metrics"]["perplexities"]:
        titles = {"merge": name, "average": "plain average"}
        title = titles.get(model["model"], Path(model["reference"]).name)
        rows[title] = {
            domain: (part["perplexity"], part["standard_error"])
            for domain, part in zip(DOMAINS, model["domains"], strict=True)
        }
    return rows


def _mean(row: dict[str, Any]) -> float:
    """Return the geometric mean over the domains."""
    return math.exp(sum(math.log(row[domain][0]) for domain in DOMAINS) / len(DOMAINS))


if __name__ == "__main__":
    main()
