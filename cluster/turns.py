"""Who gets the next free worker: pure bookkeeping, without workers and without a clock.

Whoever wants workers asks for *turns*, as many as what it wants to run is worth, and gets them all at once or none:
two that each had some of what they need would wait for each other for ever. Who is first has the highest priority;
among equals, the owner who holds the fewest turns, then the job that holds the fewest, then who came first.

Whoever is first and wants more turns than are free makes all others of its priority wait, until it has them: a gang is
not starved by units that fit in between. It stays first from then on, whoever would come before it by holding less.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(eq=False)
class Request:
    """Turns that somebody asked for; a ticket for those that it got.

    Attributes:
        owner: Id of the API key.
        job: Id of the job.
        priority: Higher ones come first.
        turns: How many, at least one; never more than there are.
        granted: Called when it gets them, which may be before :meth:`Turns.ask` returns.
        held: How many it has; 0 until it got them.
    """

    owner: str
    job: str
    priority: int
    turns: int
    granted: Callable[[], None]
    held: int = 0
    number: int = 0
    gathering: bool = False


class Turns:
    """The turns of a pool.

    Args:
        total: How many there are.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._held = 0
        self._asked = 0
        self._waiting: list[Request] = []
        self._of_owner: Counter[str] = Counter()
        self._of_job: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """How many there are; with fewer than are held, nobody gets any until enough were given back."""
        return self._total

    @total.setter
    def total(self, total: int) -> None:
        self._total = total
        self._grant()

    @property
    def held(self) -> int:
        """How many are in use."""
        return self._held

    @property
    def waiting(self) -> int:
        """How many are asked for in vain."""
        return sum(request.turns for request in self._waiting)

    def ask(self, request: Request) -> None:
        """Stand in line."""
        self._asked += 1
        request.number = self._asked
        self._waiting.append(request)
        self._grant()

    def give_back(self, request: Request) -> None:
        """Return the turns of a request, or leave the line."""
        if request in self._waiting:
            self._waiting.remove(request)
        self._held -= request.held
        self._of_owner[request.owner] -= request.held
        self._of_job[request.job] -= request.held
        request.held = 0
        self._of_owner, self._of_job = +self._of_owner, +self._of_job
        self._grant()

    def _grant(self) -> None:
        while self._waiting:
            first = min(self._waiting, key=self._place)
            wanted = max(1, min(first.turns, self._total))
            if self._held + wanted > self._total:
                first.gathering = wanted > 1
                return
            self._waiting.remove(first)
            first.held = wanted
            self._held += wanted
            self._of_owner[first.owner] += wanted
            self._of_job[first.job] += wanted
            first.granted()

    def _place(self, request: Request) -> tuple[int, bool, int, int, int]:
        of_owner, of_job = self._of_owner[request.owner], self._of_job[request.job]
        return -request.priority, not request.gathering, of_owner, of_job, request.number
