"""Which examples go into which step: the same ones, however many processes share a step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from train.retrieval.rows import Examples


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
        together = sum(most.take(each) for each in range(len(examples))) if apart else len(examples)
        #: Examples of one process; read by accelerate.
        self.batch_size = min(batch, together // processes)
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
        order: list[int] = torch.randperm(len(self._examples), generator=generator).tolist()
        waiting = deque(order)
        for _ in range(len(self) // self._processes):
            step = self._next(waiting, order)
            # Dealt out by length, so that the processes do not wait for each other.
            step.sort(key=lambda each: (self._examples.length(each), each))
            for process in range(self._processes):
                yield step[process :: self._processes]

    def _next(self, waiting: deque[int], order: Sequence[int]) -> list[int]:
        size = self.batch_size * self._processes
        if not self._apart:
            return [waiting.popleft() for _ in range(size)]
        step, chosen, postponed = _Step(self._examples), [], []
        while waiting and len(chosen) < size:
            each = waiting.popleft()
            (chosen if step.take(each) else postponed).append(each)
        waiting.extendleft(reversed(postponed))
        # The last steps of an epoch, when only such are left as exclude each other: some are seen again.
        for keeps_apart in (True, False):
            for each in order:
                if len(chosen) == size:
                    return chosen
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
