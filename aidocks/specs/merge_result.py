"""The result of ``/merge``: what was merged, how, and what it was measured to be worth."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from aidocks.specs.base import ModelResult
from aidocks.specs.perplexities import ModelPerplexity


class MergePart(BaseModel):
    """Tensors of one kind, in all layers, and how they are merged."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensors: str = Field(description="Name within the layer, or the whole name outside of the layers.")
    layers: str = Field(description="Of the result, such as `0-29`; empty outside of the layers.")
    method: str = Field(description="The merge method, or `copy`.")
    inputs: int = Field(description="Tensors that take part in each of them.")
    values: str = Field(description="Parameters, first and last value where they change from layer to layer.")


class MergeStep(BaseModel):
    """One merge of the request, as it was planned. In a request of one merge there is one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="As later merges call it; of the last one the result's.")
    method: str
    models: tuple[str, ...] = Field(description="References of the models that take part, the base included.")
    layers: int
    tensors: int
    files: int = Field(description="Weight files that are written: the units of work.")
    read_bytes: int = Field(description="Bytes of weights to read, once.")
    written_bytes: int = Field(description="Bytes of weights to write.")
    memory_bytes: int = Field(description="Expected peak of a worker's memory on a CPU.")


class MergeResult(ModelResult):
    """What a ``/merge`` job returns."""

    merge_method: str
    architecture: str
    dtype: str = Field(description="Type of most of the result's weights.")
    parameters: int = Field(description="Parameters of the result.")
    bytes: int = Field(description="Bytes of its weights.")
    steps: tuple[MergeStep, ...] = Field(description="All merges of the request, in the order of execution.")
    parts: tuple[MergePart, ...] = Field((), description="How the tensors of the last one are made.")
    perplexities: tuple[ModelPerplexity, ...] = Field(
        (), description="With `evaluate`: of the base, every model, their plain average, and the result."
    )
    notes: tuple[str, ...] = Field(
        (), description="What one should know: settings without effect, and the like."
    )
    dry_run: bool = Field(False, description="Whether this is a plan only: nothing was written.")
