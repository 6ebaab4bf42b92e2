"""The actor that runs units: one at a time, on its own GPU or its share of the cores."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from aidocks.executor import Outcome, let_threads_sleep, run_unit
from aidocks.log import log_to_file
from aidocks.plan import Unit, UnitContext, WorkerCache
from aidocks.settings import Settings
from aidocks.threads import give_way


class Worker:
    """Runs units. Loads nothing before the first unit asks for it.

    Args:
        name: Readable name, such as ``worker-1``.
        device: Torch device of this worker.
        threads: Threads that its linear algebra may use.
    """

    def __init__(self, name: str, device: str, threads: int) -> None:
        self._name = name
        self._device = device
        self._threads = threads
        self._cache = WorkerCache()
        # Read by the libraries when they are first imported, which the first unit does.
        for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ[variable] = str(threads)
        let_threads_sleep()
        give_way()
        log_to_file(Settings(), f"{name}.log")

    def run(self, unit: Unit[Any], workspace: Path) -> Outcome:
        """Run one unit to its end."""
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(self._threads)
        context = UnitContext(workspace, self._device, self._threads, self._cache)
        return run_unit(unit, context, self._name)
