"""``POST /v1/embeddings`` as OpenAI's clients ask for vectors; Jina's and Cohere's words for roles are understood."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from aidocks.errors import InvalidSpec
from aidocks.specs.base import ModelRef, Spec
from aidocks.specs.read import build_spec, parse_json
from aidocks.specs.retrieve import EmbedRequest
from serve.context import Here
from serve.routes.operations import require_json
from serve.routes.retrieve import embedded, json_answer

router = APIRouter()

#: What Jina's and Cohere's clients call the sides of a search -> what we do.
ROLES = {
    "query": "query",
    "passage": "passage",
    "document": "passage",
    "search_query": "query",
    "search_document": "passage",
    "retrieval.query": "query",
    "retrieval.passage": "passage",
}

_Tokens = list[Annotated[int, Field(ge=0)]]


class EmbeddingsRequest(Spec):
    """Their request; what is not theirs says which of the model's prompts is put before the texts."""

    model: ModelRef
    input: str | list[str] | _Tokens | list[_Tokens]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None
    input_type: str | None = None
    task: str | None = None
    prompt_name: str | None = None
    prompt: str | None = None

    def own(self) -> EmbedRequest:
        """Return the request in our words.

        Raises:
            InvalidSpec: Tokens rather than texts, or a role that is not known.
        """
        texts = [self.input] if isinstance(self.input, str) else self.input
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InvalidSpec(
                "`input` holds tokens: which texts they are depends on the model."
                if texts
                else "`input` is empty.",
                field="input",
                hint="Send texts.",
            )
        given = {
            "model": self.model,
            "input": texts,
            "role": self._role(),
            "prompt": self.prompt,
            "dimensions": self.dimensions,
            "encoding_format": self.encoding_format,
        }
        return build_spec(EmbedRequest, {name: value for name, value in given.items() if value is not None})

    def _role(self) -> str | None:
        told = {"input_type": self.input_type, "task": self.task, "prompt_name": self.prompt_name}
        for field, value in told.items():
            if value is not None and value not in ROLES:
                raise InvalidSpec(
                    f"{value!r} is no role of a text here.",
                    field=field,
                    value=value,
                    hint=f"There are: {', '.join(ROLES)}.",
                )
        return next((ROLES[value] for value in told.values() if value is not None), None)


@router.post("/embeddings")
async def create_embeddings(here: Here, request: Request) -> Response:
    """Return a vector of each text."""
    require_json(request)
    asked = build_spec(EmbeddingsRequest, parse_json(await request.body()))
    made = await embedded(here, asked.own())
    head: dict[str, Any] = {
        "object": "list",
        "model": asked.model,
        "usage": {"prompt_tokens": made.tokens, "total_tokens": made.tokens},
    }
    data = (
        f'{{"object": "embedding", "index": {place}, "embedding": {vector}}}'
        for place, vector in enumerate(made.written)
    )
    return json_answer(head, "data", data)
