"""The request and the result of ``/laser/scan``: the spectrum of every weight matrix of a model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from aidocks.specs.base import ModelRef, OperationResult
from aidocks.specs.laser import Layers, Listed
from aidocks.specs.resources import ComputingSpec

#: What a list is ordered by: the corrected signal-to-noise ratio, or the original one over the spectral norm.
Score = Literal["noise_ratio", "original"]

Shares = Listed[Annotated[float, Field(gt=0, le=1)]]

EXAMPLE: dict[str, Any] = {"model": "smollm2-135m-instruct", "top_fractions": [0.25]}


class LaserScanSpec(ComputingSpec):
    """Compute the spectrum of every weight matrix: noise, signal, and the rank that each rule would keep.

    Works for any architecture and any size: one tensor is read at a time, and no model is loaded. The result also lists
    the matrices of the highest signal-to-noise ratio, for training that leaves all others frozen (Spectrum).
    """

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    model: ModelRef = Field(
        description="Model to scan: a registry name, a hub model `org/name[@revision]`, or a path below an allowed "
        "root, in safetensors format.",
        examples=["smollm2-135m-instruct"],
    )
    layers: Layers | None = Field(
        None,
        description="Layers to scan, counted from 0, as a list or as ranges ('16-25,28'). Default: all, and what "
        "belongs to no layer (embeddings, output layer).",
        examples=[[16, 17, 18]],
    )
    kinds: Listed[str] | None = Field(
        None,
        description="Kinds of matrices to scan: the last module name of a weight. Default: all.",
        examples=[["k_proj", "v_proj"]],
    )
    keep: Shares = Field(
        (0.9,),
        description="Shares for the rules `fraction` (of the full rank) and `energy` (of the squared norm).",
        examples=[[0.1, 0.9]],
    )
    top_fractions: Shares = Field(
        (0.25, 0.5),
        description="Shares of the matrices of each kind that a list for training names, a list for each share.",
        examples=[[0.25, 0.5]],
    )
    embeddings: bool = Field(
        True,
        description="Whether these lists name the embeddings and the output layer too, as those of Spectrum do.",
    )
    rows: int = Field(
        1000,
        ge=0,
        le=100_000,
        description="Matrices that the answer describes, at most, by layer; the file `scan.json` has all.",
        examples=[1000],
    )


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RuleOutcome(_Part):
    """What one rule makes of one matrix."""

    rule: str = Field(description="The rule, with the share that it keeps if it is told one: `energy 0.9`.")
    rank: int = Field(description="Rank that it would keep.")
    energy: float = Field(description="Share of the squared norm that it would keep.")


class ScannedMatrix(_Part):
    """What the spectrum of one matrix shows."""

    address: str = Field(
        description="Full parameter name; of a tensor that holds several experts, with `[expert]`."
    )
    layer: int | None = Field(description="Its layer; None for embeddings and the output layer.")
    kind: str
    shape: tuple[int, int]
    sigma: float = Field(description="Standard deviation of the noise entries, by the fitted bulk.")
    outliers: int = Field(description="Singular values that this fit leaves out, for being above `edge`.")
    edge: float = Field(description="The largest singular value of that noise.")
    rules: tuple[RuleOutcome, ...] = Field(description="What each rule would keep.")
    noise_ratio: float | None = Field(
        description="Sum of the singular values above the edge of the noise over that of the others. Free of scale, "
        "and 0 for noise of any shape; None where there are no others."
    )
    snr: float | None = Field(description="The same by the original rule (laserRMT).")
    bulk_distance: float = Field(
        description="Kolmogorov-Smirnov distance of the bulk from the Marchenko-Pastur law: below 0.02 it looks like "
        "independent noise."
    )
    frobenius: float = Field(description="Frobenius norm.")
    spectral_norm: float = Field(description="Largest singular value.")
    singular_values: tuple[float, ...] = Field(
        (),
        description="At most 64 of them, descending, evenly spaced in order. In the file `scan.json`; an answer leaves "
        "them out. All of them are in `spectra.safetensors`.",
    )
    tied: tuple[str, ...] = Field((), description="Other tensors that are stored with the same bytes.")


class LayerList(_Part):
    """The matrices of the highest score, a share of each kind."""

    score: Score
    top_fraction: float
    file: str = Field(description="The list as a file of `unfrozen_parameters` for axolotl, below `path`.")
    addresses: tuple[str, ...] = Field(description="Kind by kind, of each the highest score first.")
    also: tuple[str, ...] = Field((), description="Embeddings and output layer.")


class LaserScanResult(OperationResult):
    """What a ``/laser/scan`` job returns."""

    path: str | None = Field(
        None,
        description="Directory of the files of this scan on the service's file system: `scan.json`, `layers.json`, "
        "`snr_results.json` (Spectrum's format), `spectra.safetensors`, the lists, the pictures.",
    )
    content_hash: str = Field(description="Stands for the bytes of the weights and for the request.")
    matrices_scanned: int = Field(description="Matrices whose spectrum was computed.")
    parameters: int = Field(description="Their entries.")
    matrices: tuple[ScannedMatrix, ...] = Field((), description="By layer, then by name; at most `rows`.")
    lists: tuple[LayerList, ...] = Field((), description="For every share and score.")
    unfrozen_yaml: str = Field(
        description="`unfrozen_parameters` for axolotl: the list of the first share, by the corrected ratio."
    )
    files: tuple[str, ...] = Field((), description="Files in `path`.")
