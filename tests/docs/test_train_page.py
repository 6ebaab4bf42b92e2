"""The tables of docs/train-llm.md are those of the code: fields, forms of data, methods, adapters, rewards."""

from __future__ import annotations

import json
import re
from typing import Any, get_args

import pytest

from aidocks.specs.train_data import DataFormat, Role
from aidocks.specs.train_hyper import learning_rate
from aidocks.specs.train_llm import LLMTrainSpec
from aidocks.specs.train_llm_result import LLMTrainResult
from aidocks.specs.train_rewriting import METHOD_WORDS
from aidocks.training.data.formats import detect
from aidocks.training.data.forms import METHOD_FORMS
from aidocks.training.run import AdapterKind, Method, RewardRule
from tests.support import documentation
from tests.support.documentation import ROOT, check_defaults, table_rows
from tests.support.documentation import names_in as names

PAGE = (ROOT / "docs" / "train-llm.md").read_text()
SPEC: dict[str, Any] = {"base_model": "base", "dataset": "rows", "rewards": []}
REWARD = {"rewards": [{"kind": "match"}]}


def section(title: str) -> str:
    return documentation.section(PAGE, title)


def rows(title: str) -> list[list[str]]:
    return table_rows(section(title))


def test_every_field_has_its_row() -> None:
    told = [name for first, *_ in rows("Fields") if first != "`field`" for name in names(first)]
    others = {"load_in_4bit", "assistant_only_loss"}  # told beside the field that they stand for
    assert sorted(told) == sorted(set(LLMTrainSpec.model_fields) - others)
    assert all(f"`{name}`" in section("Fields") for name in others)


def test_defaults_are_those_of_the_request() -> None:
    check_defaults(section("Fields"), LLMTrainSpec.model_fields, {"merge_adapter": "where it can be merged"})


def forms() -> dict[str, tuple[dict[str, Any], set[str]]]:
    return {
        names(name)[0]: (json.loads(row.strip("`")), set(methods.split(", ")))
        for name, row, methods in rows("Data")
        if row.startswith("`{")
    }


def test_every_form_has_its_row_and_its_methods() -> None:
    assert set(forms()) == set(get_args(DataFormat)) - {"auto"}
    for name, (_, methods) in forms().items():
        assert methods == {method for method, known in METHOD_FORMS.items() if name in known}, name


@pytest.mark.parametrize("name", sorted(set(get_args(DataFormat)) - {"auto"}))
def test_the_row_of_a_form_is_detected(name: str) -> None:
    row, methods = forms()[name]
    for method in get_args(Method):
        if method in methods:
            assert detect([row], method).format == name


def test_roles_are_listed() -> None:
    listed = re.search(r"Roles are (.*?);", section("Data"), re.S)
    assert listed is not None
    assert set(names(listed[1])) == set(get_args(Role))


def test_methods_and_their_rates() -> None:
    told = {names(name)[0]: (float(low), float(full)) for name, _, low, full, _ in rows("Methods")}
    assert told == {
        method: (learning_rate(method, "lora"), learning_rate(method, "full")) for method in get_args(Method)
    }


def test_other_words_for_methods_are_listed() -> None:
    text = section("Methods")
    assert all(f"`{word}`" in text for word in METHOD_WORDS), METHOD_WORDS


def test_adapters() -> None:
    told = {names(name)[0]: result for name, _, result in rows("Adapters")}
    assert set(told) == set(get_args(AdapterKind))
    for kind, result in told.items():
        layers = {"layers": ["mlp"]} if kind == "layers" else {}
        spec = LLMTrainSpec.model_validate(SPEC | layers | {"adapter": kind})
        assert spec.makes_adapter == (result == "adapter"), kind


def test_reward_kinds() -> None:
    kinds = get_args(RewardRule.model_fields["kind"].annotation)
    assert [names(kind)[0] for kind, *_ in rows("Rewards")] == list(kinds)


def test_fields_of_the_result_exist() -> None:
    table = section("From Python and over HTTP").partition("| field of the result |")[2]
    told = [name for line in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in names(line)]
    assert told
    assert set(told) <= set(LLMTrainResult.model_fields)


def test_online_methods_need_rewards() -> None:
    spec = LLMTrainSpec.model_validate(SPEC | REWARD | {"method": "ppo"})
    assert spec.method == "rloo"
