"""Embeddings whose rows move: what a model's rows are once every token has its number in the result."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from aidocks.checkpoints.files import OutputFile
from aidocks.checkpoints.header import read_header
from aidocks.errors import IncompatibleModels
from aidocks.merge.rows import Rows, as_matrix
from aidocks.merge.token_rows import AUTOMATIC, ZERO

if TYPE_CHECKING:
    import numpy as np
    import torch

    Numbers = np.ndarray[Any, np.dtype[np.int64]]

#: Origin of a row: that of an operand, or one of these.
_ZERO, _MEAN, _PADDING = -2, -3, -4
#: Rows between two that are wanted are read too when they are so few: cheaper than another call.
_GAP = 8
#: Rows that are added up at a time to find their mean.
_BLOCK_ROWS = 1024


def mapped_rows(
    rows: Sequence[Rows], mapping: OutputFile, sources: Sequence[int] | None = None
) -> tuple[Rows, ...]:
    """Return the operands of a tensor with one row a token, with the rows of the result's vocabulary instead.

    All have the result's shape then. Blocks are at least float32; single rows keep their values, means are computed.

    Args:
        rows: The operands: [tokens, ...] or, of a bias, [tokens].
        mapping: What :class:`~aidocks.merge.vocabulary.WriteVocabulary` wrote.
        sources: Positions of the operands in the merge's sources. Default: all of them, in order.

    Raises:
        IncompatibleModels: A token's row is to come from a model that has no such tensor.
    """
    stored = _Mapping.read(mapping)
    places = list(range(len(rows)) if sources is None else sources)
    matrices = tuple(_as_rows(one) for one in rows)
    origins = _origins(stored, places, rows)
    mapped = (
        MappedRows(
            one.label, (stored.size, *one.shape[1:]), matrices, place, *origins[place], stored.rows[places]
        )
        for place, one in enumerate(rows)
    )
    return tuple(mapped)


@dataclass(frozen=True)
class _Mapping:
    """The file, see :func:`aidocks.merge.token_rows.row_arrays`."""

    size: int
    base: int
    rows: Numbers
    is_token: Numbers
    source: Numbers
    source_row: Numbers
    force: Numbers

    @classmethod
    def read(cls, file: OutputFile) -> _Mapping:
        import numpy as np

        entries, _ = read_header(file.path)
        arrays = {
            name: np.fromfile(file.path, "<i4", entry.numel, offset=entry.begin)
            .reshape(entry.shape)
            .astype(np.int64)
            for name, entry in entries.items()
        }
        size, base = (int(value) for value in arrays.pop("facts"))
        return cls(size, base, **arrays)


def _origins(stored: _Mapping, places: list[int], rows: Sequence[Rows]) -> list[tuple[Numbers, Numbers]]:
    """Return for every operand where each row of the result comes from: origin, and its number there."""
    import numpy as np

    own = stored.rows[places]
    has = own >= 0
    count = has.sum(axis=0)
    donor = np.full(len(count), _MEAN)
    # The base's row, else that of the only one that has it, else the mean.
    if stored.base != AUTOMATIC and stored.base in places:
        base = places.index(stored.base)
        donor[has[base]] = base
    donor[count == 1] = has.argmax(axis=0)[count == 1]
    donor[count == 0] = _ZERO
    donor_row = np.where(donor >= 0, own[np.maximum(donor, 0), np.arange(len(donor))], 0)
    donor[stored.source == ZERO] = _ZERO
    for source in np.unique(stored.source[stored.source >= 0]):
        chosen = stored.source == source
        needed = chosen & ((count < len(places)) | (stored.force == 1))
        if source in places:
            donor[chosen] = places.index(source)
            donor_row[chosen] = stored.source_row[chosen]
        elif needed.any():
            raise IncompatibleModels(
                f"Row {int(needed.argmax())} of {rows[0].label} is to come from a model that has no such tensor.",
                hint="Name another model as the `source` of that token.",
            )
    found = []
    for place in range(len(places)):
        stays = has[place] & (stored.force == 0)
        origin, row = np.where(stays, place, donor), np.where(stays, own[place], donor_row)
        origin[stored.is_token == 0] = _PADDING
        padding = np.full(stored.size - len(origin), _PADDING)
        found.append((np.concatenate([origin, padding]), np.concatenate([row, padding])))
    return found


@dataclass(frozen=True)
class MappedRows:
    """One operand with the rows of the result's vocabulary.

    Attributes:
        operands: All of them as [tokens, columns].
        place: Which of them this is.
        origin: Of every row: an operand, or that it is zero, a mean of operands, or the mean of all rows.
        row: Its number there.
        own: Every operand's row of each token, -1 without one [operands, tokens].
    """

    label: str
    shape: tuple[int, ...]
    operands: tuple[Rows, ...]
    place: int
    origin: Numbers
    row: Numbers
    own: Numbers
    _padding: list[torch.Tensor] = field(default_factory=list, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def read(self, begin: int, end: int) -> torch.Tensor:
        """Return rows of the result: [end - begin, columns], float32 or wider."""
        if len(self.shape) == 1:  # one row, which holds all tokens
            return self._read(0, self.shape[0]).reshape(1, -1)[begin:end]
        return self._read(begin, end)

    def _read(self, begin: int, end: int) -> torch.Tensor:
        import numpy as np
        import torch

        origin, row = self.origin[begin:end], self.row[begin:end]
        pieces: list[tuple[Numbers, torch.Tensor]] = []
        for place in np.unique(origin):
            where = np.flatnonzero(origin == place)
            if place >= 0:
                pieces.append((where, _gather(self.operands[place], row[where])))
            elif place == _MEAN:
                pieces.append((where, self._means(begin + where)))
            elif place == _PADDING:
                pieces.append((where, self._mean_of_all().expand(len(where), -1)))
        dtype = torch.float32
        for _, values in pieces:
            dtype = torch.promote_types(dtype, values.dtype)
        made = torch.zeros(end - begin, as_matrix(self.operands[self.place].shape)[1], dtype=dtype)
        for where, values in pieces:
            made[torch.from_numpy(where)] = values.to(dtype)
        return made

    def _means(self, tokens: Numbers) -> torch.Tensor:
        """Return for every token the mean of the rows of those that have it, added up in their order."""
        import numpy as np
        import torch

        total: torch.Tensor | None = None
        for operand, own in zip(self.operands, self.own[:, tokens], strict=True):
            there = np.flatnonzero(own >= 0)
            if len(there) == 0:
                continue
            values = _gather(operand, own[there])
            values = values.to(torch.promote_types(torch.float32, values.dtype))
            if total is None:
                total = values.new_zeros(len(tokens), values.shape[1])
            total[torch.from_numpy(there)] += values
        assert total is not None, "a mean is of two at least"
        return total / torch.from_numpy((self.own[:, tokens] >= 0).sum(axis=0))[:, None].to(total.dtype)

    def _mean_of_all(self) -> torch.Tensor:
        """Return the mean of all rows with tokens, added up in float64; computed once."""
        import numpy as np
        import torch

        with self._lock:
            if not self._padding:
                tokens = np.flatnonzero(self.origin != _PADDING)
                total = torch.zeros(as_matrix(self.operands[self.place].shape)[1], dtype=torch.float64)
                for begin in range(0, len(self.origin), _BLOCK_ROWS):
                    end = min(begin + _BLOCK_ROWS, len(self.origin))
                    here = np.flatnonzero(self.origin[begin:end] != _PADDING)
                    if len(here):
                        # Numbers without a token would ask for what is being computed.
                        total += self._without_padding(begin + here).double().sum(0)
                self._padding.append((total / len(tokens)).float())
            return self._padding[0]

    def _without_padding(self, tokens: Numbers) -> torch.Tensor:
        bare = MappedRows(
            self.label,
            (len(tokens), *self.shape[1:]),
            self.operands,
            self.place,
            self.origin[tokens],
            self.row[tokens],
            self.own[:, tokens],
        )
        return bare._read(0, len(tokens))


def _gather(rows: Rows, wanted: Numbers) -> torch.Tensor:
    """Return single rows, [len(wanted), columns] as stored, by reading runs of those that lie close together."""
    import numpy as np
    import torch

    distinct, where = np.unique(wanted, return_inverse=True)
    breaks = np.flatnonzero(np.diff(distinct) > _GAP) + 1
    pieces = []
    for run in np.split(distinct, breaks):
        first = int(run[0])
        read = rows.read(first, int(run[-1]) + 1)
        pieces.append(read[torch.from_numpy(run - first)])
    return torch.cat(pieces)[torch.from_numpy(where)]


@dataclass(frozen=True)
class _Column:
    """A vector as rows of one value."""

    vector: Rows

    @property
    def label(self) -> str:
        return self.vector.label

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.vector.shape[0], 1)

    def read(self, begin: int, end: int) -> torch.Tensor:
        return self._values[begin:end, None]

    @cached_property
    def _values(self) -> torch.Tensor:
        # Read once, and copied: what was read is overwritten by the next.
        return self.vector.read(0, 1)[0].clone()


def _as_rows(rows: Rows) -> Rows:
    return _Column(rows) if len(rows.shape) == 1 else rows
