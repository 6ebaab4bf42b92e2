"""A storm of faults on a service of several nodes, and how long each takes to recover from: `make chaos`.

python -m benchmarks.chaos --faults 200 --seed 1            mixed jobs, every kind of fault
python -m benchmarks.chaos --faults 0 --recoveries 5        the times of recovery alone, each fault by itself
python -m benchmarks.chaos --faults 100 --postgres          the same with a PostgreSQL server as the job store

Prints tables in Markdown. Exit code 1 when anything that was accepted was lost, done twice, or differs.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from tests.conftest import ROOT, make_tiny_llama
from tests.support import probe
from tests.support.namespaces import has_namespaces
from tests.support.ordeal import Ordeal, Verdict, endure, kill_heads
from tests.support.orders import KINDS

#: What is promised, in seconds, and the fault that is measured for it.
PROMISED = {"kill worker": 5.0, "kill supervisor": 10.0, "kill node": 40.0, "kill head": 60.0}
#: What takes the program away that takes the connections.
PROXY_FAULTS = ("kill haproxy", "kill proxy actor")
#: How long it may take until there is another.
PROXY_S = 20.0


def main() -> int:
    asked = _arguments()
    begin = time.monotonic()

    def tell(text: str) -> None:
        print(f"{time.monotonic() - begin:7.1f} s  {text}", file=sys.stderr, flush=True)

    sound = True
    with _directory(asked.directory) as directory:
        stories = _stories(directory)
        print("\n".join(_circumstances()))
        if asked.faults:
            ordeal = Ordeal(
                seed=asked.seed,
                faults=asked.faults,
                kinds=tuple(asked.kinds),
                nodes=asked.nodes,
                disk_mb=asked.disk_mb,
                postgres=asked.postgres,
            )
            verdict = endure(ordeal, directory / "storm", stories, tell)
            print("\n".join(_storm(verdict)))
            sound = not verdict.violations and not verdict.unrecovered
        if asked.recoveries:
            print("\n".join(_recoveries(asked.recoveries, asked.seed, directory, stories, tell)))
    return 0 if sound else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--disk-mb", type=int, default=500, help="size of the data directory's own disk")
    parser.add_argument("--postgres", action="store_true")
    parser.add_argument("--recoveries", type=int, default=5, help="how often each is measured by itself")
    parser.add_argument("--directory", type=Path, help="of its own, where the logs stay")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    return parser.parse_args()


@contextmanager
def _directory(asked: Path | None) -> Iterator[Path]:
    if asked is not None:
        asked.mkdir(parents=True)
        yield asked
        return
    with tempfile.TemporaryDirectory(prefix="aidocks-chaos-") as scratch:
        yield Path(scratch)


def _stories(directory: Path) -> Path:
    shared = Path(os.environ.get("AIDOCKS_SHARED_DATA", ROOT.parent / "shared" / "data"))
    trained = shared / "models" / "stories260k"
    return trained if trained.is_dir() else make_tiny_llama(directory / "stories")


def _circumstances() -> Iterator[str]:
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    yield (
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores, load {load}; nodes are "
        + ("network namespaces" if has_namespaces() else "loopback addresses")
    )


def _storm(verdict: Verdict) -> Iterator[str]:
    yield ""
    yield f"{len(verdict.struck)} faults in {verdict.seconds:.0f} s, seed {verdict.ordeal.seed}"
    yield ""
    yield "| fault | times | work again after, median | worst | requests until the next one | not answered |"
    yield "|---|---|---|---|---|---|"
    by_fault = verdict.by_fault()
    for fault, times in Counter(struck.fault for struck in verdict.struck).most_common():
        found = verdict.recoveries(fault)
        asked = by_fault.get(fault, [])
        missed = probe.kinds(answer for answer in asked if not answer.good)
        told = ", ".join(f"{count} {what}" for what, count in missed.items()) or "0"
        yield (
            f"| {fault} | {times} | {_seconds(_median(found))} | {_seconds(max(found, default=None))} "
            f"| {len(asked)} | {told} |"
        )
    spans = [(s.time, s.time + PROXY_S) for s in verdict.struck if s.fault in PROXY_FAULTS]
    others = probe.outside(verdict.answers, spans)
    yield ""
    yield f"jobs: {verdict.statuses}"
    yield f"requests: {len(verdict.answers)}, of which {verdict.availability:.2%} were answered or asked to come again"
    yield (
        f"but for the {PROXY_S:.0f} s after {' and '.join(PROXY_FAULTS)}: {len(others)}, "
        f"of which {probe.share_good(others):.2%}"
    )
    yield f"answers: {probe.kinds(verdict.answers)}"
    yield from _listed("failed, and why", verdict.failures)
    yield from _listed("work not seen to go on", [f"{s.fault}: {s.victim}" for s in verdict.unrecovered])
    yield from _listed("violations", verdict.violations)


def _recoveries(
    times: int, seed: int, directory: Path, stories: Path, tell: Callable[[str], None]
) -> Iterator[str]:
    names = tuple(name for name in PROMISED if name != "kill head")
    ordeal = Ordeal(seed=seed, faults=times * len(names), kinds=("trivial",), names=names, together=0)
    verdict = endure(ordeal, directory / "recoveries", stories, tell)
    found = {name: verdict.recoveries(name) for name in names}
    found["kill head"] = kill_heads(times, directory / "heads", tell)
    yield ""
    yield "| fault | measured | work again after, median | worst | promised |"
    yield "|---|---|---|---|---|"
    for name, seconds in found.items():
        times_of = f"{_seconds(_median(seconds))} | {_seconds(max(seconds, default=None))}"
        yield f"| {name} | {len(seconds)} | {times_of} | {PROMISED[name]:.0f} s |"
    yield from _listed("violations", verdict.violations)


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s"


def _listed(title: str, lines: Iterable[str]) -> Iterator[str]:
    lines = list(lines)
    yield f"{title}: {len(lines)}"
    yield from (f"- {line}" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
