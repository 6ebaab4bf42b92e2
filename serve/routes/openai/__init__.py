"""``/v1``: what OpenAI's clients ask of a fine-tuning service, as views of the same jobs, data sets and models.

Not in this service's own OpenAPI document: OpenAI's describes it, and their clients are how it is meant to be used.
"""

from __future__ import annotations

from fastapi import APIRouter

from serve.routes.openai import embeddings, files, jobs, models, rerank

__all__ = ["router"]

router = APIRouter(prefix="/v1", include_in_schema=False)
for part in (embeddings.router, rerank.router, files.router, jobs.router, models.router):
    router.include_router(part)
