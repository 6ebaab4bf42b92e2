"""What a merge method works on: the inputs of one tensor, walked through in blocks of whole rows.

A method never holds its tensors: it asks for sums over all blocks (:meth:`Inputs.collect`) as often as it needs them,
and at the end says how a block of the result is made of a block of the inputs (:meth:`Inputs.map`). So the memory that
a merge takes does not depend on the model, and blocks that fit a processor's cache are read, computed and written by
several threads at once. Sums are added up in the order of the blocks: the result does not depend on the threads.

Shapes: R rows and C columns of a block, N inputs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from itertools import combinations_with_replacement, islice
from threading import Barrier
from typing import TYPE_CHECKING, TypeVar

from aidocks.errors import CorruptCheckpoint, IncompatibleModels
from aidocks.merge.rows import Rows, as_matrix

if TYPE_CHECKING:
    import torch

CollectedT = TypeVar("CollectedT")

#: Values of a block: on a CPU what its caches hold, on a GPU what keeps it busy.
BLOCK_VALUES = {"cpu": 1 << 19, "cuda": 1 << 26}

#: Just below the size (32 MiB) from which on glibc no longer learns.
_LARGE_BYTES = 31 << 20


@dataclass(frozen=True)
class Block:
    """The same rows of all inputs of a tensor.

    Attributes:
        number: Counts the blocks of a tensor from 0.
        begin: Its first row.
        values: One [R, C] for every input, in the type to compute in. They are the method's own, to be overwritten.
        base_index: Which of them is the base's; None without one.
    """

    number: int
    begin: int
    values: tuple[torch.Tensor, ...]
    base_index: int | None

    @property
    def base(self) -> torch.Tensor:
        """The base's values."""
        assert self.base_index is not None, "the method is declared without a base"
        return self.values[self.base_index]

    @cached_property
    def models(self) -> tuple[torch.Tensor, ...]:
        """The values of all inputs but the base."""
        return tuple(value for number, value in enumerate(self.values) if number != self.base_index)

    @cached_property
    def deltas(self) -> tuple[torch.Tensor, ...]:
        """What the inputs but the base differ from it in; the inputs themselves where there is no base."""
        return self.models if self.base_index is None else tuple(model - self.base for model in self.models)


#: Blocks of a merged tensor in order, [R, C] each, in the type that was computed in.
Merged = Iterator["torch.Tensor"]


