"""What a merge writes, tensor by tensor: which inputs, which method, which values. Small, and JSON-able."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from aidocks.checkpoints.files import OutputFile


class StoredTensor(Protocol):
    """What is known of a tensor: a header's entry, or what a merge is going to write."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(_Frozen):
    """A model that is merged.

    Attributes:
        reference: As the request names it, for errors.
        field: Path of the request's field that names it, for errors.
    """

    reference: str
    field: str | None = None
    checkpoint: Path = Field(description="Checkpoint directory.")
    adapter: Path | None = Field(None, description="Directory of a LoRA adapter that is added to it.")


class Operand(_Frozen):
    """One input of a tensor."""

    source: int = Field(description="Position in the list of sources.")
    tensor: str = Field(description="Its name in that checkpoint.")


class TensorMerge(_Frozen):
    """How one tensor of the result is made."""

    name: str
    dtype: str = Field(description="Of the result, in safetensors' spelling.")
    shape: tuple[int, ...]
    operands: tuple[Operand, ...] = Field(min_length=1)
    base: int | None = Field(None, description="Which operand is the base.")
    method: str | None = Field(None, description="None: the first operand's values as they are.")
    values: dict[str, Any] = Field({}, description="Every parameter of the method by name.")
    vocabulary: OutputFile | None = Field(
        None, description="Which rows of the operands its rows are, where the vocabulary changes."
    )
