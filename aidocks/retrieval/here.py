"""``/embed`` and ``/rerank`` in this process, without a service: the models of this machine's registry."""

from __future__ import annotations

from pathlib import Path

from aidocks.models.resolve import ModelResolver
from aidocks.retrieval.answers import open_trained, pairs_of, ranking, recipe_of, vectors
from aidocks.retrieval.serving import Call, ModelsAtHand, Recipe
from aidocks.settings import Settings
from aidocks.specs.retrieve import EmbedAnswer, EmbedRequest, RerankAnswer, RerankRequest, Usage


class RetrievalHere:
    """Answers requests with the models of this machine; whoever runs this process may name any path."""

    def __init__(self, settings: Settings | None = None) -> None:
        settings = settings or Settings()
        self._remote_code = settings.remote_code_models
        self._resolver = ModelResolver(settings.models_dir, (Path("/"),))
        self._models = ModelsAtHand(settings.serving_memory_bytes)

    def embed(self, asked: EmbedRequest) -> EmbedAnswer:
        """Return vectors of texts.

        Raises:
            AIDocksError: The model is not there, of another kind, or cannot be loaded.
        """
        retriever = open_trained(asked.model, "embedding", self._resolver, self._remote_code)
        reply = self._models.compute(Call(recipe_of(asked, retriever), asked.texts))
        made = vectors(asked, reply.values)
        return EmbedAnswer(
            model=asked.model,
            dimensions=made.shape[1],
            embeddings=tuple(map(tuple, made.tolist())),
            usage=_usage(sum(reply.tokens)),
        )

    def rerank(self, asked: RerankRequest) -> RerankAnswer:
        """Return passages in order; raises as :meth:`embed`."""
        retriever = open_trained(asked.model, "reranker", self._resolver, self._remote_code)
        reply = self._models.compute(Call(Recipe(retriever), pairs_of(asked)))
        return RerankAnswer(
            model=asked.model,
            results=ranking(asked, reply.values.tolist()),
            usage=_usage(sum(reply.tokens)),
        )


def _usage(tokens: int) -> Usage:
    return Usage(prompt_tokens=tokens, total_tokens=tokens)
