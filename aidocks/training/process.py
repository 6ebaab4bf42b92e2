"""One process of a training: ``python -m aidocks.training.process training.json``.

The launcher starts it so; on a machine of one's own, ``torchrun --nproc-per-node 8 -m aidocks.training.process
training.json`` does the same, and a debugger may, too.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import sys
import traceback
from pathlib import Path

from aidocks.errors import AIDocksError
from aidocks.training.kinds import TRAINING

#: Number of the process that started this one, which shall not outlive it.
STARTER = "AIDOCKS_STARTED_BY"
_PR_SET_PDEATHSIG = 1


def main(arguments: list[str] | None = None) -> int:
    """Train what a JSON file of a training says; return the exit code."""
    _end_with_starter()
    given = sys.argv[1:] if arguments is None else arguments
    if len(given) != 1:
        sys.stderr.write("usage: python -m aidocks.training.process training.json\n")
        return 2
    training = TRAINING.validate_json(Path(given[0]).read_bytes())
    # By name, because the loops lie on a higher floor than the library.
    loop = importlib.import_module("train.loop")
    loop.prepare_environment()
    reporter = importlib.import_module("train.reporter").LocalReporter(
        training, rank=int(os.environ.get("RANK", "0")), world_size=int(os.environ.get("WORLD_SIZE", "1"))
    )
    try:
        loop.run(training, reporter)
    except AIDocksError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


def _end_with_starter() -> None:
    """Have the system kill this process when the one that started it ends, however that ends."""
    starter = os.environ.pop(STARTER, None)
    if starter is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(starter):  # it ended before the system knew
        os._exit(1)


if __name__ == "__main__":
    try:
        code = main()
    except Exception:  # noqa: BLE001 - said in the log; then the process ends, as after every other end
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of process groups and trackers would be waited for, after a failure for ever, while the other members wait
    # for this one. All that counts is on the disk.
    os._exit(code)
