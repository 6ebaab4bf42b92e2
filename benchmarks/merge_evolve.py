"""What searching merge parameters is worth: three experts of 260 thousand parameters, on all three of their domains.

python -m benchmarks.merge_evolve              prints a table; writes ``benchmarks/results/merge-evolve.json``

For each method: perplexity on a text of stories, mathematics and Python in equal parts, with the initial values, with
those that the search found, and with the best of as many candidates drawn at random; of data that had no part in any
choice. Beside it the best single expert, and what a candidate costs. Needs ``AIDOCKS_BENCH_DATA``.
"""

from __future__ import annotations

import json
import shutil
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.comparison import Usage, run_process
from benchmarks.peers import data_dir, scratch_dir

RESULTS = Path(__file__).parent / "results"
DOMAINS = ("story", "math", "python")
#: Characters of every domain.
CHARACTERS = 150_000
NAME = "evolved"
GENERATIONS, POPULATION = 20, 8
_RANGE = {"min": 0, "max": 1}
_BY_PART = [{"filter": "mlp", "value": _RANGE}, {"filter": "self_attn", "value": _RANGE}, {"value": _RANGE}]


def main() -> None:
    text = _mixed_text(scratch_dir() / "merge-evolve.jsonl")
    rows = [_row(method, request, text) for method, request in _requests().items()]
    for row in rows:
        print(
            f"{row['method']:>16}  initial {row['initial']:7.2f}  searched {row['searched']:7.2f} (z {row['z']:6.1f}, "
            f"{'kept' if row['kept'] else 'not kept'})  at random {row['random']:7.2f}  best expert "
            f"{row['best_expert']:7.2f}  {row['candidates']} candidates, {row['seconds_per_candidate']:.2f} s each"
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "merge-evolve.json").write_text(json.dumps(rows, indent=1) + "\n")


def _requests() -> dict[str, dict[str, Any]]:
    """Return the merges by name; weights of one half and densities of three quarters are where each begins."""
    experts = [str(data_dir(f"models/expert-260k-{domain}")) for domain in DOMAINS]
    base = str(data_dir("models/stories260k"))
    weighted = [{"model": expert, "parameters": {"weight": dict(_RANGE)}} for expert in experts]
    density = {"density": {"min": 0.1, "max": 1, "initial": 0.75}}
    return {
        "linear": {"merge_method": "linear", "models": weighted},
        "task_arithmetic": {"merge_method": "task_arithmetic", "base_model": base, "models": weighted},
        "ties": {"merge_method": "ties", "base_model": base, "models": weighted, "parameters": density},
        "dare_ties": {
            "merge_method": "dare_ties",
            "base_model": base,
            "models": weighted,
            "parameters": density,
        },
        "slerp, 2 experts": {
            "merge_method": "slerp",
            "base_model": experts[1],
            "models": [{"model": expert} for expert in experts[1:]],
            "parameters": {"t": _BY_PART},
        },
    }


def _row(method: str, request: dict[str, Any], text: Path) -> dict[str, Any]:
    asked = request | {"objective": f"perplexity:{text}", "chunks": 64, "name": NAME, "patience": GENERATIONS}
    found, usage = _run(asked | {"generations": GENERATIONS, "population": POPULATION})
    drawn, _ = _run(asked | {"generations": 1, "population": GENERATIONS * POPULATION, "step": 1.0})
    alone = [
        score["before"] for model in found["inputs"] for score in model["scores"] if score["part"] == "report"
    ]
    report = found["report"]
    return {
        "method": method,
        "values": {value["name"]: value["value"] for value in found["values"]},
        "initial": report["before"],
        "searched": report["after"],
        "z": report["z"] or 0.0,
        "kept": found["accepted"],
        "random": drawn["report"]["after"],
        "best_expert": min(alone),
        "candidates": len(found["candidates"]),
        "seconds_per_candidate": usage.seconds / len(found["candidates"]),
    }


def _run(request: dict[str, Any]) -> tuple[dict[str, Any], Usage]:
    """Run one search in a process and a data directory of its own; return its report."""
    home = scratch_dir() / "merge-evolve"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    file = home / "request.json"
    file.write_text(json.dumps(request))
    roots = f"{scratch_dir()}:{data_dir()}"
    usage = run_process(
        [sys.executable, "-m", "aidocks", "merge-evolve", file, "--local"],
        home / "benchmark.log",
        {"AIDOCKS_HOME": home, "AIDOCKS_ALLOWED_ROOTS": roots},
    )
    return json.loads((home / "models" / NAME / "report" / "evolution.json").read_text()), usage


def _mixed_text(path: Path) -> Path:
    """Write records of all domains, of each as many characters."""
    records = []
    for domain in DOMAINS:
        taken, size = [], 0
        for line in islice(data_dir(f"domain_{domain}.jsonl").open(), 100_000):
            taken.append(line)
            size += len(line)
            if size > CHARACTERS:
                break
        records += taken
    path.write_text("".join(records))
    return path


if __name__ == "__main__":
    main()
