"""How many threads of a processor an algorithm uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


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
