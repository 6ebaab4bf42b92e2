"""The requests that are answered at once by a model that finds texts: ``/embed`` and ``/rerank``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from aidocks.specs.base import ModelRef, Spec

#: Of one request.
MOST_TEXTS = 2048
Text = Annotated[str, Field(min_length=1, max_length=1_000_000)]
Texts = Annotated[tuple[Text, ...], Field(min_length=1, max_length=MOST_TEXTS)]


class EmbedRequest(Spec):
    """Vectors of texts."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "minilm-squad", "input": ["Where is it?"], "role": "query"}]
        }
    )

    model: ModelRef = Field(
        description="An embedding model: a registry name, or a path below an allowed root."
    )
    input: Text | Texts = Field(
        validation_alias=AliasChoices("input", "texts", "inputs"), description="A text, or several."
    )
    role: Literal["query", "passage"] | None = Field(
        None,
        validation_alias=AliasChoices("role", "input_type", "prompt_name"),
        description="Which of the model's prompts is put before each text; none without one.",
    )
    prompt: str | None = Field(None, max_length=2000, description="Another prompt, in place of the model's.")
    dimensions: int | None = Field(
        None, ge=1, le=65_536, description="Cut the vectors to so many values, and make their length 1 again."
    )
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="`base64`: of little-endian float32."
    )

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts, one or several."""
        return (self.input,) if isinstance(self.input, str) else self.input


class Document(Spec):
    """A passage, as Jina and Cohere write it."""

    text: Text


class RerankRequest(Spec):
    """Passages in the order in which they answer a query."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "reranker-squad", "query": "Where is it?", "documents": ["There.", "Never."]}
            ]
        }
    )

    model: ModelRef = Field(description="A reranker: a registry name, or a path below an allowed root.")
    query: Text
    documents: Annotated[tuple[Text | Document, ...], Field(min_length=1, max_length=MOST_TEXTS)] = Field(
        validation_alias=AliasChoices("documents", "passages", "texts")
    )
    top_n: int | None = Field(
        None, ge=1, validation_alias=AliasChoices("top_n", "top_k"), description="So many of the best alone."
    )
    return_documents: bool = Field(False, description="Repeat the texts in the answer.")
    raw_scores: bool = Field(
        False, description="Scores as the model makes them, rather than between 0 and 1."
    )

    @property
    def texts(self) -> tuple[str, ...]:
        """The passages."""
        return tuple(one if isinstance(one, str) else one.text for one in self.documents)


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Usage(_Answer):
    """What a request has cost."""

    prompt_tokens: int
    total_tokens: int


class EmbedAnswer(_Answer):
    """Vectors, in the order of the texts."""

    model: str
    dimensions: int
    embeddings: tuple[tuple[float, ...] | str, ...] = Field(
        description="A list of numbers, or base64, of each."
    )
    usage: Usage


class Ranked(_Answer):
    """A passage with its score."""

    index: int = Field(description="In the request's documents, from 0.")
    relevance_score: float
    document: Document | None = None


class RerankAnswer(_Answer):
    """The passages, the best first."""

    model: str
    results: tuple[Ranked, ...]
    usage: Usage
