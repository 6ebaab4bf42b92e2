"""Which matrices of a checkpoint can be reduced: read from its headers, addressed by their full names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from aidocks.checkpoints.header import TensorEntry
from aidocks.errors import InvalidSpec

#: Stored types whose values are numbers as they stand (8-bit and packed types need their scales).
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


class Matrix(BaseModel):
    """A two-dimensional weight of a numbered layer.

    Attributes:
        name: Full parameter name, such as ``model.layers.3.mlp.up_proj.weight``.
        layer: The first number in the name.
        kind: The name of its module: the last part before ``weight``.
        shape: Shape as stored.
        dtype: Type as stored, in safetensors' spelling.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    layer: int
    kind: str
    shape: tuple[int, int]
    dtype: str

    @property
    def full_rank(self) -> int:
        return min(self.shape)

    @property
    def cost(self) -> float:
        """Operations of a decomposition by the Gram matrix, up to a factor."""
        small, large = min(self.shape), max(self.shape)
        return float(2 * small * small * large + 5 * small**3)


def find_matrices(entries: Mapping[str, TensorEntry]) -> tuple[Matrix, ...]:
    """Return every floating-point 2-D weight that belongs to a numbered layer, by layer and then by name.

    Works for any architecture: nothing but the names and shapes of the tensors is looked at. A matrix with
    a side of one has rank one already and is left out.
    """
    found = []
    for name, entry in entries.items():
        *module, last = name.split(".")
        layer = next((int(part) for part in module if part.isdecimal()), None)
        if last != "weight" or layer is None or entry.dtype not in _FLOATS:
            continue
        if len(entry.shape) != 2 or min(entry.shape) < 2:
            continue
        rows, columns = entry.shape
        found.append(
            Matrix(name=name, layer=layer, kind=module[-1], shape=(rows, columns), dtype=entry.dtype)
        )
    return tuple(sorted(found, key=lambda matrix: (matrix.layer, matrix.name)))


def select_matrices(
    matrices: Sequence[Matrix], layers: Iterable[int] | None, kinds: Iterable[str] | None, model: str
) -> tuple[Matrix, ...]:
    """Keep the matrices of the given layers and kinds (None: all of them).

    Raises:
        InvalidSpec: For a model without matrices, a layer or kind that it does not have, or an empty
            combination.
    """
    if not matrices:
        raise InvalidSpec(
            f"The model {model!r} has no two-dimensional weights in numbered layers.",
            field="base_model_name",
            value=model,
        )
    for layer in layers or ():
        known = sorted({matrix.layer for matrix in matrices})
        if layer not in known:
            raise InvalidSpec(
                f"The model {model!r} has no matrices in layer {layer}.",
                field="layers",
                value=layer,
                hint=f"Its layers: {_ranges(known)}.",
            )
    for kind in kinds or ():
        names = sorted({matrix.kind for matrix in matrices})
        if kind not in names:
            raise InvalidSpec(
                f"The model {model!r} has no matrices of kind {kind!r}.",
                field="kinds",
                value=kind,
                hint=f"Its kinds: {', '.join(names)}.",
            )
    chosen = tuple(
        matrix
        for matrix in matrices
        if (layers is None or matrix.layer in layers) and (kinds is None or matrix.kind in kinds)
    )
    if not chosen:
        raise InvalidSpec(
            f"The layers asked for have no matrices of the kinds asked for in {model!r}.", field="kinds"
        )
    return chosen


def _ranges(numbers: Sequence[int]) -> str:
    """Write [0, 1, 2, 5] as ``0-2, 5``."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)


class Reduction(BaseModel):
    """One intervention: keep this rank of this matrix."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    rank: int
