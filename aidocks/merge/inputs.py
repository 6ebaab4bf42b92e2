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
from functools import cached_property, partial
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from aidocks.errors import CorruptCheckpoint, IncompatibleModels
from aidocks.merge.rows import MemoryRows, Rows, as_matrix

if TYPE_CHECKING:
    import torch

CollectedT = TypeVar("CollectedT")

#: Values of a block: on a CPU what its caches hold, on a GPU what keeps it busy.
BLOCK_VALUES = {"cpu": 1 << 18, "cuda": 1 << 26}


@dataclass(frozen=True)
class Block:
    """The same rows of all inputs of a tensor.

    Attributes:
        number: Counts the blocks of a tensor from 0.
        begin: Its first row.
        values: One [R, C] for every input, in the type to compute in.
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
        return list(self._walk(of))

    def sum(self, of: Callable[[Block], torch.Tensor]) -> torch.Tensor:
        """Return the sum over all blocks of what ``of`` makes of them: float64, of its shape, on the CPU."""
        import torch

        parts = self.collect(lambda block: of(block).to("cpu", torch.float64))
        return torch.stack(parts).sum(dim=0)

    def gram(self, of: Callable[[Block], Sequence[torch.Tensor]] | None = None) -> torch.Tensor:
        """Return the inner products of tensors with one another: float64 [N, N] on the CPU.

        Args:
            of: What of a block to multiply. Default: its ``deltas``.
        """
        import torch

        def products(block: Block) -> torch.Tensor:
            flat = [value.reshape(-1) for value in (of(block) if of else block.deltas)]
            parts = [torch.dot(one, other) for i, one in enumerate(flat) for other in flat[i:]]
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
                return block.values[0].new_zeros(block.values[0].shape)
            (first, factor), *others = used
            total = block.values[first] * factor if factor != 1 else block.values[first]
            for number, factor in others:
                total = total.add(block.values[number], alpha=factor)
            return total

        return self.map(make)

    def map(self, of: Callable[[Block], torch.Tensor]) -> Merged:
        """Return the merged tensor: block by block what ``of`` makes of the inputs. It runs in several threads."""
        return self._walk(of)

    def _walk(self, of: Callable[[Block], CollectedT]) -> Iterator[CollectedT]:
        spans = list(enumerate(self.spans))
        if self.threads <= 1 or len(spans) <= 1:
            for number, span in spans:
                yield of(self._block(number, *span))
            return
        with ThreadPoolExecutor(self.threads, "aidocks-merge") as pool:
            calls = (partial(lambda n, span: of(self._block(n, *span)), n, span) for n, span in spans)
            yield from _ahead(pool, calls, 2 * self.threads)

    def _block(self, number: int, begin: int, end: int) -> Block:
        import torch

        dtype = getattr(torch, self.dtype)
        # Copied also where the type is right: what was read is overwritten by the next block.
        values = tuple(
            rows.read(begin, end).to(self.device, dtype, copy=not isinstance(rows, MemoryRows))
            for rows in self.rows
        )
        if number not in self._checked:
            self._require_finite(values)
            self._checked.add(number)
        return Block(number, begin, values, self.base_index)

    def _require_finite(self, values: Sequence[torch.Tensor]) -> None:
        """Raise CorruptCheckpoint for an input with a value that is not finite."""
        for rows, value in zip(self.rows, values, strict=True):
            # A sum is finite where all values are, but for the rare one that overflows.
            if not bool(value.sum().isfinite()) and not bool(value.isfinite().all()):
                raise CorruptCheckpoint(
                    f"{rows.label} contains values that are not finite (NaN or infinite).",
                    value=rows.label,
                    hint="Leave that model out, or take another copy of it.",
                )


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


def require_one_shape(rows: Sequence[Rows]) -> None:
    """Raise IncompatibleModels when tensors that are to be merged differ in shape."""
    first = rows[0]
    for other in rows[1:]:
        if other.shape != first.shape:
            raise IncompatibleModels(
                f"{other.label} is {list(other.shape)}, but {first.label} is {list(first.shape)}."
            )
