"""Four experts of SmolLM2-135M, random gates: the whole process of `aidocks byo-moe --local` beside mergekit-moe's."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.comparison import Comparison, compare_processes
from benchmarks.local_moe import run_ours, run_peer, write_request
from benchmarks.peers import peer, scratch_dir
from benchmarks.small_model import smol_experts


def run() -> list[Comparison]:
    peer("mergekit-moe")
    base, experts = smol_experts()
    with tempfile.TemporaryDirectory(prefix="moe-process-", dir=scratch_dir()) as place:
        scratch = Path(place)
        request = write_request(scratch / "request.yaml", base, [base, *experts], "random")
        # Once, so that neither reads its modules or the models from disk.
        run_peer(request, scratch / "peer")
        run_ours(request, scratch / "home")
        results = []
        for what, fresh in (("", True), (", hashes of the sources known", False)):
            results += compare_processes(
                f"byo-moe, 4 experts of 135M, random gates{what}",
                lambda fresh=fresh: run_ours(request, scratch / "home", fresh=fresh),
                lambda: run_peer(request, scratch / "peer"),
                "mergekit-moe",
                runs=3,
                facts={"must reach": "ratio 0.2 of the time, 0.33 of the memory"},
            )
    return results
