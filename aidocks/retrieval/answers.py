"""What answers of ``/embed`` and ``/rerank`` are made of, the same at every door; no torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from aidocks.errors import IncompatibleModels, InvalidSpec
from aidocks.models.resolve import ModelResolver
from aidocks.retrieval.architecture import architecture_of
from aidocks.retrieval.opening import open_retriever
from aidocks.retrieval.serving import Pair, Recipe
from aidocks.specs.retrieve import Document, EmbedRequest, Ranked, RerankRequest
from aidocks.training.retriever import Retriever, RetrieverKind

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def open_trained(
    reference: str, kind: RetrieverKind, resolver: ModelResolver, remote_code: Collection[str] = ()
) -> Retriever:
    """Return the model that a request means, which must have been trained to be of a kind.

    A training begins a reranker with a head of random numbers; an answer of those would look like any other.

    Raises:
        IncompatibleModels: It is of the other kind, or an encoder without a head that gives scores.
        AIDocksError: As :func:`~aidocks.retrieval.opening.open_retriever`.
    """
    retriever = open_retriever(reference, kind, resolver, field="model", remote_code=remote_code)
    if kind == "reranker" and retriever.adapter is None:
        found = architecture_of(retriever.model)
        if found.kind is None and found.family == "encoder":
            raise IncompatibleModels(
                f"{reference!r} is an encoder without a head that gives scores.",
                field="model",
                value=reference,
                hint="Make a reranker of it with /train/rerank.",
            )
    return retriever


def recipe_of(asked: EmbedRequest, retriever: Retriever) -> Recipe:
    """Return how the texts of a request are computed; texts of any role together where the model knows no roles."""
    knows_roles = retriever.task is not None or any((retriever.prompts.query, retriever.prompts.passage))
    return Recipe(retriever, asked.role if knows_roles else None, asked.prompt)


def pairs_of(asked: RerankRequest) -> list[Pair]:
    """Return the query with each passage."""
    return [(asked.query, text) for text in asked.texts]


def cut(row: NDArray[np.float32], dimensions: int | None) -> NDArray[np.float32]:
    """Return the leading part of a vector [D], with length 1 again; all of it where no length is asked for.

    Raises:
        InvalidSpec: The vector is shorter.
    """
    import numpy as np

    if dimensions is None:
        return row
    if dimensions > len(row):
        raise InvalidSpec(
            f"The model's vectors have {len(row)} values.",
            field="dimensions",
            value=dimensions,
            hint=f"Ask for {len(row)} at most.",
        )
    part = row[:dimensions]
    length = np.float32(np.linalg.norm(part))
    return part / length if length > 0 else part


def ranking(asked: RerankRequest, scores: Sequence[float]) -> tuple[Ranked, ...]:
    """Return the passages of a request, the best first; of equal ones, the earlier.

    Args:
        asked: The request.
        scores: Of its passages, as the model makes them.
    """
    texts = asked.texts
    order = sorted(range(len(texts)), key=lambda place: (-scores[place], place))
    return tuple(
        Ranked(
            index=place,
            relevance_score=scores[place] if asked.raw_scores else between_0_and_1(scores[place]),
            document=Document(text=texts[place]) if asked.return_documents else None,
        )
        for place in order[: asked.top_n]
    )


def between_0_and_1(score: float) -> float:
    """Return the logistic function of a score."""
    if score >= 0:
        return 1.0 / (1.0 + math.exp(-score))
    small = math.exp(max(score, -700.0))
    return small / (1.0 + small)
