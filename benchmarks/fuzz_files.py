"""Hostile files by the hundred thousand: ``python -m benchmarks.fuzz_files --cases 100000``.

Prints cases a second, what the doors answered, the slowest case, and whatever was no answer and no error of ours; ends
with 1 when there was such a thing. A case is repeated by ``python -m tests.support.hostile_process KIND NUMBER``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter

#: Share of each kind: most of what is cheap and close to the bytes.
SHARES = {
    "safetensors": 0.4, "index": 0.2, "beside": 0.03, "links": 0.09, "manifest": 0.08, "state": 0.08, "rows": 0.08,
    "spec": 0.01, "gguf": 0.03,
}  # fmt: skip


def main() -> None:
    from tests.support.fuzzing import FAULTS, run_cases

    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz_files", description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000, help="how many (default 100000)")
    parser.add_argument("--first", type=int, default=0, help="first case of each kind: its seed (default 0)")
    parser.add_argument(
        "--kind", choices=list(SHARES), action="append", help="only this one; may be repeated"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args()
    kinds = asked.kind or list(SHARES)
    whole = sum(SHARES[kind] for kind in kinds)
    counts = {kind: max(1, round(asked.cases * SHARES[kind] / whole)) for kind in kinds}
    begun = time.perf_counter()
    account = run_cases(counts, first=asked.first, processes=asked.processes)
    seconds, computed = time.perf_counter() - begun, sum(account.seconds.values())
    print(
        f"{account.cases} cases in {seconds:.0f} s, {asked.processes} processes: "
        f"{account.cases / seconds:.0f} a second, {account.cases / computed:.0f} a second of a processor"
    )
    print(
        "| kind | cases | ms of a processor each | answered | refused, by class |\n|---|---:|---:|---:|---|"
    )
    for kind, outcomes in account.outcomes.items():
        refused = Counter(
            {name: count for name, count in outcomes.items() if name not in ("accepted", *FAULTS)}
        )
        told = ", ".join(f"{name} {count}" for name, count in refused.most_common())
        each = 1000 * account.seconds[kind] / counts[kind]
        print(f"| {kind} | {counts[kind]} | {each:.1f} | {outcomes['accepted']} | {told} |")
    slowest, which = account.slowest
    print(f"slowest: {slowest:.2f} s ({which}); most memory gained: {account.grown >> 20} MiB")
    print("; ".join(f"{what}: {account.count(what)}" for what in FAULTS))
    for fault in account.faults[:40]:
        print(f"  {fault}")
    sys.exit(bool(account.faults))


if __name__ == "__main__":
    main()
