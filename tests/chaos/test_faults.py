"""Ten faults, drawn by chance, fall on a service of two nodes and a stream of jobs: what was accepted is done.

The long form of this is ``python -m benchmarks.chaos`` (`make chaos`).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import probe
from tests.support.ordeal import Ordeal, endure

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(600)]

#: Not those of HAProxy, for which `tests/ray` has its own: how long nobody listens is Serve's affair.
FAULTS = (
    "kill worker",
    "kill supervisor",
    "kill replica",
    "kill controller",
    "kill node",
    "kill client",
    "halt worker",
    "halt supervisor for a while",
    "full disk",
    "kill worker",
)


def test_what_was_accepted_is_done(tmp_path: Path, stories260k: Path) -> None:
    kinds = ("laser", "slerp", "trivial")
    ordeal = Ordeal(seed=29, faults=len(FAULTS), kinds=kinds, names=FAULTS, cpus=1, disk_mb=300, unfinished=2)
    verdict = endure(ordeal, tmp_path / "ordeal", stories260k, tell=print)
    assert verdict.violations == []
    # Those that failed met the full disk, and say so: anything else would be a violation.
    assert verdict.statuses["succeeded"] > verdict.statuses.get("failed", 0)
    assert verdict.unrecovered == []
    assert verdict.availability > 0.97, probe.kinds(verdict.answers)
