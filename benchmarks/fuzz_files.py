"""Hostile files by the hundred thousand: ``python -m benchmarks.fuzz_files --cases 100000``.

Prints cases a second, what the doors answered, the slowest case, and whatever was no answer and no error of ours; ends
with 1 when there was such a thing. A case is repeated by ``python -m tests.support.fuzzing KIND NUMBER``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter

#: Share of each kind: most of what is cheap and close to the bytes.
SHARES = {
    "safetensors": 0.34, "index": 0.17, "beside": 0.1, "links": 0.08, "manifest": 0.08, "state": 0.07, "rows": 0.09,
    "spec": 0.03, "gguf": 0.04,
}  # fmt: skip


def main() -> None:
    from tests.support.fuzzing import run_cases

    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz_files", description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000, help="how many (default 100000)")
    parser.add_argument(
        "--first", type=int, default=0, help="number of the first case of each kind: its seed"
    )
    parser.add_argument(
        "--kind", choices=list(SHARES), action="append", help="only this kind; may be repeated"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args()
    kinds = asked.kind or list(SHARES)
    whole = sum(SHARES[kind] for kind in kinds)
    counts = {kind: max(1, round(asked.cases * SHARES[kind] / whole)) for kind in kinds}
    begun = time.perf_counter()
    account = run_cases(counts, first=asked.first, processes=asked.processes)
    seconds = time.perf_counter() - begun
    print(
        f"{account.cases} cases in {seconds:.0f} s: {account.cases / seconds:.0f} a second, {asked.processes} processes"
    )
    print("| kind | cases | doors that answered | refused, by class |\n|---|---:|---:|---|")
    for kind, outcomes in account.outcomes.items():
        refused = Counter(
            {name: count for name, count in outcomes.items() if name not in ("accepted", "fault", "crash")}
        )
        told = ", ".join(f"{name} {count}" for name, count in refused.most_common())
        print(f"| {kind} | {counts[kind]} | {outcomes['accepted']} | {told} |")
    print(
        f"slowest: {account.slowest[0]:.2f} s ({account.slowest[1]}); most memory gained: {account.grown >> 20} MiB"
    )
    crashes = sum(outcomes["crash"] for outcomes in account.outcomes.values())
    print(f"crashes: {crashes}; other faults: {len(account.faults) - crashes}")
    for fault in account.faults[:40]:
        print(f"  {fault}")
    sys.exit(bool(account.faults))


if __name__ == "__main__":
    main()
