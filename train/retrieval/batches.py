"""Which examples go into which step: the same ones, however many processes share a step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice

import torch
from torch.utils.data import Sampler

from train.retrieval.rows import Examples

#: Examples that are looked at for one of a step, at most: of many that exclude each other, all of them at every step
#: would take a time that grows with the square of their number.
_LOOKED_AT = 20


class Batches(Sampler[list[int]]):
    """Yields the batches of all processes in turn: of every step, one each.

    The examples of a step depend on the seed, the epoch and the size of all its batches together. So two processes
    with batches of 16 see in every step what one process with batches of 32 sees. What does not fill a step waits for
    another epoch; where all examples do not fill one, the batches are smaller.

    Args:
        examples: To choose from.
        batch: Examples of one process.
        processes: How many there are.
        seed: Of the order.
        apart: Whether what answers the query of one example must not be in another one of the same step, where the
            loss would take it for a wrong answer.
        shuffled: Whether every epoch has an order of its own.
    """

    def __init__(
        self,
        examples: Examples,
        batch: int,
        processes: int,
        seed: int,
        *,
        apart: bool,
        shuffled: bool = True,
    ) -> None:
        self._examples = examples
        self._processes = processes
        self._seed = seed
        self._epoch = 0
        self._shuffled = shuffled
        self._apart = apart
        most = _Step(examples)
        taken = (each for each in range(len(examples)) if not apart or most.take(each))
        together = sum(1 for _ in islice(taken, batch * processes))
        #: Examples of one process; read by accelerate.
        self.batch_size = together // processes
        self.drop_last = True

    def __len__(self) -> int:
        step = self.batch_size * self._processes
        return len(self._examples) // step * self._processes if step else 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of another epoch."""
        if self._shuffled:
            self._epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        if not len(self):
            return
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        waiting: deque[int] = deque(torch.randperm(len(self._examples), generator=generator).tolist())
        again = waiting.copy()
        for _ in range(len(self) // self._processes):
            step = self._next(waiting, again)
            # Dealt out by length, so that the processes do not wait for each other.
            step.sort(key=lambda each: (self._examples.length(each), each))
            for process in range(self._processes):
                yield step[process :: self._processes]

    def _next(self, waiting: deque[int], again: deque[int]) -> list[int]:
        """Return the examples of the next step.

        Args:
            waiting: Those that this epoch has not seen, in their order; what is taken is taken out.
            again: All of them, those first that have stood in for others least lately.
        """
        size = self.batch_size * self._processes
        if not self._apart:
            return [waiting.popleft() for _ in range(size)]
        step, chosen, postponed = _Step(self._examples), list[int](), list[int]()
        while waiting and len(chosen) < size and len(postponed) < _LOOKED_AT * size:
            each = waiting.popleft()
            (chosen if step.take(each) else postponed).append(each)
        if len(chosen) == size:
            waiting.extendleft(reversed(postponed))
            return chosen
        # Only such are left as exclude each other, or there are many of them: some others are seen again.
        waiting.extend(postponed)
        for keeps_apart in (True, False):
            for _ in range(min(len(again), _LOOKED_AT * size)):
                if len(chosen) == size:
                    return chosen
                each = again[0]
                again.rotate(-1)
                if each not in chosen and (step.take(each) or not keeps_apart):
                    chosen.append(each)
        return chosen


class _Step:
    """Examples that may stand in one step: no passage of one answers the query of another."""

    def __init__(self, examples: Examples) -> None:
        self._examples = examples
        self._queries: set[int] = set()
        self._passages: set[int] = set()
        self._answers: set[int] = set()

    def take(self, index: int) -> bool:
        """Take an example if it fits; return whether it does."""
        example = self._examples.examples[index]
        answers = self._examples.answers.get(example.query, frozenset())
        if (
            example.query in self._queries
            or not self._answers.isdisjoint(example.passages)
            or not self._passages.isdisjoint(answers)
        ):
            return False
        self._queries.add(example.query)
        self._passages.update(example.passages)
        self._answers |= answers
        return True
