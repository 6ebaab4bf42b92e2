"""The request bodies that the original project's README printed, as printed, with the model names replaced."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from aidocks.client.http import Client

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(280)]

LASER = """\
{
    "base_model_name" : "tiny-base",
    "laser_model_name": "TinyLaser",
    "top_k_layers": 15
}
"""

# The commas between the prompts are missing in the original, too.
MOE = """\
{
    "base_model": "tiny-base",
    "gate_mode": "hidden",
    "dtype": "bfloat16",
    "experts":[
        {
            "source_model": "tiny-base",
            "positive_prompts": [
                "instruction"
                "solutions"
                "chat"
                "questions"
                "comprehension"
            ]
        },
        {
            "source_model": "TinyLaser",
            "positive_prompts": [
                "mathematics"
                "optimization"
                "code"
                "step-by-step"
                "science"
            ],
            "negative_prompts": [
                "chat"
                "questions"
            ]
        }
    ]
}
"""


def test_the_documented_bodies_work_unchanged(service: Any) -> None:
    laser = submit(service, "/laser", LASER)
    assert laser["model"] == "TinyLaser"
    assert laser["candidates_tried"] == 15
    moe = submit(service, "/byo-moe", MOE)
    assert moe["gate_mode"] == "hidden"
    with Client(service.url) as client:
        spec = client.model(moe["model"]).spec
    assert spec["experts"][0]["positive_prompts"] == [
        "instruction", "solutions", "chat", "questions", "comprehension"
    ]  # fmt: skip
    assert spec["experts"][1]["negative_prompts"] == ["chat", "questions"]


def submit(service: Any, path: str, body: str) -> dict[str, Any]:
    """Send ``body`` byte for byte, as curl does, and return the result of the job."""
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{service.url}{path}", content=body, headers=headers, timeout=30)
    assert answer.status_code == 202, answer.text
    with Client(service.url) as client:
        return client.job(answer.json()["id"]).wait(timeout=250).model_dump()
