"""What waits for a model goes together, nobody waits for long, and everybody gets what is theirs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aidocks.errors import IncompatibleModels, ServiceUnreachable, TooBusy
from aidocks.retrieval.serving import Call, Recipe, Reply
from aidocks.training.retriever import Retriever
from serve.retrieval import waiting
from serve.retrieval.waiting import Waiting


def recipe(name: str = "m") -> Recipe:
    return Recipe(Retriever(kind="embedding", name=name, model=Path(name)))


def value_of(text: str) -> float:
    return float(sum(map(ord, text)))


class Model:
    """Computes when it is told to; remembers what it was asked."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.calls: list[Call] = []
        self.seconds = seconds
        self._gates: list[asyncio.Event] = []
        self.error: Exception | None = None
        self.most = 0
        self._now = 0

    async def compute(self, call: Call) -> Reply:
        self.calls.append(call)
        self._now += 1
        self.most = max(self.most, self._now)
        gate = asyncio.Event()
        self._gates.append(gate)
        await gate.wait()
        self._now -= 1
        if self.error:
            raise self.error
        values = np.array([[value_of(str(item)), 1.0] for item in call.items], np.float32)
        return Reply(values, [1] * len(call.items), self.seconds)

    def finish(self) -> bool:
        """Let the oldest call that is computed come to its end; False where there is none."""
        pending = [gate for gate in self._gates if not gate.is_set()]
        if pending:
            pending[0].set()
        return bool(pending)

    @property
    def sizes(self) -> list[int]:
        return [len(call.items) for call in self.calls]


async def settle() -> None:
    """Let everything happen that needs nobody's help."""
    for _ in range(20):
        await asyncio.sleep(0)


async def drain(model: Model) -> None:
    await settle()
    while model.finish():
        await settle()


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(test())

    run.__name__ = test.__name__
    run.__doc__ = test.__doc__
    return run


def ask(queue: Waiting, texts: list[str], name: str = "m") -> asyncio.Task[Any]:
    return asyncio.create_task(queue.answer(recipe(name), texts))


@in_loop
async def test_the_first_goes_alone_and_what_comes_meanwhile_together() -> None:
    model = Model()
    queue = Waiting(model.compute)
    first = ask(queue, ["first"])
    await settle()
    others = [ask(queue, [f"text {n}"]) for n in range(63)]
    await settle()
    assert model.sizes == [1]
    await drain(model)
    assert model.sizes == [1, 63]
    assert model.most == 1
    for n, task in enumerate(others):
        answered = task.result()
        assert [row.tolist() for row in answered.rows] == [[value_of(f"text {n}"), 1.0]]
        assert answered.tokens == 1
    assert first.done()


@in_loop
async def test_what_arrives_in_the_same_moment_goes_together() -> None:
    model = Model()
    queue = Waiting(model.compute)
    tasks = [ask(queue, [str(n)]) for n in range(10)]
    await drain(model)
    await asyncio.gather(*tasks)
    assert model.sizes == [10]


@in_loop
async def test_one_large_request_does_not_starve_small_ones_nor_they_it() -> None:
    model = Model()
    queue = Waiting(model.compute)
    large = ask(queue, ["x" * 400] * 1000)
    await settle()
    small = ask(queue, ["y" * 40])
    await settle()
    # One call is computed and one full call is ready; the small request is in the next.
    computed = len(model.calls)
    assert computed == 2
    model.finish()
    await settle()
    assert "y" * 40 in model.calls[2].items
    while not small.done():
        assert model.finish()
        await settle()
    assert not large.done()
    # Small ones without end: the large one has its half of each call.
    newer: list[asyncio.Task[Any]] = []
    while not large.done():
        newer += [ask(queue, ["z" * 400]) for _ in range(10)]
        await settle()
        before = len(model.calls)
        assert model.finish()
        await settle()
        shares = [[str(item)[0] for item in call.items].count("x") for call in model.calls[before:]]
        assert large.done() or all(share >= 10 for share in shares)
        assert before < 110
    assert len(large.result().rows) == 1000
    await drain(model)
    await asyncio.gather(*newer)


@in_loop
async def test_models_take_turns() -> None:
    model = Model()
    queue = Waiting(model.compute)
    tasks = [ask(queue, ["x" * 400] * 200, name) for name in ("a", "b")]
    await drain(model)
    await asyncio.gather(*tasks)
    order = [call.recipe.retriever.name for call in model.calls]
    assert set(order[:2]) == {"a", "b"}
    assert all({str(item)[0] for item in call.items} == {"x"} for call in model.calls)


@in_loop
async def test_a_model_with_full_calls_does_not_starve_one_with_little() -> None:
    model = Model()
    queue = Waiting(model.compute)
    large = ask(queue, ["x" * 400] * 1000, "a")
    await settle()
    small = ask(queue, ["y"], "b")
    await settle()
    # Two calls were under way already, and one more was the other's turn.
    for _ in range(4):
        assert model.finish()
        await settle()
    assert small.done()
    assert not large.done()
    await drain(model)
    await large


