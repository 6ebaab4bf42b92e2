"""How many threads of a processor an algorithm uses, and who goes before it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

#: By how much those who compute go after those who answer requests and mind the jobs.
NICENESS = 10


def give_way() -> None:
    """Let this thread, and those that it starts, compute when nobody else wants the processor.

    Who answers requests waits most of the time, and must not wait for a turn besides.
    """
    os.nice(NICENESS)


@contextmanager
def one_thread(device: str) -> Iterator[None]:
    """Compute with one thread of the CPU meanwhile, whatever this process may use; on a GPU nothing changes.

    A sum that threads share is rounded otherwise with each number of them. So whoever decomposes gets the same bits,
    on a worker of however many threads. What is lost in time is won by units that run beside each other.
    """
    import torch

    before = torch.get_num_threads()
    if torch.device(device).type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
