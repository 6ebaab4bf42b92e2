"""Trainings of what finds texts: embedding models and rerankers, resolved, as ``aidocks.training.run`` has it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from aidocks.training.run import Hyperparameters, Training

#: What a model is to retrieval: it makes a vector of a text, or a score of a query and a passage.
RetrieverKind = Literal["embedding", "reranker"]
#: How the vectors of tokens become that of a text.
Pooling = Literal["mean", "cls", "lasttoken", "max"]
EmbeddingLoss = Literal[
    "mnrl", "cached_mnrl", "triplet", "cosent", "angle", "cosine", "margin_mse", "distill_kl"
]
RerankerLoss = Literal[
    "bce", "ranknet", "lambda", "listnet", "listmle", "plistmle", "mnrl", "margin_mse", "mse"
]
#: What rows are: a query with passages that answer it, or that do not; or two texts and how alike they are.
RowKind = Literal["ranking", "scored"]

#: Losses that learn from what a better model makes of a query's passages.
DISTILLING_LOSSES: tuple[EmbeddingLoss | RerankerLoss, ...] = ("margin_mse", "distill_kl", "mse")
#: Losses that take the passages of other queries of the step for negatives.
IN_BATCH_LOSSES: tuple[EmbeddingLoss | RerankerLoss, ...] = ("mnrl", "cached_mnrl")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Prompts(_Part):
    """What is put before a text."""

    query: str = ""
    passage: str = ""


class Retriever(_Part):
    """A model that finds texts, as files of this machine, with every choice made that its use needs."""

    kind: RetrieverKind
    name: str = Field(description="The model as the request calls it.")
    model: Path = Field(description="Directory of the model; with an adapter, of its base.")
    adapter: Path | None = Field(None, description="Directory of a PEFT adapter that is added to it.")
    task: str | None = Field(None, description="Of the model's own adapters for tasks, the one that is used.")
    pooling: Pooling | None = Field(
        None, description="Of a model that does not say how it pools (no sentence-transformers modules)."
    )
    normalize: bool | None = Field(None, description="Vectors of length 1; None: as the model has it.")
    prompts: Prompts = Prompts()
    max_length: int = Field(512, ge=8, description="Tokens of a text (reranker: of query and passage).")
    remote_code: bool = Field(False, description="An admin allows this model to bring code of its own.")
    seed: int = Field(
        0,
        description="Of the weights that no file has: the head of a reranker that is made of a plain encoder.",
    )


class RetrieverHyperparameters(Hyperparameters):
    """Those of the training of an embedding model or a reranker."""

    negatives: int = Field(0, ge=0, description="Hard negatives of a query that a step takes, at most.")
    temperature: float = Field(0.05, gt=0, description="Similarities are divided by it (`mnrl`).")
    margin: float = Field(
        0.3, gt=0, description="Of `triplet`: by how much a positive is to be closer, cosine."
    )
    chunk: int = Field(16, ge=1, description="Of `cached_mnrl`: texts of a forward pass.")
    gather_negatives: bool = Field(True, description="Passages of the other workers are negatives, too.")
    matryoshka: tuple[int, ...] = Field((), description="Lengths of the leading parts that are vectors, too.")


class RetrieverTraining(Training):
    """The training of a model that finds texts. ``train`` and ``held_out`` are rows of ``rows``' kind:

    ========= =============================================================================================
    ranking   ``query``, ``positives`` (texts), ``negatives`` (texts, maybe none), and maybe ``grades`` (of the
              positives, 1 and more) and ``scores`` (a better model's, of the positives and then the negatives)
    scored    ``first``, ``second``, ``score`` (0 to 1)
    ========= =============================================================================================
    """

    retriever: Retriever = Field(description="What is trained.")
    rows: RowKind
    hyper: RetrieverHyperparameters
    merge: bool = Field(True, description="Write a whole model; else the adapter alone.")


class EmbeddingTraining(RetrieverTraining):
    """The training of an embedding model."""

    kind: Literal["embedding"] = "embedding"
    loss: EmbeddingLoss

    @property
    def what(self) -> str:
        return self.loss


class RerankerTraining(RetrieverTraining):
    """The training of a reranker."""

    kind: Literal["reranker"] = "reranker"
    loss: RerankerLoss

    @property
    def what(self) -> str:
        return self.loss
