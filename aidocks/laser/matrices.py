"""Which matrices a checkpoint holds: read from its headers, addressed by their full names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from aidocks.checkpoints.header import TensorEntry
from aidocks.errors import InvalidSpec
from aidocks.evaluate.comparison import ranges

if TYPE_CHECKING:
    import torch

    from aidocks.checkpoints.reader import Checkpoint

#: Stored types whose values are numbers as they stand (8-bit and packed types need their scales).
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
#: What a matrix of a linear map is called: in torch's modules, and where a module holds several (recurrent ones).
_WEIGHT = re.compile(r"weight|.+_weight|weight_[ih]h_l\d+\w*")
#: In the path of a tensor [E, ., .]: the matrices of E experts, one after another.
_FUSED = re.compile(r"experts|moe")
#: See :attr:`Matrix.address`.
_SLICE = re.compile(r"(?P<name>.+)\[(?P<expert>\d+)\]")


class Matrix(BaseModel):
    """A two-dimensional weight, or that of one expert in a tensor that holds those of all.

    Attributes:
        name: Full parameter name, such as ``model.layers.3.mlp.up_proj.weight``.
        layer: The first number in the name; None for what belongs to no numbered layer (embeddings, heads).
        kind: The name of its module, the last part before ``weight``; of a parameter that is not called
            ``weight``, its own name.
        shape: Shape as stored; of a fused tensor [E, ., .], that of one expert.
        dtype: Type as stored, in safetensors' spelling.
        expert: Which slice of a fused tensor; None for a tensor that is a matrix.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    layer: int | None
    kind: str
    shape: tuple[int, int]
    dtype: str
    expert: int | None = None

    @property
    def address(self) -> str:
        """The name, with the number of the expert in brackets where the tensor holds several.

        :func:`parse_address` reads it.
        """
        return self.name if self.expert is None else f"{self.name}[{self.expert}]"

    @property
    def full_rank(self) -> int:
        return min(self.shape)

    @property
    def cost(self) -> float:
        """Operations of a decomposition by the Gram matrix, up to a factor."""
        small, large = min(self.shape), max(self.shape)
        return float(2 * small * small * large + 5 * small**3)

    @property
    def order(self) -> tuple[float, str, int]:
        """Sorts by layer (what has none last), then by name, then by expert."""
        layer = float("inf") if self.layer is None else float(self.layer)
        return layer, self.name, -1 if self.expert is None else self.expert


def parse_address(address: str) -> tuple[str, int | None]:
    """Return the name of the tensor and the number of the expert (None: all of the tensor) of an address."""
    match = _SLICE.fullmatch(address)
    return (match["name"], int(match["expert"])) if match else (address, None)


def find_matrices(entries: Mapping[str, TensorEntry], *, all_weights: bool = False) -> tuple[Matrix, ...]:
    """Return every floating-point 2-D weight, by layer and then by name.

    Works for any architecture: nothing but the names and shapes of the tensors is looked at. A tensor [E, ., .] of
    experts counts as E matrices. A matrix with a side of one has rank one already and is left out.

    Args:
        entries: Tensors by name, as a checkpoint's headers tell.
        all_weights: Also those that belong to no numbered layer (embeddings, heads), and those whose name is not
            just ``weight``.
    """
    found = [matrix for name, entry in entries.items() for matrix in _matrices_of(name, entry)]
    if not all_weights:
        found = [m for m in found if m.layer is not None and (m.expert is not None or _is_weight(m.name))]
    return tuple(sorted(found, key=lambda matrix: matrix.order))


def _is_weight(name: str) -> bool:
    return name.endswith(".weight")


