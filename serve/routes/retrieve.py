"""``POST /embed`` and ``POST /rerank``: answered at once, by a model that finds texts."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from aidocks.retrieval.answers import pairs_of, ranking, recipe_of, vectors
from aidocks.retrieval.serving import Recipe
from aidocks.specs.read import build_spec, parse_json
from aidocks.specs.retrieve import EmbedAnswer, EmbedRequest, RerankAnswer, RerankRequest
from serve.context import Context, Here, problems
from serve.routes.operations import require_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

router = APIRouter(tags=["retrieval"])

#: Texts are the request, and not named by it.
MAX_BYTES = dict.fromkeys(("/embed", "/rerank", "/v1/embeddings", "/v1/rerank"), 32_000_000)

_PROBLEMS = problems(
    (403, "A path in the request is outside the allowed roots."),
    (404, "There is no such model."),
    (413, "The body is larger than 32 MB."),
    (415, "The body is not `application/json`."),
    (422, "The request is not valid, or the model is of another kind."),
    (429, "Too much waits already; `Retry-After` says when to ask again."),
    (501, "The libraries that compute are not installed."),
    (503, "Nobody computes at the moment."),
)


#: Values that take so long to write (10 ms) that others who ask are not kept waiting meanwhile.
_LONG = 50_000


@dataclass(frozen=True)
class Embedded:
    """Vectors of a request's texts, as JSON: lists of numbers, or base64 of little-endian float32."""

    written: list[str]
    dimensions: int
    tokens: int


@router.post(
    "/embed",
    operation_id="embed",
    summary="Vectors of texts.",
    response_model=EmbedAnswer,
    responses=_PROBLEMS,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/EmbedRequest"}}},
        }
    },
)
async def embed(here: Here, request: Request) -> Response:
    """Return a vector of each text. Texts longer than the model reads are cut."""
    require_json(request)
    asked = build_spec(EmbedRequest, parse_json(await request.body()))
    made = await embedded(here, asked)
    head = {"model": asked.model, "dimensions": made.dimensions}
    usage = {"prompt_tokens": made.tokens, "total_tokens": made.tokens}
    return json_answer(head | {"usage": usage}, "embeddings", made.written)


@router.post(
    "/rerank",
    operation_id="rerank",
    summary="Passages in the order in which they answer a query.",
    response_model=RerankAnswer,
    responses=_PROBLEMS,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/RerankRequest"}}},
        }
    },
)
async def rerank(here: Here, request: Request) -> Response:
    """Return the passages of the request with their scores, the best first."""
    require_json(request)
    asked = build_spec(RerankRequest, parse_json(await request.body()))
    results, tokens = await ranked(here, asked)
    answer = {
        "model": asked.model,
        "results": results,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    return Response(json.dumps(answer, ensure_ascii=False), media_type="application/json")


async def embedded(here: Context, asked: EmbedRequest) -> Embedded:
    """Return the vectors that a request asks for.

    Raises:
        InvalidSpec: The model's vectors are shorter than what is asked for.
        AIDocksError: As the lookup of the model, and as what waits.
    """
    retriever = await here.retrievers.find(asked.model, "embedding")
    answered = await here.waiting.answer(recipe_of(asked, retriever), asked.texts)
    made = vectors(asked, answered.rows)
    write = _in_base64 if asked.encoding_format == "base64" else _as_numbers
    if made.size < _LONG:
        written = [write(row) for row in made]
    else:
        written = await asyncio.to_thread(lambda: [write(row) for row in made])
    return Embedded(written, made.shape[1], answered.tokens)


async def ranked(here: Context, asked: RerankRequest) -> tuple[list[dict[str, Any]], int]:
    """Return the passages of a request as JSON, the best first, and the tokens that were read."""
    retriever = await here.retrievers.find(asked.model, "reranker")
    answered = await here.waiting.answer(Recipe(retriever), pairs_of(asked))
    scores = [float(score) for score in answered.rows]
    return [one.model_dump(exclude_none=True) for one in ranking(asked, scores)], answered.tokens


def json_answer(head: dict[str, Any], name: str, written: Iterable[str]) -> Response:
    """Return an answer of ``head`` with one more field: a list of values that are JSON already."""
    body = f'{json.dumps(head, ensure_ascii=False)[:-1]}, "{name}": [{", ".join(written)}]}}'
    return Response(body, media_type="application/json")


def _in_base64(row: NDArray[np.float32]) -> str:
    return f'"{base64.b64encode(row.astype("<f4").tobytes()).decode()}"'


def _as_numbers(row: NDArray[np.float32]) -> str:
    # Nine digits give back the same float32; more, as Python would write, say nothing.
    return f"[{', '.join(['%.9g'] * len(row)) % tuple(row)}]"
