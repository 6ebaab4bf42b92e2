"""``GET /health``, cheap enough to be asked at any rate, and ``GET /status``, which tells more."""

from __future__ import annotations

from fastapi import APIRouter, Response

from aidocks.overview import Overview
from serve.context import Here
from serve.overview import gather_overview
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


@router.get("/status")
async def get_status(here: Here) -> Overview:
    """Tell how the service is and what it does: jobs, workers, nodes, disk."""
    return await gather_overview(here)
