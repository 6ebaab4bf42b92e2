"""What waits to be embedded or ranked, and calls made of it: whatever waits when a model is free goes together.

No request waits for others to come (continuous batching): the first goes alone, and while it is computed the next call
gathers. A call is made of one model's texts. The models take turns; of a model's requests the oldest may take half of
a call, and the others share what is left, a text each in turn. So one request of thousands of texts moves on with
every call, and one of a single text waits for no more than the calls under way.

How much goes into a call follows from how fast the model was before: as much as takes half a second.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from aidocks.errors import ServiceUnreachable, TooBusy
from aidocks.retrieval.serving import Call, Pair, Recipe, Reply

#: That one call shall take.
TARGET_S = 0.5
#: Of a call of a model that has not been measured, and bounds for one that has. Estimated tokens.
FIRST_TOKENS, LEAST_TOKENS, MOST_TOKENS = 2048, 256, 65_536
#: Models whose pace is remembered.
_PACES = 256
#: Fewer than these wait at any time, of all requests together.
MOST_WAITING_REQUESTS = 256
MOST_WAITING_TOKENS = 4_000_000
#: Texts are held here as they came, however few of their tokens a model reads.
MOST_WAITING_CHARACTERS = 200_000_000
#: Characters of a token, about; and tokens that are added to every text.
_CHARACTERS, _ADDED = 4, 2

log = logging.getLogger("serve.retrieval")

Compute = Callable[[Call], Awaitable[Reply]]
Item = str | Pair


@dataclass(frozen=True)
class Answered:
    """What came of a request: a row (float32 [D], or one score) for each of its items, and the tokens of all."""

    rows: list[Any]
    tokens: int


@dataclass
class _Request:
    """A request, some of whose items wait. Its items are taken in their order."""

    items: Sequence[Item]
    sizes: list[int]
    future: asyncio.Future[Answered]
    rows: list[Any] = field(init=False)
    taken: int = 0
    computed: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        self.rows = [None] * len(self.items)

    @property
    def waits(self) -> bool:
        return self.taken < len(self.items) and not self.future.done()

    def fill(self, place: int, row: Any, tokens: int) -> None:
        self.rows[place] = row
        self.tokens += tokens
        self.computed += 1
        if self.computed == len(self.items) and not self.future.done():
            self.future.set_result(Answered(self.rows, self.tokens))


class Waiting:
    """Takes requests, and has calls computed of what they hold.

    All methods are for one event loop.

    Args:
        compute: Computes one call.
        lanes: Calls that can be computed at the same time, each by a process of its own.
    """

    def __init__(self, compute: Compute, lanes: int = 1) -> None:
        self._compute = compute
        self._lanes = lanes
        self._queues: OrderedDict[Recipe, deque[_Request]] = OrderedDict()
        self._pace: OrderedDict[Recipe, float] = OrderedDict()
        self._under_way: set[asyncio.Task[None]] = set()
        self._requests = 0
        self._tokens = 0
        self._characters = 0

    async def answer(self, recipe: Recipe, items: Sequence[Item]) -> Answered:
        """Return what a model makes of texts, or of pairs.

        Raises:
            TooBusy: Too much waits already.
            AIDocksError: What kept it from being computed.
        """
        sizes = [_tokens(item, recipe.retriever.max_length) for item in items]
        size = sum(sizes)
        # Of pairs, the query is the same text in all.
        characters = sum(len(item) if isinstance(item, str) else len(item[1]) for item in items)
        # Whatever comes to an empty queue is taken, however large.
        if self._requests and (
            self._requests >= MOST_WAITING_REQUESTS
            or self._tokens + size > MOST_WAITING_TOKENS
            or self._characters + characters > MOST_WAITING_CHARACTERS
        ):
            raise TooBusy(
                f"{self._requests} requests are waiting for models that find texts.",
                hint="Send it again in a moment; more texts in one request wait less than one by one.",
            )
        request = _Request(items, sizes, asyncio.get_running_loop().create_future())
        self._queues.setdefault(recipe, deque()).append(request)
        self._requests += 1
        self._tokens += size
        self._characters += characters
        # Not at once: what else has arrived in this turn of the loop goes with it.
        asyncio.get_running_loop().call_soon(self._send)
        try:
            return await request.future
        finally:
            # Also when whoever asked has gone away: what it still had waiting is passed over.
            self._requests -= 1
            self._tokens -= size
            self._characters -= characters

    def _send(self) -> None:
        """Begin the calls for which there is a free lane."""
        while call := self._next():
            task = asyncio.create_task(self._run(*call))
            self._under_way.add(task)

    def _next(self) -> tuple[Recipe, list[tuple[_Request, int]]] | None:
        """Take the items of a call, or None while nothing waits, or all lanes are taken.

        It is of the model whose turn it is. A lane has one call after the one that is computed, which saves the way
        there and back, but not one that could rather gather more: of a model that has no other to wait for, and too
        little for a full call. Passing such a model over for another's full call would keep it waiting for as long
        as the other has any.
        """
        busy = len(self._under_way)
        for recipe in list(self._queues):
            _pass_over(self._queues[recipe])
            if not self._queues[recipe]:
                del self._queues[recipe]
        if not self._queues or busy >= 2 * self._lanes:
            return None
        recipe, queue = next(iter(self._queues.items()))
        budget = self._budget(recipe)
        if busy >= self._lanes and len(self._queues) == 1 and not _holds(queue, budget):
            return None
        self._queues.move_to_end(recipe)
        return recipe, _take(queue, budget)

    async def _run(self, recipe: Recipe, taken: list[tuple[_Request, int]]) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            reply = await self._compute(Call(recipe, [request.items[place] for request, place in taken]))
            assert len(reply.values) == len(taken), "a row of each item"
            for (request, place), row, tokens in zip(taken, reply.values, reply.tokens, strict=True):
                request.fill(place, row, tokens)
            self._learn(recipe, sum(request.sizes[place] for request, place in taken), reply.seconds)
        except Exception as error:  # noqa: BLE001 - each request has it, and its door says what it means
            _fail(taken, error)
        except asyncio.CancelledError:
            # Whoever computes has cancelled it; or this process ends.
            _fail(
                taken, ServiceUnreachable("The service is about to end.", hint="Send it again in a moment.")
            )
            if task.cancelling():
                raise
        finally:
            self._under_way.discard(task)
            if not task.cancelling():
                self._send()

    def _budget(self, recipe: Recipe) -> int:
        pace = self._pace.get(recipe)
        if pace is None:
            return FIRST_TOKENS
        return max(LEAST_TOKENS, min(MOST_TOKENS, int(TARGET_S / pace)))

    def _learn(self, recipe: Recipe, tokens: int, seconds: float) -> None:
        """Remember the seconds of a token. Small calls take longer a token, so they say little of large ones."""
        if tokens < LEAST_TOKENS or seconds <= 0:
            return
        before = self._pace.pop(recipe, seconds / tokens)
        self._pace[recipe] = (before + seconds / tokens) / 2
        if len(self._pace) > _PACES:
            self._pace.popitem(last=False)


def _fail(taken: Sequence[tuple[_Request, int]], error: Exception) -> None:
    for request in {id(request): request for request, _ in taken}.values():
        if not request.future.done():
            request.future.set_exception(error)


def _tokens(item: Item, longest: int) -> int:
    """Estimate the tokens of an item from its characters."""
    characters = len(item) if isinstance(item, str) else len(item[0]) + len(item[1])
    return min(longest, characters // _CHARACTERS + _ADDED)


def _pass_over(queue: deque[_Request]) -> None:
    """Take requests out of which nothing waits any more."""
    for _ in range(len(queue)):
        request = queue.popleft()
        if request.waits:
            queue.append(request)


def _holds(queue: deque[_Request], budget: int) -> bool:
    held = 0
    for request in queue:
        for place in range(request.taken, len(request.sizes)):
            held += request.sizes[place]
            if held >= budget:
                return True
    return False


def _take(queue: deque[_Request], budget: int) -> list[tuple[_Request, int]]:
    """Take items for a call, at least one: up to half of it of the oldest request, then of each request in turn."""
    taken: list[tuple[_Request, int]] = []

    def take(request: _Request, bound: int) -> bool:
        nonlocal budget
        size = request.sizes[request.taken]
        if taken and size > bound:
            return False
        taken.append((request, request.taken))
        request.taken += 1
        budget -= size
        return True

    oldest, least = queue[0], budget // 2
    while oldest.waits and take(oldest, budget - least):
        pass
    turns = deque([*list(queue)[1:], oldest])
    while turns:
        request = turns.popleft()
        if request.waits and take(request, budget):
            turns.append(request)
    return taken
