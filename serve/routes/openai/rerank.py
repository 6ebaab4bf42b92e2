"""``POST /v1/rerank`` as Jina's and Cohere's clients ask for passages in order."""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from aidocks.specs.read import build_spec, parse_json
from aidocks.specs.retrieve import RerankRequest
from serve.context import Here
from serve.routes.operations import require_json
from serve.routes.retrieve import ranked

router = APIRouter()


@router.post("/rerank")
async def create_rerank(here: Here, request: Request) -> Response:
    """Return the passages of the request with their scores between 0 and 1, the best first."""
    require_json(request)
    asked = build_spec(RerankRequest, parse_json(await request.body()))
    results, tokens = await ranked(here, asked)
    answer: dict[str, Any] = {
        "id": str(uuid.uuid4()),
        "object": "list",
        "model": asked.model,
        "results": results,
        # Jina's count, and Cohere's.
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "meta": {
            "api_version": {"version": "2"},
            "tokens": {"input_tokens": tokens},
            "billed_units": {"search_units": 1},
        },
    }
    return JSONResponse(answer)
