"""Vocabularies of results: which tokens they have, in which order, and how their tokenizers are written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aidocks.errors import CorruptCheckpoint, IncompatibleModels, InvalidSpec
from aidocks.merge.vocabulary import VocabularyPlan, WriteVocabulary, plan_vocabulary
from aidocks.models.tokenizer_files import choose_chat_template, read_tokenizer, write_tokenizer
from aidocks.plan import UnitContext
from aidocks.specs.merge_config import MergeConfig

TEXT = "Once upon a time there was a little girl named Lily."


@dataclass(frozen=True)
class Model:
    """A model of which nothing but its tokenizer matters."""

    field: str
    reference: str
    tensors: Mapping[str, Any]
    config: Mapping[str, Any]
    tokenizer: Path
    vocab_size: int | None


class Models:
    """Makes models with tokenizers that are variants of a real one."""

    def __init__(self, source: Path, directory: Path) -> None:
        self._source, self._directory = source, directory
        self.members: dict[str, Model] = {}

    def add(
        self, name: str, *added: str, moved: bool = False, without: tuple[str, ...] = (), spare: int = 0
    ) -> Path:
        directory = self._directory / name
        directory.mkdir()
        document = json.loads((self._source / "tokenizer.json").read_text())
        settings = json.loads((self._source / "tokenizer_config.json").read_text())
        model = document["model"]
        order = [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
        order = [token for token in order if token not in without]
        if moved:
            order = [*order[:3], *reversed(order[3:])]
        model["vocab"] = {token: number for number, token in enumerate(order)}
        model["merges"] = [m for m in model["merges"] if not set(without) & _tokens_of(m)]
        for content in added:
            special = content.startswith("<|")
            document["added_tokens"].append(
                {
                    "id": len(order),
                    "content": content,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": not special,
                    "special": special,
                }
            )
            order.append(content)
        (directory / "tokenizer.json").write_text(json.dumps(document))
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
        rows = len(order) + spare
        config = {
            "vocab_size": rows,
            "bos_token_id": 1,
            "eos_token_id": order.index(added[0]) if added else 2,
        }
        (directory / "config.json").write_text(json.dumps(config))
        tensors = {"model.embed_tokens.weight": SimpleNamespace(shape=(rows, 4))}
        self.members[name] = Model(
            f"models[{len(self.members)}].model", name, tensors, config, directory, rows
        )
        return directory

    def plan(self, *names: str, base: str | None = None, **fields: Any) -> VocabularyPlan | None:
        merge = MergeConfig.model_validate(
            {
                "merge_method": "linear",
                "base_model": base,
                "models": [{"model": name, "parameters": {"weight": 1}} for name in names],
                **fields,
            }
        )
        members = {reference: self.members[reference] for _, reference in merge.references()}
        return plan_vocabulary(merge, members)


def _tokens_of(merge: str | list[str]) -> set[str]:
    pair = merge.split(" ") if isinstance(merge, str) else merge
    return {*pair, "".join(pair)}


@pytest.fixture
def models(stories260k: Path, tmp_path: Path) -> Models:
    (tmp_path / "models").mkdir()
    return Models(stories260k, tmp_path / "models")


def made(plan: VocabularyPlan | None) -> VocabularyPlan:
    assert plan is not None
    return plan


def load(plan: VocabularyPlan, directory: Path, template: str | None = None) -> Any:
    from transformers import AutoTokenizer

    written = write_tokenizer(plan.files, directory, template)
    assert {file.path for file in written} == set(directory.iterdir())
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.get_vocab() == dict(plan.result.tokens)
    found = read_tokenizer(directory)
    assert found is not None
    assert found.tokens == plan.result.tokens
    return tokenizer


def test_without_a_policy_there_is_no_plan(models: Models) -> None:
    models.add("a")
    assert models.plan("a") is None


def test_a_union_has_the_base_s_numbers_and_the_others_tokens_behind(models: Models, tmp_path: Path) -> None:
    for name, added in (("a", ()), ("b", ("<|im_end|>", "wonder")), ("c", ("<|im_start|>", "wonder"))):
        models.add(name, *added, moved=name == "b")
    plan = made(models.plan("a", "b", "c", base="a", tokenizer_source="union"))
    base = read_tokenizer(models.members["a"].tokenizer)
    assert base is not None
    assert {token: plan.result.tokens[token] for token in base.tokens} == base.tokens
    further = sorted(plan.result.tokens.keys() - base.tokens.keys(), key=plan.result.tokens.__getitem__)
    assert further == ["<|im_end|>", "wonder", "<|im_start|>"]
    assert plan.size == len(base.tokens) + 3
    assert plan.changes
    tokenizer = load(plan, tmp_path / "result")
    from transformers import AutoTokenizer

    before = AutoTokenizer.from_pretrained(models.members["a"].tokenizer)
    assert tokenizer.encode(TEXT) == before.encode(TEXT)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode(f"{TEXT}<|im_start|>"))
    assert tokens[-1] == "<|im_start|>"
    assert tokenizer.decode(tokenizer.encode(f"{TEXT}<|im_start|>"), skip_special_tokens=True).strip() == TEXT


def test_plain_tokens_of_a_model_come_before_those_that_models_list(models: Models, tmp_path: Path) -> None:
    models.add("small", "<|im_end|>", without=("▁the", "▁and"))
    models.add("large")
    plan = made(models.plan("small", "large", tokenizer_source="union"))
    assert [token.content for token in plan.files.added] == ["▁the", "▁and"]
    assert plan.result.tokens["▁the"] in load(plan, tmp_path / "result").encode(" the")


def test_the_tokens_of_one_model(models: Models, tmp_path: Path) -> None:
    models.add("a")
    directory = models.add("b", "<|im_end|>", moved=True)
    plan = made(models.plan("a", "b", base="a", tokenizer_source="b"))
    assert plan.files.is_copy
    assert plan.tokenizer == directory
    assert plan.special_ids == {"eos_token_id": plan.result.tokens["<|im_end|>"]}
    written = write_tokenizer(plan.files, tmp_path / "result")
    for file in written:
        assert file.path.read_bytes() == (directory / file.path.name).read_bytes()
    outside = made(models.plan("a", base="a", tokenizer={"source": "b"}))
    assert outside.result.tokens == plan.result.tokens
    assert [model.is_merged for model in outside.request.models] == [True, False]


def test_nothing_changes_where_all_have_the_same_tokens(models: Models) -> None:
    models.add("a")
    models.add("b")
    assert not made(models.plan("a", "b", tokenizer_source="union")).changes
    assert made(models.plan("a", "b", tokenizer={"pad_to_multiple_of": 1000})).changes
    assert made(models.plan("a", "b", tokenizer={"tokens": {"</s>": {"source": "a", "force": True}}})).changes
    models.add("spare", spare=3)
    assert made(models.plan("a", "spare", base="a", tokenizer_source="base")).changes


def test_padding_and_asked_tokens(models: Models, tmp_path: Path) -> None:
    models.add("a")
    plan = made(
        models.plan(
            "a", tokenizer={"tokens": {"<|new|>": {"source": {"kind": "zero"}}}, "pad_to_multiple_of": 64}
        )
    )
    count = len(plan.result.tokens)
    assert plan.result.tokens["<|new|>"] == count - 1
    assert plan.size == -(-count // 64) * 64
    assert plan.result.tokens["<|new|>"] in load(plan, tmp_path / "result").encode("a <|new|>")


def test_tokens_without_rows_are_left_out(models: Models, tmp_path: Path) -> None:
    models.add("a", "one", "two", spare=-1)
    plan = made(models.plan("a", tokenizer_source="base"))
    assert plan.files.rows == models.members["a"].vocab_size
    assert "one" in plan.result.tokens
    assert "two" not in plan.result.tokens
    load(plan, tmp_path / "result")
    models.add("b", spare=-2)
    cut = made(models.plan("b", tokenizer_source="base"))
    assert len(cut.result.tokens) == models.members["b"].vocab_size
    load(cut, tmp_path / "cut")


def test_a_result_that_is_not_written_yet_can_be_merged(models: Models, tmp_path: Path) -> None:
    models.add("a")
    models.add("b", "wonder")
    models.add("c", "<|im_start|>")
    first = made(models.plan("a", "b", tokenizer_source="union"))
    later = tmp_path / "later"
    members = {
        "first": Model("models[0].model", "first", {}, {}, later, first.size),
        "c": models.members["c"],
    }
    merge = MergeConfig.model_validate(
        {"merge_method": "linear", "models": [{"model": n} for n in members], "tokenizer_source": "union"}
    )
    second = made(plan_vocabulary(merge, members, known={later: first.result}))
    assert {"wonder", "<|im_start|>"} <= second.result.tokens.keys()
    assert second.tokenizer == later
    write_tokenizer(first.files, later)
    load(second, tmp_path / "second")
    unit = WriteVocabulary.model_validate_json(second.unit(tmp_path / "rows").model_dump_json())
    assert unit.run(UnitContext(tmp_path)).files[0].path.is_file()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"<|no|>": {"source": "a"}}, "has no token '<|no|>'"),
        (
            {"x": {"source": {"kind": "model_token", "model": "a", "token": "<|no|>"}}},
            "has no token '<|no|>'",
        ),
        ({"x": {"source": {"kind": "model_token", "model": "a", "token_id": 9999}}}, "has no row 9999"),
    ],
)
def test_rows_that_are_not_there_are_refused(models: Models, tokens: dict[str, Any], message: str) -> None:
    models.add("a")
    with pytest.raises(InvalidSpec) as caught:
        models.plan("a", tokenizer={"tokens": tokens})
    assert message in str(caught.value)
    assert str(caught.value.field).startswith("tokenizer.tokens.")


def test_models_without_a_tokenizer(models: Models) -> None:
    models.add("a")
    directory = models.add("b")
    (directory / "tokenizer.json").unlink()
    plan = made(models.plan("a", "b", tokenizer_source="union"))
    assert "'b' has no tokenizer" in plan.notes[0]
    assert not plan.changes
    with pytest.raises(IncompatibleModels, match="'b' has no tokenizer"):
        models.plan("b", "a", tokenizer_source="union")
    (directory / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(IncompatibleModels, match=r"only as tokenizer\.model"):
        models.plan("a", "b", tokenizer_source="union")
    (directory / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(CorruptCheckpoint, match=r"tokenizer\.json of b cannot be read"):
        models.plan("a", "b", tokenizer_source="union")


def test_settings_list_the_added_tokens_too_and_older_forms_stay_behind(
    models: Models, tmp_path: Path
) -> None:
    directory = models.add("a")
    models.add("b", "<|im_start|>")
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings |= {
        "added_tokens_decoder": {"0": {"content": "<unk>", "special": True}},
        "chat_template": "{{ 1 }}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "tokenizer.model").write_bytes(b"sentencepiece")
    plan = made(models.plan("a", "b", base="a", tokenizer_source="union"))
    write_tokenizer(plan.files, tmp_path / "result", "{{ 2 }}")
    written = json.loads((tmp_path / "result" / "tokenizer_config.json").read_text())
    number = str(plan.result.tokens["<|im_start|>"])
    assert written["added_tokens_decoder"][number]["content"] == "<|im_start|>"
    assert "chat_template" not in written
    assert (tmp_path / "result" / "chat_template.jinja").read_text() == "{{ 2 }}"
    assert not (tmp_path / "result" / "tokenizer.model").exists()


def test_chat_templates(models: Models) -> None:
    a, b, c = (models.add(name) for name in "abc")
    assert choose_chat_template(None, [a]) is None
    assert choose_chat_template("auto", [a, b, c]) is None
    (a / "chat_template.jinja").write_text("{{ 1 }}")
    (b / "chat_template.jinja").write_text("{{ 2 }}")
    settings = json.loads((c / "tokenizer_config.json").read_text())
    named = [{"name": "tools", "template": "{{ 3 }}"}, {"name": "default", "template": "{{ 2 }}\n"}]
    (c / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": named}))
    assert choose_chat_template("auto", [a, b, c]) == "{{ 2 }}"
    assert choose_chat_template("auto", [a, b]) == "{{ 1 }}"
    assert "<|im_start|>" in (choose_chat_template("chatml", [a]) or "")
    assert "[|assistant|]" in (choose_chat_template("exaone", [a]) or "")
    assert choose_chat_template("{{ messages }}", [a]) == "{{ messages }}"
    with pytest.raises(InvalidSpec, match="no chat template called"):
        choose_chat_template("chatlm", [a])
    shutil.rmtree(a)
