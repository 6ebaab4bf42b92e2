"""How a tensor of the result is made of tensors of the sources: which rows, scaled, with noise, joined."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from aidocks.checkpoints.dtypes import torch_name
from aidocks.checkpoints.header import TensorEntry
from aidocks.checkpoints.writer import TensorPlan
from aidocks.errors import CorruptCheckpoint, IncompatibleModels

if TYPE_CHECKING:
    import torch

    from aidocks.checkpoints.reader import Checkpoint


class Piece(BaseModel):
    """Rows of one stored tensor; they enter the result as (rows + noise) * scale."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: int = Field(description="Position in the list of checkpoints.")
    tensor: str
    rows: tuple[int, int] | None = Field(None, description="Half-open; None for all.")
    scale: float = 1.0
    noise: float = Field(0.0, description="Standard deviation of Gaussian noise.")

    def find(self, checkpoint: Checkpoint) -> TensorEntry:
        """Return where these rows lie: an entry of their shape and byte range.

        Raises:
            CorruptCheckpoint: When the checkpoint has changed since the plan was made of it.
        """
        entry = checkpoint.entries.get(self.tensor)
        if entry is None or (self.rows and (not entry.shape or entry.shape[0] < self.rows[1])):
            raise CorruptCheckpoint(
                f"The tensor {self.tensor} of {checkpoint.path.name} is not what it was when the job began.",
                hint="Something changed the model while it was being read; restore it and try again.",
            )
        if self.rows is None:
            return entry
        first, last = self.rows
        row_bytes = entry.nbytes // entry.shape[0]
        return replace(
            entry,
            shape=(last - first, *entry.shape[1:]),
            begin=entry.begin + first * row_bytes,
            end=entry.begin + last * row_bytes,
        )


class Recipe(BaseModel):
    """One tensor: pieces, joined along an axis. Without pieces it is zero."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pieces: tuple[Piece, ...] = ()
    axis: int = 0

    @property
    def copies(self) -> bool:
        """Whether the result's bytes are the pieces' bytes, one after another, where the types agree."""
        is_plain = all(piece.scale == 1 and piece.noise == 0 for piece in self.pieces)
        return is_plain and (self.axis == 0 or len(self.pieces) == 1)

    @property
    def is_noisy(self) -> bool:
        return any(piece.noise for piece in self.pieces)


def compute(tensor: TensorPlan, recipe: Recipe, stored: Sequence[TensorEntry], seed: int) -> torch.Tensor:
    """Return what a recipe makes, on the CPU.

    The noise depends on the seed, the tensor's name and the piece's position in it, on nothing else: not on
    which worker draws it, nor when, nor on how the result is divided over files.

    Args:
        tensor: Name, type and shape of the result.
        recipe: With at least one piece.
        stored: Where its pieces lie.
        seed: Of the noise.

    Raises:
        IncompatibleModels: When a finite value has none in the result's type.
        CorruptCheckpoint: When a file ends too early.
    """
    import torch

    from aidocks.checkpoints.dtypes import to_torch

    parts = []
    for number, (piece, entry) in enumerate(zip(recipe.pieces, stored, strict=True)):
        part = exact = _load(entry)
        if piece.scale != 1 or piece.noise:
            part = exact.to(torch.promote_types(exact.dtype, torch.float32))
        if piece.noise:
            part = part + piece.noise * _noise(f"{seed}/{tensor.name}/{number}", entry.shape)
        if piece.scale != 1:
            part = part * piece.scale
        cast = part.to(to_torch(tensor.dtype))
        if not bool(cast.isfinite().all()) and bool(exact.isfinite().all()):
            dtype = torch_name(tensor.dtype)
            raise IncompatibleModels(
                f"The tensor {entry.name} of {entry.file.parent.name} has values that are too large for {dtype}.",
                field="dtype",
                value=dtype,
                hint="Use bfloat16 or float32.",
            )
        parts.append(cast)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=recipe.axis)


def _noise(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    import numpy as np
    import torch

    # Of numpy, not torch: torch draws other numbers where a processor has other vector instructions.
    words = np.frombuffer(hashlib.sha256(key.encode()).digest()[:16], dtype="<u8")
    generator = np.random.Generator(np.random.Philox(key=words))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


def _load(entry: TensorEntry) -> torch.Tensor:
    """Return stored values in memory of their own, so that no more than one tensor is ever held."""
    import torch

    from aidocks.checkpoints.dtypes import to_torch

    if entry.nbytes == 0:
        return torch.empty(entry.shape, dtype=to_torch(entry.dtype))
    buffer = bytearray(entry.nbytes)
    rest = memoryview(buffer)
    with entry.file.open("rb", buffering=0) as stream:
        stream.seek(entry.begin)
        while rest:
            count = stream.readinto(rest)
            if not count:
                raise CorruptCheckpoint(
                    f"{entry.file.name} has become shorter since it was opened; {entry.name} is cut off.",
                    hint="Something changed the file while it was being read; restore it and try again.",
                )
            rest = rest[count:]
    return torch.frombuffer(buffer, dtype=to_torch(entry.dtype)).reshape(entry.shape)
