"""``GET /health``: cheap enough to be asked at any rate."""

from __future__ import annotations

from fastapi import APIRouter, Response

from serve.context import Here
from serve.readiness import Health

router = APIRouter(tags=["service"])


@router.get(
    "/health",
    response_model=Health,
    responses={503: {"model": Health, "description": "The job store does not answer."}},
)
async def health(here: Here) -> Response:
    """Tell how the service is. The answer is found out in the background and at most a few seconds old."""
    return here.readiness.answer()
