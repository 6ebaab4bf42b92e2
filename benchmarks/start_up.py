"""`aidocks up` from nothing to healthy, beside what Ray itself takes to start an empty local cluster."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from aidocks.settings import Settings
from benchmarks.comparison import Comparison, in_turns

RAY_ALONE = "import ray; ray.init(address='local', log_to_driver=False); ray.shutdown()"


def run() -> list[Comparison]:
    ours, other = in_turns(_service, lambda: _python(RAY_ALONE), runs=3)
    return [Comparison("aidocks up, to healthy", ours, other, "ray.init alone", facts={"target s": 25})]


def _service() -> float:
    from benchmarks.comparison import timed
    from cluster.bringup import start_service, stop_service

    with tempfile.TemporaryDirectory(prefix="aidocks-bench-") as home:
        settings = Settings(home=Path(home), port=18723)
        try:
            return timed(lambda: _ignore(start_service(settings)))
        finally:
            stop_service(settings)


def _ignore(_: object) -> None:
    return None


def _python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
