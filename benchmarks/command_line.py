"""`aidocks --help` beside a bare interpreter start: the price of our imports."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.comparison import Comparison, in_turns


def run() -> list[Comparison]:
    ours, other = in_turns(
        lambda: _silent("-m", "aidocks", "--help"), lambda: _silent("-c", "pass"), runs=9, warm_up=2
    )
    return [Comparison("aidocks --help", ours, other, "python -c pass", facts={"target s": 0.3})]


def _silent(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
