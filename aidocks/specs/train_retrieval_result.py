"""The result of ``/train/emb`` and ``/train/rerank``: what was trained, on what, and what it is worth."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from aidocks.specs.base import ModelResult
from aidocks.specs.train_data import LengthSummary, SkippedRows
from aidocks.specs.train_llm_result import TrainEstimate, Verdict
from aidocks.training.retriever import EmbeddingLoss, Prompts, RerankerLoss, RetrieverKind, RowKind
from aidocks.training.run import Precision

#: Figures of rankings, means over queries, 0 to 1; `spearman` is of scored pairs, -1 to 1.
Metric = Literal["ndcg@10", "mrr@10", "map@100", "recall@1", "recall@10", "recall@100", "spearman"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RankingData(_Part):
    """What was found in one data set, and what was made of it."""

    dataset: str = Field(description="As the request names it; `inline` for rows within the request.")
    format: str = Field(description="Form of the rows, detected or told.")
    detected: bool = Field(description="Whether the form was detected; else the request said it.")
    rows: RowKind = Field(description="What they are: rankings of passages, or scored pairs.")
    fields: dict[str, str] = Field(default_factory=dict, description="Role -> column that it is read from.")
    unused: tuple[str, ...] = Field((), description="Columns that nothing is read from.")
    lines: int = Field(description="Rows of the data set.")
    train: int = Field(description="Queries (or pairs) that are trained on.")
    held_out: int = Field(description="Queries (or pairs) that are only measured on.")
    positives: int = Field(0, description="Right passages of the training queries.")
    negatives: int = Field(0, description="Wrong passages that their rows name.")
    passages: int = Field(0, description="Distinct passages, in which held-out queries look for theirs.")
    skipped: tuple[SkippedRows, ...] = Field((), description="Rows that were left out, by reason.")
    duplicates: int = Field(0, description="Rows that occur more than once, counted from the second on.")
    leaked: int = Field(
        0, description="Training rows that were left out, because their query is measured on."
    )
    shared_passages: int = Field(
        0, description="Held-out queries, one of whose right passages is also trained on."
    )
    lengths: LengthSummary | None = Field(None, description="Of passages (scored pairs: of texts), in words.")
    sha256: str | None = Field(None, description="Of the rows that are trained on.")
    revision: str | None = Field(None, description="Revision of a hub data set.")


class Figure(_Part):
    """One figure before and after the training, on the same held-out queries."""

    metric: Metric
    before: float = Field(description="Of the very model that the training began with.")
    after: float
    delta: float = Field(description="after - before.")
    low: float = Field(description="Lower end of the change's 95 % interval (paired bootstrap).")
    high: float = Field(description="Upper end of it.")
    before_low: float = Field(description="Lower end of the 95 % interval of `before` (bootstrap).")
    before_high: float
    after_low: float
    after_high: float
    retriever: float | None = Field(
        None, description="Of the retriever's order alone, without any reranker, on the same passages."
    )
    p: float = Field(description="Two-sided, of the paired bootstrap: that there is no change.")
    verdict: Verdict = Field(description="`improved` or `worse` where the interval of the change excludes 0.")


class Domain(_Part):
    """What a model is worth on one data set."""

    dataset: str
    trained: bool = Field(description="Whether other rows of this data set were trained on.")
    rows: RowKind
    queries: int = Field(description="That the figures are means of (of scored pairs: pairs).")
    passages: int = Field(
        0, description="In which they look; with a reranker, that it puts in order, on average."
    )
    figures: tuple[Figure, ...] = Field(description="The first is the one that counts.")


class FoundExample(_Part):
    """What both models find for one held-out query, for people to read."""

    dataset: str
    query: str
    right: str = Field(description="A right passage.")
    rank_before: int | None = Field(
        None, description="Of the best right passage, from 1; None: not among them."
    )
    rank_after: int | None = None
    first_before: str = Field("", description="What the base finds first.")
    first_after: str = Field("", description="What the result finds first.")


class RetrieverTrainResult(ModelResult):
    """What a ``/train/emb`` or ``/train/rerank`` job returns."""

    base_model: str
    kind: RetrieverKind
    loss: EmbeddingLoss | RerankerLoss
    adapter: Literal["lora", "dora", "full"]
    merged: bool = Field(description="Whether the result is a whole model; else it is an adapter.")
    prompts: Prompts = Prompts()
    pooling: str | None = Field(None, description="Of an embedding model.")
    dimensions: int | None = Field(None, description="Length of its vectors.")
    max_length: int = Field(description="Tokens that it reads of a text.")
    licence: str | None = Field(None, description="Of the base, as its card says.")
    device: str = Field(description="That the workers train on: a GPU's name, or `cpu`.")
    workers: int
    deepspeed_stage: int | None = Field(None, description="None without DeepSpeed.")
    precision: Precision = Field(description="Of frozen weights and of the computation.")
    data: tuple[RankingData, ...] = Field((), description="One of each data set.")
    mined: int | None = Field(None, description="Hard negatives that were found before the training.")
    steps: int = Field(description="Optimiser steps.")
    epochs: float
    tokens: int | None = Field(None, description="Tokens that the model saw.")
    tokens_per_s: float | None = None
    training_seconds: float | None = Field(None, description="Of the training loop.")
    loss_value: float | None = Field(None, description="Training loss: mean of the last tenth of the steps.")
    domains: tuple[Domain, ...] = Field((), description="Tables before and after, of each data set.")
    examples: tuple[FoundExample, ...] = ()
    verdict: Verdict | None = Field(
        None,
        description="Of the first figure of the data sets that were trained on; None where none was measured.",
    )
    trainable: int = Field(description="Parameters that are trained.")
    parameters: int = Field(description="All of them.")
    peak_bytes: tuple[int, ...] = Field((), description="Of every worker.")
    optimizer_bytes: tuple[int, ...] = Field((), description="Optimiser state of every worker.")
    reload_error: float | None = Field(
        None,
        description="Largest difference of a vector's value, or of a score, between the model at the end of the "
        "training and the files loaded again.",
    )
    attempts: int = Field(1, description="1 when no worker was lost.")
    resumed_from: str | None = Field(None, description="Job and step that it went on from.")
    versions: dict[str, str] = Field(default_factory=dict, description="Of the packages that trained it.")
    hyperparameters: dict[str, Any] = Field(default_factory=dict, description="All, defaults included.")
    estimate: TrainEstimate = Field(description="What it was expected to need.")
    files: tuple[str, ...] = Field((), description="History and measurements, relative to `path`.")
    notes: tuple[str, ...] = Field((), description="What one should know.")
    dry_run: bool = Field(False, description="Whether this is a plan only: nothing was trained.")
