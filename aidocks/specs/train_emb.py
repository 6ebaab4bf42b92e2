"""The request of ``/train/emb``: fine-tuning of an embedding model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, ConfigDict, Field, model_validator

from aidocks.errors import InvalidSpec
from aidocks.specs.aliases import with_aliases
from aidocks.specs.train_retrieval import RetrievalTrainSpec
from aidocks.training.retriever import DISTILLING_LOSSES, EmbeddingLoss, Pooling

EXAMPLES: list[dict[str, Any]] = [
    {
        "base_model": "all-minilm-l6-v2",
        "dataset": "support-questions",
        "mine_negatives": {"per_query": 3},
        "name": "minilm-support",
    },
    {
        "base_model": "BAAI/bge-small-en-v1.5",
        "dataset": ["support-questions", "wiki-questions"],
        "loss": "cached_mnrl",
        "per_device_train_batch_size": 512,
        "matryoshka": [256, 128, 64],
        "workers": 2,
    },
]


def _falling(lengths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(lengths), reverse=True))


class EmbeddingTrainSpec(RetrievalTrainSpec):
    """Fine-tune an embedding model on pairs of queries and passages, and prove that it finds more of them.

    Any sentence-transformers model, plain encoder or embedding decoder. Measured before and after on held-out queries.
    """

    model_config = ConfigDict(json_schema_extra=with_aliases(EXAMPLES))

    loss: Literal["auto"] | EmbeddingLoss = Field(
        "auto",
        validation_alias=AliasChoices("loss", "loss_type"),
        description="`mnrl`: the passages of other queries of the step, and hard negatives, are wrong answers; "
        "`cached_mnrl`: the same in little memory, for large batches; `triplet`: one positive against one negative; "
        "`cosent`, `angle`, `cosine`: scores of pairs; `margin_mse`, `distill_kl`: what `distill_from` says. `auto`: "
        "`mnrl` for rankings, `cosent` for scored pairs, `distill_kl` with `distill_from`.",
    )
    pooling: Pooling | None = Field(
        None,
        description="How vectors of tokens become that of the text. Default: as the model says; of a plain encoder "
        "`mean`, of a decoder `lasttoken`.",
    )
    normalize: bool | None = Field(
        None, description="Vectors of length 1. Default: as the model says; of a plain model, yes."
    )
    task: str | None = Field(
        None,
        max_length=100,
        validation_alias=AliasChoices("task", "task_adapter"),
        description="Of a model with adapters for tasks (Jina), the one that is trained on. (Its `retrieval` is two: "
        "name `retrieval_query` or `retrieval_passage`.)",
        examples=["retrieval_passage"],
    )
    matryoshka: Annotated[
        tuple[Annotated[int, Field(ge=8, le=65_536)], ...], Field(max_length=16), AfterValidator(_falling)
    ] = Field(
        (),
        validation_alias=AliasChoices("matryoshka", "matryoshka_dims"),
        description="Lengths to which the vectors shall be cut with little loss (Matryoshka).",
        examples=[[256, 128, 64]],
    )
    negatives: int = Field(
        1, ge=0, le=32, description="Hard negatives of a query that a step takes, where the rows have some."
    )
    temperature: float = Field(0.05, gt=0, le=10, description="Similarities are divided by it (`mnrl`).")
    margin: float = Field(0.3, gt=0, le=2, description="Of `triplet`, in cosine.")
    gather_negatives: bool = Field(
        True, description="With several workers: passages of the others are negatives, too (`mnrl`)."
    )
    chunk_size: int = Field(16, ge=1, le=4096, description="Texts of a forward pass of `cached_mnrl`.")

    @model_validator(mode="after")
    def _agree(self) -> EmbeddingTrainSpec:
        require_teacher(self.loss, self.distill_from)
        return self


def require_teacher(loss: str, teacher: str | None) -> None:
    """Refuse a teacher whose opinion the loss does not ask for; scores may be in the rows without one.

    Raises:
        InvalidSpec: Saying which losses do.
    """
    if teacher is not None and loss != "auto" and loss not in DISTILLING_LOSSES:
        raise InvalidSpec(
            f"The loss {loss!r} does not learn from another model.",
            field="distill_from",
            value=teacher,
            hint=f"Losses that do: {', '.join(DISTILLING_LOSSES)}; or leave `distill_from` out.",
        )