@dataclass(frozen=True)
class Inputs:
    """The inputs of one tensor.

    Attributes:
        name: Of the tensor in the result.
        rows: The inputs, all of one shape.
        base_index: Which of them is the base; None without one.
        dtype: To compute in: ``float32`` or ``float64``.
        device: To compute on.
        threads: That walk through the blocks.
        seed: Of methods that draw random numbers; see :mod:`aidocks.merge.random`.
        block_values: Values of a block, about.
    """

    name: str
    rows: tuple[Rows, ...]
    base_index: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    seed: int = 0
    block_values: int = 0
    _checked: set[int] = field(default_factory=set, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows[0].shape

    @property
    def num_values(self) -> int:
        height, width = as_matrix(self.shape)
        return height * width

    @property
    def num_models(self) -> int:
        """The number of inputs, the base not counted."""
        return len(self.rows) - (self.base_index is not None)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First row of every block, and the first one after it."""
        height, width = as_matrix(self.shape)
        wanted = self.block_values or BLOCK_VALUES[self.device.partition(":")[0]]
        step = max(1, wanted // max(1, width))
        return [(begin, min(begin + step, height)) for begin in range(0, height, step)]

    def collect(self, of: Callable[[Block], CollectedT]) -> list[CollectedT]:
        """Return what ``of`` makes of each block, in order. It runs in several threads."""
        return list(self.walk(of))

    def sum(self, of: Callable[[Block], torch.Tensor]) -> torch.Tensor:
        """Return the sum over all blocks of what ``of`` makes of them, of its shape, on the CPU.

        It is float64, of integers int64. No more than a few blocks' parts are held at once.
        """
        import torch

        def part(block: Block) -> torch.Tensor:
            made = of(block)
            return made.to("cpu", torch.float64 if made.is_floating_point() else torch.int64)

        total: torch.Tensor | None = None
        for found in self.walk(part):
            total = found if total is None else total.add_(found)
        # A tensor without values has no blocks; what is made of one without rows has the shape.
        return part(self._block(0, 0, 0)) if total is None else total

    def gram(self, of: Callable[[Block], Sequence[torch.Tensor]] | None = None) -> torch.Tensor:
        """Return the inner products of tensors with one another: float64 [N, N] on the CPU.

        Args:
            of: What of a block to multiply. Default: its ``deltas``.
        """
        import torch

        def products(block: Block) -> torch.Tensor:
            values = [value.reshape(-1) for value in (of(block) if of else block.deltas)]
            # Not torch.dot: that adds up a whole block in one go, and errs by 1e-6 where this errs by 1e-8.
            parts = [(one * other).sum() for one, other in combinations_with_replacement(values, 2)]
            return torch.stack(parts)

        upper = self.sum(products)
        size = int(((8 * len(upper) + 1) ** 0.5 - 1) / 2)
        found = torch.zeros(size, size, dtype=torch.float64)
        found[tuple(torch.triu_indices(size, size))] = upper
        return found + found.triu(1).mT

    def combine(self, coefficients: Sequence[float]) -> Merged:
        """Return the sum of all inputs, each times its coefficient; one with the coefficient 0 is left out."""
        used = [(number, factor) for number, factor in enumerate(coefficients) if factor != 0]

        def make(block: Block) -> torch.Tensor:
            if not used:
                return block.values[0].zero_()
            (first, factor), *others = used
            # What is multiplied by 1 is left alone: the same bits.
            total = block.values[first].mul_(factor) if factor != 1 else block.values[first]
            for number, factor in others:
                total.add_(block.values[number], alpha=factor)
            return total

        return self.map(make)

    def combine_deltas(self, coefficients: Sequence[float]) -> Merged:
        """Return the base and the sum of all deltas, each times its coefficient; without a base, the models' sum."""
        all_coefficients = list(coefficients)
        if self.base_index is not None:
            all_coefficients.insert(self.base_index, 1 - sum(coefficients))
        return self.combine(all_coefficients)

    def map(self, of: Callable[[Block], torch.Tensor]) -> Merged:
        """Return the merged tensor: block by block what ``of`` makes of the inputs. It runs in several threads."""
        return self.walk(of)

    def walk(self, of: Callable[[Block], CollectedT]) -> Iterator[CollectedT]:
        """Yield what ``of`` makes of each block, in order, a few blocks ahead. It runs in several threads."""
        from aidocks.threads import one_thread

        _keep_freed_memory()
        spans = list(enumerate(self.spans))
        if self.threads <= 1 or len(spans) <= 1:
            for number, span in spans:
                with one_thread(self.device):
                    made = of(self._block(number, *span))
                yield made
            return
        calls = (partial(lambda n, span: of(self._block(n, *span)), n, span) for n, span in spans)
        yield from _ahead(_walkers(self.threads), calls, 2 * self.threads)

    def _block(self, number: int, begin: int, end: int) -> Block:
        import torch

        dtype = getattr(torch, self.dtype)
        # Copied also where the type is right: what was read is the reader's, what is handed on the method's.
        values = tuple(rows.read(begin, end).to(self.device, dtype, copy=True) for rows in self.rows)
        if number not in self._checked:
            self._require_finite(values)
            self._checked.add(number)
        return Block(number, begin, values, self.base_index)

    def _require_finite(self, values: Sequence[torch.Tensor]) -> None:
        """Raise CorruptCheckpoint for an input with a value that is not finite."""
        for rows, value in zip(self.rows, values, strict=True):
            require_finite(rows.label, value)


@cache
def _keep_freed_memory() -> None:
    """Let the allocator keep what blocks free for the next ones.

    glibc gives memory back to the kernel from a size on that follows the largest piece freed so far, and new pages
    cost more than to compute what goes there. So a large piece, never touched, is freed first.
    """
    import torch

    torch.empty(_LARGE_BYTES, dtype=torch.uint8)


@cache
def _walkers(threads: int) -> ThreadPoolExecutor:
    """Return so many threads of this process that walk, each of which computes alone.

    They are kept: what a tensor's rows keep for each thread is made once, and small tensors do not wait for threads.
    """
    import torch

    pool = ThreadPoolExecutor(threads, "aidocks-merge")
    before = torch.get_num_threads()
    all_here = Barrier(threads)

    def begin() -> None:
        torch.set_num_threads(1)
        all_here.wait()

    for begun in [pool.submit(begin) for _ in range(threads)]:
        begun.result()
    # That was each thread's own number, and the one of all threads to come.
    torch.set_num_threads(before)
    return pool


def _ahead(
    pool: ThreadPoolExecutor, calls: Iterable[Callable[[], CollectedT]], depth: int
) -> Iterator[CollectedT]:
    """Yield the results of calls in order, with so many of them under way."""
    waiting = iter(calls)
    under_way: deque[Future[CollectedT]] = deque(pool.submit(call) for call in islice(waiting, depth))
    try:
        while under_way:
            result = under_way.popleft().result()
            under_way.extend(pool.submit(call) for call in islice(waiting, 1))
            yield result
    finally:
        for future in under_way:
            future.cancel()


def require_finite(label: str, values: torch.Tensor) -> None:
    """Raise CorruptCheckpoint when values, of any floating-point type, are not all finite.

    Args:
        label: Model and tensor.
        values: Of them.
    """
    import torch

    # A sum is finite where all values are, but for the rare one that overflows.
    total = values.sum(dtype=torch.promote_types(values.dtype, torch.float32))
    if not bool(total.isfinite()) and not bool(values.isfinite().all()):
        raise CorruptCheckpoint(
            f"{label} contains values that are not finite (NaN or infinite).",
            value=label,
            hint="Leave that model out, or take another copy of it.",
        )


def finite_blocks(rows: Rows) -> Merged:
    """Yield a tensor of a floating-point type as it is stored, in blocks of rows, each checked.

    A block may be overwritten by the next one.

    Raises:
        CorruptCheckpoint: For a value that is not finite.
    """
    for begin, end in Inputs(rows.label, (rows,)).spans:
        values = rows.read(begin, end)
        require_finite(rows.label, values)
        yield values


def require_one_shape(rows: Sequence[Rows]) -> None:
    """Raise IncompatibleModels when tensors that are to be merged differ in shape."""
    first = rows[0]
    for other in rows[1:]:
        if other.shape != first.shape:
            raise IncompatibleModels(
                f"{other.label} is {list(other.shape)}, but {first.label} is {list(first.shape)}."
            )
