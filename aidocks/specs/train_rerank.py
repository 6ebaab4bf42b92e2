"""The request of ``/train/rerank``: fine-tuning of a reranker (cross-encoder)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import AliasChoices, ConfigDict, Field, model_validator

from aidocks.specs.aliases import with_aliases
from aidocks.specs.base import ModelRef
from aidocks.specs.train_emb import require_teacher
from aidocks.specs.train_retrieval import RetrievalTrainSpec
from aidocks.training.retriever import RerankerLoss

EXAMPLES: list[dict[str, Any]] = [
    {
        "base_model": "BAAI/bge-reranker-base",
        "dataset": "support-questions",
        "mine_negatives": {"per_query": 7},
        "name": "reranker-support",
    },
    {"base_model": "bert-tiny", "dataset": "support-questions", "adapter": "full", "loss": "lambda"},
]


class RerankerTrainSpec(RetrievalTrainSpec):
    """Fine-tune a reranker on queries with right and wrong passages, and prove that it orders them better.

    Any sequence classifier with one label, plain encoder (which gets a score of its own) or yes/no decoder. Measured
    before and after on held-out queries.
    """

    model_config = ConfigDict(json_schema_extra=with_aliases(EXAMPLES))

    loss: Literal["auto"] | RerankerLoss = Field(
        "auto",
        validation_alias=AliasChoices("loss", "loss_type"),
        description="`bce`: right or wrong, passage by passage; `ranknet`: pairs; `lambda` (LambdaLoss), `listnet`, "
        "`listmle`, `plistmle`: the whole list; `mnrl`: the right one among all; `margin_mse`, `mse`: what "
        "`distill_from` says. `auto`: `lambda` for rankings, `bce` for scored pairs, `mse` with `distill_from`.",
    )
    negatives: int = Field(7, ge=1, le=100, description="Wrong passages of a query that a step takes.")
    retriever: ModelRef | Literal["bm25"] | None = Field(
        None,
        description="What finds the passages that are put in order when it is measured: an embedding model, or `bm25`, "
        "in all passages of the data. Then the table also has the order of the retriever alone. Default: the passages "
        "of the row itself; `bm25` where it has no wrong ones.",
        examples=["all-minilm-l6-v2"],
    )
    candidates: int = Field(50, ge=2, le=1000, description="Passages that `retriever` finds for each query.")

    @model_validator(mode="after")
    def _agree(self) -> RerankerTrainSpec:
        require_teacher(self.loss, self.distill_from)
        return self

    def inputs(self) -> dict[str, str]:
        found = super().inputs()
        if self.retriever not in (None, "bm25"):
            found["retriever"] = str(self.retriever)
        return found
