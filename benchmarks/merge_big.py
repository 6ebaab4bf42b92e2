"""SLERP of two models of 3.8 GB: the whole process beside `cp` of as many bytes, from cold and from warm files.

With the hashes of the sources known, as they are of models that were made or used here before, and without. The bound
where the system's cache holds both sources is what memory gives: three passes over both (two reads, one sum), one of
the result. ``AIDOCKS_BENCH_BIG_PEER=1`` runs mergekit once, too. Needs 20 GB of disk.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from benchmarks.comparison import Comparison, Facts, Usage, drop_cache, run_process
from benchmarks.local_merge import NAME, run_ours, run_peer, write_config
from benchmarks.merge_process import slerp
from benchmarks.moe_big import make_model
from benchmarks.peers import NotAtHand, scratch_dir

T = TypeVar("T")
RUNS = 3


def run() -> list[Comparison]:
    if shutil.disk_usage(scratch_dir()).free < 20e9:
        raise NotAtHand("20 GB of disk are needed; AIDOCKS_BENCH_SCRATCH may lead to another disk")
    with tempfile.TemporaryDirectory(prefix="merge-big-", dir=scratch_dir()) as place:
        scratch = Path(place)
        models = [make_model(scratch / "models" / name, seed) for seed, name in enumerate("ab")]
        config = write_config(scratch / "slerp.yaml", slerp(*models))
        run_ours(config, scratch / "home")
        results = [
            *_beside_cp(config, scratch, "cold", fresh=True),
            *_beside_cp(config, scratch, "cold", fresh=False),
            *_beside_cp(config, scratch, "warm", fresh=False),
            _memory(config, scratch),
        ]
        if os.environ.get("AIDOCKS_BENCH_BIG_PEER"):
            results += _beside_peer(config, scratch)
    return results


def _beside_cp(config: Path, scratch: Path, cache: str, *, fresh: bool) -> list[Comparison]:
    """Time the merge, and `cp` of the same bytes: both sources read, the result written."""
    pairs = [
        (
            _ready(scratch, cache, lambda: run_ours(config, scratch / "home", fresh=fresh)),
            _ready(scratch, cache, lambda: _copy(scratch)),
        )
        for _ in range(RUNS)
    ]
    name = f"SLERP of 3.8 GB, {cache} files, hashes {'unknown' if fresh else 'known'}"
    facts: Facts = {
        "peak MB of one process": round(max(usage.peak_mb for usage, _ in pairs)),
        "CPU s": round(max(usage.cpu_seconds for usage, _ in pairs)),
        "must reach": "ratio 1.67 to cp of the same bytes",
    }
    ours = tuple(usage.seconds for usage, _ in pairs)
    return [Comparison(name, ours, tuple(cp.seconds for _, cp in pairs), "cp and sync", facts=facts)]


def _memory(config: Path, scratch: Path) -> Comparison:
    """Measure what all processes have together, in a run of its own; mapped pages of the sources count."""
    usage = _ready(scratch, "warm", lambda: run_ours(config, scratch / "home", together=True))
    return Comparison(
        "SLERP of 3.8 GB, peak memory of all processes",
        (usage.peak_mb,),
        unit="MB",
        facts={"must reach": 600},
    )


def _copy(scratch: Path) -> Usage:
    """Read both sources and write as many bytes as the result has: one is read only, the other copied."""
    command = 'cat "$1"/a/*.safetensors > /dev/null && cp -r "$1"/b "$2" && sync "$2"/b/*'
    return run_process(
        ["bash", "-c", command, "cp", scratch / "models", scratch / "copy"], scratch / "cp.log"
    )


def _beside_peer(config: Path, scratch: Path) -> list[Comparison]:
    ours = _ready(scratch, "warm", lambda: run_ours(config, scratch / "home"))
    theirs = _ready(scratch, "warm", lambda: run_peer(config, scratch / "peer"))
    name = "SLERP of 3.8 GB, warm files"
    return [
        Comparison(name, (ours.seconds,), (theirs.seconds,), "mergekit"),
        Comparison(f"{name}, peak memory", (ours.peak_mb,), (theirs.peak_mb,), "mergekit", "MB"),
    ]


def _ready(scratch: Path, cache: str, work: Callable[[], T]) -> T:
    """Run ``work`` with nothing waiting to be written, and its sources cold or warm."""
    for leftover in ("copy", "peer", f"home/models/{NAME}"):
        shutil.rmtree(scratch / leftover, ignore_errors=True)
    (scratch / "copy").mkdir()
    os.sync()
    drop_cache(scratch / "models")
    if cache == "warm":
        for path in sorted((scratch / "models").rglob("*.safetensors")):
            with path.open("rb", buffering=0) as stream:
                while stream.read(16 << 20):
                    pass
    return work()
