"""Real experts, small ones: what the gate modes gave when they were written, so that a change is seen.

The figures also say why better routers are wanted: none of these modes comes near the expert of the text's
own domain (the shipped prose, on which the story expert has a perplexity of 9.6).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aidocks.jobs.runner import run_locally
from aidocks.settings import Settings
from aidocks.specs.moe import MoESpec
from aidocks.specs.read import build_spec

PROMPTS = {
    "python": ["def f(x):", "import os", "class Reader:"],
    "math": ["How many apples are left?", "Question: ", "x = 3 + 4"],
    "story": ["Once upon a time", "The king and the queen", "the little mermaid"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gate_mode", "condition", "perplexity", "story_load"),
    [("hidden", 2.738, 24.96, 0.278), ("cheap_embed", 4.283, 27.55, 0.251), ("random", 1.348, 24.46, 0.307)],
)
def test_three_experts(
    gate_mode: str,
    condition: float,
    perplexity: float,
    story_load: float,
    shared_data: Path,
    home: Path,
) -> None:
    models = shared_data / "models"
    body: dict[str, Any] = {
        "base_model": str(models / "stories260k"),
        "gate_mode": gate_mode,
        "chunks": 16,
        "seqlen": 128,
        "experts": [
            {"source_model": str(models / f"expert-260k-{domain}"), "positive_prompts": prompts}
            for domain, prompts in PROMPTS.items()
        ],
    }
    job = run_locally("byo-moe", build_spec(MoESpec, body), Settings(home=home, allowed_roots=(models,)))
    assert job.result is not None, job.error
    measured = {line["model"]: line["domains"][0]["perplexity"] for line in job.result["perplexities"]}
    assert measured["experts[2]"] == pytest.approx(9.63, rel=0.01)
    assert job.result["gate_condition"] == pytest.approx(condition, rel=0.01)
    assert measured["moe"] == pytest.approx(perplexity, rel=0.01)
    assert job.result["experts"][2]["load"] == pytest.approx(story_load, abs=0.01)
