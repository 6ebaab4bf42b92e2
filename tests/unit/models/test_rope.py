"""Rotations in one form, whichever version of transformers wrote them."""

from __future__ import annotations

from typing import Any

import pytest

from aidocks.models.rope import read_rotation

PLAIN = {"rope_theta": 10_000.0, "rope_type": "default", "partial_rotary_factor": 1.0}
GEMMA3 = {
    "full_attention": {**PLAIN, "rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
    "sliding_attention": PLAIN,
}


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({}, PLAIN),
        ({"rope_theta": 1e4, "rope_scaling": None}, PLAIN),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, PLAIN),
        (
            {"rope_theta": 5, "rope_scaling": {"type": "yarn"}},
            PLAIN | {"rope_theta": 5.0, "rope_type": "yarn"},
        ),
        ({"partial_rotary_factor": 0.5}, PLAIN | {"partial_rotary_factor": 0.5}),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, PLAIN | {"partial_rotary_factor": 0.5}),
        ({"model_type": "mixtral"}, PLAIN | {"rope_theta": 1e6}),
        ({"model_type": "gpt_neox"}, PLAIN | {"partial_rotary_factor": 0.25}),
        ({"rotary_pct": 1.0, "rotary_emb_base": 500}, PLAIN | {"rope_theta": 500.0}),
        (
            {
                "model_type": "gemma3_text",
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
            GEMMA3,
        ),
        ({"model_type": "gemma3_text", "rope_parameters": GEMMA3}, GEMMA3),
    ],
)
def test_one_form(config: dict[str, Any], found: dict[str, Any]) -> None:
    assert read_rotation(config) == found


@pytest.mark.parametrize("config", [{"rope_scaling": "yarn"}, {"rope_scaling": 3}, {"rope_theta": "much"}])
def test_what_is_no_rotation(config: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        read_rotation(config)
