"""The kinds of training, told apart by their `kind`, and where the loop finds what is particular to each."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, TypeAdapter

from aidocks.training.retriever import EmbeddingTraining, RerankerTraining
from aidocks.training.run import LLMTraining

AnyTraining = Annotated[LLMTraining | EmbeddingTraining | RerankerTraining, Field(discriminator="kind")]
TRAINING: TypeAdapter[AnyTraining] = TypeAdapter(AnyTraining)

#: Kind -> the package of its trainers, on a higher floor; see `train.loop.Family` for what such a package has.
FAMILIES = {"llm": "train.methods", "embedding": "train.retrieval", "reranker": "train.retrieval"}