@in_loop
async def test_nobody_waits_for_ever() -> None:
    model = Model()

    async def one_too_few(call: Call) -> Reply:
        reply = await model.compute(call)
        return Reply(reply.values[1:], reply.tokens[1:], reply.seconds)

    async def cancelled(_: Call) -> Reply:
        raise asyncio.CancelledError

    for compute, error in ((one_too_few, AssertionError), (cancelled, ServiceUnreachable)):
        queue = Waiting(compute)
        tasks = [ask(queue, [str(n)]) for n in range(3)]
        await drain(model)
        for task in tasks:
            with pytest.raises(error):
                await task


@in_loop
async def test_texts_are_counted_as_they_came() -> None:
    model = Model()
    queue = Waiting(model.compute)
    # Of each no more than 512 tokens are read.
    long = ["x" * 10_000_000] * (waiting.MOST_WAITING_CHARACTERS // 10_000_000)
    first = ask(queue, long)
    await settle()
    with pytest.raises(TooBusy):
        await queue.answer(recipe(), ["one more"])
    first.cancel()
    await drain(model)
    later = ask(queue, ["later"])
    await drain(model)
    await later


@in_loop
async def test_calls_become_as_large_as_the_model_is_fast() -> None:
    for seconds, compare in ((0.001, int.__gt__), (100.0, int.__lt__)):
        model = Model(seconds)
        queue = Waiting(model.compute)
        task = ask(queue, ["x" * 400] * 1000)
        await drain(model)
        await task
        assert compare(model.sizes[-2 if len(model.sizes) > 2 else -1], model.sizes[0])


@in_loop
async def test_processes_work_beside_each_other() -> None:
    model = Model()
    queue = Waiting(model.compute, lanes=3)
    tasks = [ask(queue, ["x" * 400] * 300)]
    await drain(model)
    await asyncio.gather(*tasks)
    assert model.most == 6  # one each, and one ready beside it


@in_loop
async def test_a_failure_is_told_to_those_whom_it_concerns() -> None:
    model = Model()
    queue = Waiting(model.compute)
    model.error = IncompatibleModels("No.")
    tasks = [ask(queue, [str(n)]) for n in range(3)]
    await drain(model)
    for task in tasks:
        with pytest.raises(IncompatibleModels, match=r"No\."):
            await task
    model.error = None
    later = ask(queue, ["again"])
    await drain(model)
    assert (await later).tokens == 1


@in_loop
async def test_what_nobody_waits_for_any_more_is_not_computed() -> None:
    model = Model()
    queue = Waiting(model.compute)
    first, gone = ask(queue, ["first"]), None
    await settle()
    gone, kept = ask(queue, ["gone"]), ask(queue, ["kept"])
    await settle()
    gone.cancel()
    await drain(model)
    await asyncio.gather(first, kept)
    assert [list(call.items) for call in model.calls] == [["first"], ["kept"]]


@in_loop
async def test_too_much_is_refused_at_once_and_room_comes_back() -> None:
    model = Model()
    queue = Waiting(model.compute)
    tasks = [ask(queue, [str(n)]) for n in range(waiting.MOST_WAITING_REQUESTS)]
    await settle()
    with pytest.raises(TooBusy):
        await queue.answer(recipe(), ["one more"])
    await drain(model)
    await asyncio.gather(*tasks)
    later = ask(queue, ["later"])
    await drain(model)
    await later


@in_loop
async def test_however_large_a_request_is_an_empty_queue_takes_it() -> None:
    model = Model(0.001)
    queue = Waiting(model.compute)
    huge = ask(queue, ["x" * 100_000] * 400)
    await settle()
    await drain(model)
    assert len((await huge).rows) == 400


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.lists(st.integers(1, 3000), min_size=1, max_size=30)), max_size=12
    ),
    st.integers(1, 3),
    st.floats(1e-4, 10.0),
)
def test_everybody_gets_what_is_theirs(
    requests: list[tuple[str, list[int]]], lanes: int, seconds: float
) -> None:
    async def run() -> None:
        model = Model(seconds)
        queue = Waiting(model.compute, lanes)
        texts = [
            (name, [chr(97 + n % 26) * size for n, size in enumerate(sizes)]) for name, sizes in requests
        ]
        tasks = [ask(queue, list(given_texts), name) for name, given_texts in texts]
        await drain(model)
        for (_, given_texts), task in zip(texts, tasks, strict=True):
            answered = task.result()
            expected = [np.float32(value_of(text)) for text in given_texts]
            assert [row[0] for row in answered.rows] == expected
            assert answered.tokens == len(given_texts)
        assert sum(model.sizes) == sum(len(given_texts) for _, given_texts in texts)

    asyncio.run(run())
