"""Run benchmarks, print their ratios and write ``benchmarks/results/<date>.json``.

python -m benchmarks                 all of them
python -m benchmarks health scan     some of them
python -m benchmarks --list          their names, and what each compares

Some compare with a program of another project, or need models that are not in this repository; they are skipped
where ``AIDOCKS_BENCH_PEER`` (a directory of programs) or ``AIDOCKS_BENCH_DATA`` (a directory of models and texts)
does not lead to them; ``AIDOCKS_BENCH_EMBEDDER`` is the directory of an embedding model. ``AIDOCKS_BENCH_SCRATCH`` is
where large files are made.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

from benchmarks.comparison import Comparison, machine
from benchmarks.peers import NotAtHand

#: Modules beside this one; each has ``run() -> list[Comparison]`` and says in its docstring what it compares.
NAMES = (
    "command_line",
    "health",
    "start_up",
    "serve_embed",
    "scan",
    "scan_workers",
    "scan_nodes",
    "suffix",
    "truncation",
    "assembly",
    "moe_process",
    "moe_gates",
    "moe_big",
    "merge_process",
    "merge_big",
    "merge_workers",
    "train_sft",
    "train_dpo",
    "train_grpo",
    "train_zero",
    "train_ray",
    "train_scaling",
    "train_speed",
    "train_backends",
    "train_embedding",
    "train_reranker",
    "train_retrieval_scaling",
)
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Figures beside their limit or peer."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(NAMES)} (default: all)")
    parser.add_argument("--list", action="store_true", help="say what there is, and end")
    arguments = parser.parse_args()
    if arguments.list:
        for name in NAMES:
            purpose = (import_module(f"benchmarks.{name}").__doc__ or "").split("\n\n")[0]
            print(f"{name}: {' '.join(purpose.split())}")
        return
    chosen = arguments.names or list(NAMES)
    if unknown := set(chosen) - set(NAMES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    results: list[Comparison] = []
    for name in chosen:
        try:
            found = import_module(f"benchmarks.{name}").run()
        except NotAtHand as missing:
            print(f"{name}: skipped; {missing}", flush=True)
            continue
        for comparison in found:
            results.append(comparison)
            print(line(comparison), flush=True)
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%S}.json"
    report = {"machine": machine(), "results": [asdict(r) | {"ratio": r.ratio} for r in results]}
    target.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written: {target}")


def line(comparison: Comparison) -> str:
    """Format one result for people: medians, ratio, facts."""
    text = f"{comparison.name}: {statistics.median(comparison.ours):.4g} {comparison.unit}".rstrip()
    if comparison.ratio is not None:
        other = f"{statistics.median(comparison.other):.4g} {comparison.unit}".rstrip()
        text += f" | {comparison.other_name}: {other} | ratio {comparison.ratio:.3g}"
    facts = ", ".join(f"{key} {value}" for key, value in comparison.facts.items())
    return f"{text} | {facts}" if facts else text


if __name__ == "__main__":
    main()