def _matrices_of(name: str, entry: TensorEntry) -> Iterator[Matrix]:
    *module, last = name.split(".")
    if entry.dtype not in _FLOATS or len(entry.shape) not in (2, 3) or min(entry.shape[-2:]) < 2:
        return
    fused = len(entry.shape) == 3
    if not (any(_FUSED.search(part) for part in module) if fused else _WEIGHT.fullmatch(last)):
        return
    layer = next((int(part) for part in module if part.isdecimal()), None)
    kind = module[-1] if last == "weight" and module else last
    rows, columns = entry.shape[-2:]
    for expert in range(entry.shape[0]) if fused else (None,):
        yield Matrix(
            name=name, layer=layer, kind=kind, shape=(rows, columns), dtype=entry.dtype, expert=expert
        )


def stored_matrix(checkpoint: Checkpoint, matrix: Matrix) -> torch.Tensor:
    """Return a matrix as it is stored, on the CPU; it shares memory with the checkpoint's file.

    Raises:
        NotFound: When there is no tensor of that name.
    """
    tensor = checkpoint.tensor(matrix.name)
    return tensor if matrix.expert is None else tensor[matrix.expert]


def select_matrices(
    matrices: Sequence[Matrix],
    layers: Collection[int] | None,
    kinds: Collection[str] | None,
    model: str,
    *,
    field: str = "base_model_name",
) -> tuple[Matrix, ...]:
    """Keep the matrices of the given layers and kinds (None: all of them).

    Args:
        matrices: Of the model.
        layers: Numbers of layers. What belongs to no layer is left out when there are any.
        kinds: Kinds of matrices.
        model: The model as the request names it.
        field: The field of the request that names it.

    Raises:
        InvalidSpec: For a model without matrices, a layer or kind that it does not have, or an empty
            combination.
    """
    if not matrices:
        raise InvalidSpec(
            f"The model {model!r} has no two-dimensional weights of a floating-point type"
            f"{' in numbered layers' if field == 'base_model_name' else ''}.",
            field=field,
            value=model,
        )
    _require_known(matrices, layers or (), kinds or (), model)
    wanted_layers, wanted_kinds = (None if wanted is None else set(wanted) for wanted in (layers, kinds))
    chosen = tuple(
        matrix
        for matrix in matrices
        if (wanted_layers is None or matrix.layer in wanted_layers)
        and (wanted_kinds is None or matrix.kind in wanted_kinds)
    )
    if not chosen:
        assert layers is not None, "every kind asked for is there in some layer"
        there = sorted({matrix.kind for matrix in matrices if matrix.layer in layers})
        raise InvalidSpec(
            f"The layers asked for have no matrices of the kinds asked for in {model!r}.",
            field="kinds",
            value=", ".join(kinds or ()),
            hint=f"Kinds in layers {ranges(layers)}: {', '.join(there)}.",
        )
    return chosen


def _require_known(
    matrices: Sequence[Matrix], layers: Collection[int], kinds: Collection[str], model: str
) -> None:
    """Refuse layers and kinds that a model does not have."""
    for layer in layers:
        known = sorted({matrix.layer for matrix in matrices if matrix.layer is not None})
        if layer not in known:
            raise InvalidSpec(
                f"The model {model!r} has no matrices in layer {layer}.",
                field="layers",
                value=layer,
                hint=f"Its layers: {ranges(known)}." if known else "None of its weights belongs to a layer.",
            )
    for kind in kinds:
        names = sorted({matrix.kind for matrix in matrices})
        if kind not in names:
            raise InvalidSpec(
                f"The model {model!r} has no matrices of kind {kind!r}.",
                field="kinds",
                value=kind,
                hint=f"Its kinds: {', '.join(names)}.",
            )


class Reduction(BaseModel):
    """One intervention: keep so many directions of one matrix.

    Attributes:
        address: Of the matrix, see :attr:`Matrix.address`.
        rank: Directions to keep.
        basis: File of the directions, as ``truncation.save_basis`` writes it.
        sha256: Of that file.
        truncation: Which directions they are: of the weight alone, or of what it makes of its inputs.
        shrink: Whether the kept values are shrunk as is optimal for noise (otherwise they are kept as they are).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str
    rank: int = Field(ge=0)
    basis: Path
    sha256: str
    truncation: Literal["weight", "activation_aware"] = "weight"
    shrink: bool = False
