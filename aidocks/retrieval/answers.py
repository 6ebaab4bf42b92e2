"""What answers of ``/embed`` and ``/rerank`` are made of, the same at every door; no torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from aidocks.errors import CorruptCheckpoint, IncompatibleModels, InvalidSpec
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


def vectors(
    asked: EmbedRequest, rows: NDArray[np.float32] | Sequence[NDArray[np.float32]]
) -> NDArray[np.float32]:
    """Return the vectors of a request: float32 [N, D], or their leading parts, each with length 1 again.

    Args:
        asked: The request.
        rows: Of its N texts, as the model makes them, each [D].

    Raises:
        InvalidSpec: They are shorter than what is asked for.
        CorruptCheckpoint: The model makes no numbers.
    """
    import numpy as np

    made = np.asarray(rows, np.float32)
    _require_numbers(bool(np.isfinite(made).all()), asked.model)
    length = made.shape[1]
    if asked.dimensions is None:
        return made
    if asked.dimensions > length:
        raise InvalidSpec(
            f"The model's vectors have {length} values.",
            field="dimensions",
            value=asked.dimensions,
            hint=f"Ask for {length} at most.",
        )
    parts = made[:, : asked.dimensions]
    norms: NDArray[np.float32] = np.linalg.norm(parts, axis=1, keepdims=True).astype(np.float32)
    norms[norms == 0] = 1
    return parts / norms


def ranking(asked: RerankRequest, scores: Sequence[float]) -> tuple[Ranked, ...]:
    """Return the passages of a request, the best first; of equal ones, the earlier.

    Args:
        asked: The request.
        scores: Of its passages, as the model makes them.

    Raises:
        CorruptCheckpoint: The model makes no numbers.
    """
    _require_numbers(all(map(math.isfinite, scores)), asked.model)
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


def _require_numbers(are_finite: bool, model: str) -> None:
    """Refuse an answer of what is no number. Asked of each request: one's texts need not be another's failure."""
    if not are_finite:
        raise CorruptCheckpoint(
            f"{model} makes values that are no numbers.",
            field="model",
            value=model,
            hint="Its weights hold values that are no numbers, or it overflows in its data type.",
        )
