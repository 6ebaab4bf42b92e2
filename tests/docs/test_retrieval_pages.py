"""The tables of the pages of embedding models, rerankers and hard negatives are those of the code."""

from __future__ import annotations

import json
import re
from typing import Any, get_args

import pytest

from aidocks.errors import InvalidSpec
from aidocks.retrieval.checks import RowsSeen, require_loss
from aidocks.retrieval.data.detect import detect
from aidocks.retrieval.hyper import batches, choose_loss, learning_rate
from aidocks.specs.mine_negatives import MineNegativesResult, MineNegativesSpec
from aidocks.specs.train_emb import EmbeddingTrainSpec
from aidocks.specs.train_rerank import RerankerTrainSpec
from aidocks.specs.train_retrieval import (
    NegativesFields,
    RetrievalFormat,
    RetrievalRole,
    RetrievalTrainSpec,
)
from aidocks.specs.train_retrieval_result import RetrieverTrainResult
from aidocks.training.retriever import EmbeddingLoss, RerankerLoss
from tests.support.documentation import ROOT, check_defaults, names_in, section, table_rows

EMB, RERANK, NEGATIVES = (
    (ROOT / "docs" / f"train-{name}.md").read_text() for name in ("emb", "rerank", "negatives")
)
LOSSES = {
    "emb": (EMB, EmbeddingTrainSpec, EmbeddingLoss),
    "rerank": (RERANK, RerankerTrainSpec, RerankerLoss),
}
BODY = {"base_model": "base", "dataset": "rows"}


def told_fields(page: str) -> list[str]:
    return [name for first, *_ in table_rows(section(page, "Fields")) for name in names_in(first)]


def test_every_field_is_told_once() -> None:
    assert sorted(told_fields(EMB)) == sorted(EmbeddingTrainSpec.model_fields)
    assert sorted(told_fields(NEGATIVES)) == sorted(MineNegativesSpec.model_fields)
    # What is the same as of embedding models is told there; what these alone have is named.
    own = {"loss", "negatives", *RerankerTrainSpec.model_fields} - set(RetrievalTrainSpec.model_fields)
    assert sorted(told_fields(RERANK)) == sorted(own)
    others = names_in(section(RERANK, "Fields").partition("`max_length`")[0])
    assert set(others) == set(EmbeddingTrainSpec.model_fields) - set(RerankerTrainSpec.model_fields)


def test_settings_within_a_training_are_listed() -> None:
    listed = re.search(r"^In a training the settings .*? are (.*?)\.$", NEGATIVES, re.MULTILINE | re.S)
    assert listed is not None
    assert set(names_in(listed[1])) == set(NegativesFields.model_fields)


@pytest.mark.parametrize(
    ("page", "spec"), [(EMB, EmbeddingTrainSpec), (RERANK, RerankerTrainSpec), (NEGATIVES, MineNegativesSpec)]
)
def test_defaults_are_those_of_the_requests(page: str, spec: Any) -> None:
    check_defaults(section(page, "Fields"), spec.model_fields)


def test_rates_and_batches_are_those_of_the_code() -> None:
    rows = {names_in(first)[0]: cells for first, *cells in table_rows(section(EMB, "Fields"))}
    low, full, *small = (float(word) for word in re.findall(r"\de-\d", " ".join(rows["learning_rate"])))
    assert [low, full] == [learning_rate("lora", 10**8), learning_rate("full", 10**8)]
    assert small == [learning_rate("lora", 10**6), learning_rate("full", 10**6)]
    spec = EmbeddingTrainSpec.model_validate(BODY)
    assert rows["per_device_train_batch_size"][0] == (
        f"{batches(spec, 'mnrl')[0]}, `cached_mnrl` {batches(spec, 'cached_mnrl')[0]}"
    )
    reranking = RerankerTrainSpec.model_validate(BODY)
    assert (batches(reranking, "lambda")[0], batches(reranking, "bce")[0]) == (8, 32)
    assert "the default batch is 8 queries" in RERANK


def forms() -> dict[str, dict[str, Any]]:
    rows = table_rows(section(EMB, "Data"))
    return {names_in(name)[0]: json.loads(row.strip("`")) for name, row, _ in rows if row.startswith("`{")}


def test_every_form_has_its_row() -> None:
    assert set(forms()) == set(get_args(RetrievalFormat)) - {"auto", "beir"}
    assert "`beir`" in section(EMB, "Data")
    for name, row in forms().items():
        assert detect([row]).format == name


def test_roles_are_listed() -> None:
    listed = re.search(r"Roles are\s(.*?)\.\sOne map", section(EMB, "Data"), re.S)
    assert listed is not None
    assert set(names_in(listed[1])) == set(get_args(RetrievalRole))


@pytest.mark.parametrize("page", LOSSES)
def test_every_loss_is_told_with_what_it_needs(page: str) -> None:
    text, spec_type, losses = LOSSES[page]
    rows = {
        name: needs for first, needs, _ in table_rows(section(text, "Losses")) for name in names_in(first)
    }
    assert set(rows) == set(get_args(losses))
    for loss, needs in rows.items():
        asked = spec_type.model_validate(BODY | {"loss": loss})
        taught = spec_type.model_validate(
            BODY | {"loss": loss, "distill_from": "t"} if "reranker" in needs else BODY
        )
        able = {
            "scores": (asked, RowsSeen("scored", negatives=False, scored=False)),
            "rankings": (asked, RowsSeen("ranking", negatives=False, scored=False)),
            "a reranker": (taught, RowsSeen("ranking", negatives=False, scored=False)),
            "negatives": (asked, RowsSeen("ranking", negatives=True, scored=False)),
        }
        assert _learns(*able["scores"]) == ("scores" in needs), loss
        assert _learns(*able["rankings"]) == (needs in ("pairs", "rankings", "rankings or scores")), loss
        if "reranker" in needs:
            assert _learns(*able["a reranker"]) == ("negatives" not in needs), loss
            assert not _learns(*able["negatives"]), loss
        elif "negatives" in needs:
            assert _learns(*able["negatives"]), loss


def _learns(spec: Any, seen: RowsSeen) -> bool:
    try:
        require_loss(spec, seen)
    except InvalidSpec:
        return False
    return True


@pytest.mark.parametrize("page", LOSSES)
def test_what_auto_is(page: str) -> None:
    text, spec_type, _ = LOSSES[page]
    told = {
        what.strip("`"): names_in(first)[0]
        for first, _, learns in table_rows(section(text, "Losses"))
        for what in re.findall(r"what `auto` is (?:for|with) (rankings|scored pairs|`distill_from`)", learns)
    }
    plain = spec_type.model_validate(BODY)
    assert told == {
        "rankings": choose_loss(plain, "ranking"),
        "scored pairs": choose_loss(plain, "scored"),
        "distill_from": choose_loss(spec_type.model_validate(BODY | {"distill_from": "t"}), "ranking"),
    }


@pytest.mark.parametrize(
    ("text", "result"),
    [
        (section(EMB, "From Python and over HTTP"), RetrieverTrainResult),
        (section(NEGATIVES, "What comes out"), MineNegativesResult),
    ],
)
def test_fields_of_the_results_exist(text: str, result: Any) -> None:
    table = text.partition("| field of the result |")[2]
    told = [name for first, *_ in table_rows(table) for name in names_in(first)]
    assert told
    assert set(told) <= set(result.model_fields)
