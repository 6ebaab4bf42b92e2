"""What of a request does not go together with its rows, its model, or DeepSpeed."""

from __future__ import annotations

from typing import Any

import pytest

from aidocks.errors import InvalidSpec
from aidocks.retrieval.checks import (
    RowsSeen,
    notes_before,
    notes_of_loss,
    require_engine,
    require_loss,
)
from aidocks.specs.read import build_spec
from aidocks.specs.train_emb import EmbeddingTrainSpec
from aidocks.specs.train_rerank import RerankerTrainSpec

RANKED = RowsSeen("ranking", negatives=True, scored=False)
BARE = RowsSeen("ranking", negatives=False, scored=False)
TAUGHT = RowsSeen("ranking", negatives=True, scored=True)
#: Scores of right passages alone.
GIVEN = RowsSeen("ranking", negatives=False, scored=True)
SCORED = RowsSeen("scored", negatives=False, scored=False)


def spec(kind: str, **given: Any) -> Any:
    kinds: dict[str, Any] = {"emb": EmbeddingTrainSpec, "rerank": RerankerTrainSpec}
    return build_spec(kinds[kind], {"base_model": "base", "dataset": "rows", **given})


@pytest.mark.parametrize(
    ("kind", "given", "seen", "field"),
    [
        ("emb", {"loss": "cosent"}, RANKED, "loss"),
        ("emb", {"loss": "mnrl"}, SCORED, "loss"),
        ("emb", {"loss": "distill_kl"}, RANKED, "loss"),
        ("emb", {"loss": "margin_mse"}, RANKED, "loss"),
        ("emb", {"loss": "triplet"}, BARE, "mine_negatives"),
        ("emb", {"distill_from": "teacher"}, BARE, "mine_negatives"),
        ("emb", {"loss": "distill_kl", "mine_negatives": True}, GIVEN, "mine_negatives"),
        ("emb", {"mine_negatives": True}, SCORED, "mine_negatives"),
        ("rerank", {"loss": "lambda"}, SCORED, "loss"),
        ("rerank", {"loss": "mse"}, RANKED, "loss"),
        ("rerank", {"distill_from": "teacher"}, SCORED, "distill_from"),
    ],
)
def test_what_cannot_be_learnt_is_refused(
    kind: str, given: dict[str, Any], seen: RowsSeen, field: str
) -> None:
    with pytest.raises(InvalidSpec) as refused:
        require_loss(spec(kind, **given), seen)
    assert refused.value.field == field
    assert refused.value.hint


@pytest.mark.parametrize(
    ("kind", "given", "seen"),
    [
        ("emb", {}, BARE),
        ("emb", {}, SCORED),
        ("emb", {"loss": "triplet", "mine_negatives": True}, BARE),
        ("emb", {"loss": "distill_kl"}, TAUGHT),
        ("emb", {"distill_from": "teacher", "mine_negatives": True}, BARE),
        ("rerank", {"distill_from": "teacher"}, BARE),
        ("emb", {"loss": "margin_mse", "distill_from": "teacher"}, RANKED),
        ("rerank", {}, BARE),
        ("rerank", {}, SCORED),
        ("rerank", {"loss": "mse"}, SCORED),
        ("rerank", {"loss": "margin_mse"}, TAUGHT),
    ],
)
def test_what_can_be_learnt_is_not_refused(kind: str, given: dict[str, Any], seen: RowsSeen) -> None:
    require_loss(spec(kind, **given), seen)


@pytest.mark.parametrize(
    "given", [{"deepspeed": 3}, {"deepspeed": 2, "loss": "cached_mnrl"}, {"deepspeed": "3-offload"}]
)
def test_what_deepspeed_cannot_train_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidSpec) as refused:
        require_engine(spec("emb", **given))
    assert refused.value.field == "deepspeed"


def test_what_deepspeed_can_train_is_not() -> None:
    for given in ({}, {"deepspeed": 2}, {"deepspeed": "off", "loss": "cached_mnrl"}):
        require_engine(spec("emb", **given))


@pytest.mark.parametrize(
    ("kind", "given", "seen", "word"),
    [
        ("emb", {"adapter": "full", "lora_rank": 4}, RANKED, "lora_rank"),
        ("emb", {"adapter": "full", "merge_adapter": False}, RANKED, "merge_adapter"),
        ("emb", {"max_steps": 3, "num_train_epochs": 2}, RANKED, "num_train_epochs"),
        ("emb", {"eval_steps": 3, "evaluate": False}, RANKED, "eval_steps"),
        ("emb", {"margin": 0.5}, RANKED, "margin"),
        ("emb", {"chunk_size": 4}, RANKED, "chunk_size"),
        ("emb", {"temperature": 0.1}, SCORED, "temperature"),
        ("emb", {"negatives": 3}, BARE, "negatives"),
        ("emb", {"negatives": 3}, SCORED, "negatives"),
        ("emb", {"gradient_accumulation_steps": 4}, RANKED, "gradient_accumulation_steps"),
        ("rerank", {}, BARE, "mine_negatives"),
    ],
)
def test_settings_without_effect_are_told(
    kind: str, given: dict[str, Any], seen: RowsSeen, word: str
) -> None:
    asked = spec(kind, **given)
    # A job's spec comes back from the store with every field given.
    stored = type(asked).model_validate(asked.model_dump(mode="json"))
    for one in (asked, stored):
        (note,) = (*notes_before(one), *notes_of_loss(one, seen))
        assert f"`{word}`" in note


@pytest.mark.parametrize("kind", ["emb", "rerank"])
def test_a_plain_request_has_no_notes(kind: str) -> None:
    asked = spec(kind)
    assert (*notes_before(asked), *notes_of_loss(asked, RANKED)) == ()
