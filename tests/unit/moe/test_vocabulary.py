"""Whose tokens the result knows: experts that extend the base's vocabulary, fill-up rows, and conflicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from aidocks.checkpoints.reader import Checkpoint
from aidocks.errors import IncompatibleModels, InvalidSpec
from aidocks.moe.dense import Member
from aidocks.moe.vocabulary import (
    Vocabulary,
    check_vocabulary,
    choose_tokenizer,
    find_extension,
    further_tokens,
)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def add_tokens(model: Path, *tokens: str) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    tokenizer.save_pretrained(model)
    return model


@pytest.fixture
def extended(tmp_path: Path, tiny_model: Any) -> Any:
    """``extended(name, *tokens, **overrides)``: a model with further tokens, 512 rows of the base plus those."""

    def make(name: str, *tokens: str, **overrides: Any) -> Path:
        rows = overrides.pop("vocab_size", 512 + len(tokens))
        return add_tokens(tiny_model(tmp_path / name, seed=len(name), vocab_size=rows, **overrides), *tokens)

    return make


def stored(path: Path, name: str) -> torch.Tensor:
    return Checkpoint(path).tensor(name)


def test_further_tokens_of_an_expert_are_dropped_and_that_is_said(
    tmp_path: Path, tiny_model: Any, extended: Any, assemble: Any
) -> None:
    base, chat = tiny_model(tmp_path / "base"), extended("chat", "<|im_start|>", "<|im_end|>")
    moe = assemble(base, [base, chat, chat])
    assert stored(moe.path, EMBEDDING).equal(stored(base, EMBEDDING))
    assert (moe.path / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    (note,) = moe.target.notes
    assert str(chat) in note
    assert "2 tokens" in note
    assert "<|im_start|>" in note


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("source", ["union", "expert"])
def test_an_expert_s_tokenizer_comes_with_its_rows(
    source: str, tied: bool, tmp_path: Path, tiny_model: Any, extended: Any, assemble: Any
) -> None:
    base = tiny_model(tmp_path / "base", tie_word_embeddings=tied)
    chat = extended("chat", "<|im_start|>", "<|im_end|>", tie_word_embeddings=tied, eos_token_id=513)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "temperature": 0.7}))
    (chat / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 513], "temperature": 0.1}))
    moe = assemble(base, [base, chat], tokenizer_source=str(chat) if source == "expert" else source)
    for name in [EMBEDDING] if tied else [EMBEDDING, HEAD]:
        assert stored(moe.path, name).equal(torch.cat([stored(base, name), stored(chat, name)[512:]]))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (moe.path / name).read_bytes() == (chat / name).read_bytes()
    model, info = AutoModelForCausalLM.from_pretrained(moe.path, output_loading_info=True)
    assert not any(info.values())
    assert (model.config.vocab_size, model.config.eos_token_id) == (514, 513)
    assert (model.generation_config.eos_token_id, model.generation_config.temperature) == ([1, 513], 0.7)
    ids = AutoTokenizer.from_pretrained(moe.path)("<|im_start|>the<|im_end|>", return_tensors="pt").input_ids
    assert (ids[0, 0], ids[0, -1]) == (512, 513)
    assert model(input_ids=ids).logits.shape[-1] == 514
    assert not moe.target.notes


def test_a_tied_expert_gives_its_embedding_to_an_untied_head(
    tmp_path: Path, tiny_model: Any, extended: Any, assemble: Any
) -> None:
    base, chat = tiny_model(tmp_path / "base"), extended("chat", "<|x|>", tie_word_embeddings=True)
    moe = assemble(base, [base, chat], tokenizer_source="union")
    assert stored(moe.path, HEAD)[512:].equal(stored(chat, EMBEDDING)[512:])


def test_an_untied_expert_has_rows_for_which_a_tied_base_has_no_tensor(
    tmp_path: Path, tiny_model: Any, extended: Any, plan: Any
) -> None:
    base, chat = tiny_model(tmp_path / "base", tie_word_embeddings=True), extended("chat", "<|x|>")
    with pytest.raises(IncompatibleModels, match=r"lm_head\.weight") as caught:
        plan(base, [base, chat], tokenizer_source="union")
    assert caught.value.field == "experts[1].source_model"
    assert plan(base, [base, chat]).config["vocab_size"] == 512


def test_rows_without_tokens_give_way_to_tokens(
    tmp_path: Path, tiny_model: Any, extended: Any, assemble: Any
) -> None:
    base = tiny_model(tmp_path / "base", vocab_size=576)
    chat = extended("chat", "<|x|>", vocab_size=520)
    moe = assemble(base, [base, chat], tokenizer_source="union")
    expected = torch.cat([stored(base, EMBEDDING)[:512], stored(chat, EMBEDDING)[512:]])
    assert stored(moe.path, EMBEDDING).equal(expected)
    assert moe.target.config["vocab_size"] == 520
    AutoModelForCausalLM.from_pretrained(moe.path)
    # Where no token is further, the base's rows stay as they are.
    same = tiny_model(tmp_path / "same", seed=1, vocab_size=520)
    assert assemble(base, [base, same], tokenizer_source="union").target.config["vocab_size"] == 576


def test_a_base_that_knows_more_than_its_expert(
    tmp_path: Path, tiny_model: Any, extended: Any, plan: Any
) -> None:
    base, plain = extended("chat", "<|x|>"), tiny_model(tmp_path / "plain")
    for source in ("base", "union", str(base)):
        target = plan(base, [base, plain], tokenizer_source=source)
        assert (target.tokenizer, target.config["vocab_size"], target.notes) == (base, 513, ())
    with pytest.raises(InvalidSpec, match=r"does not know the base's token '<\|x\|>'") as caught:
        plan(base, [base, plain], tokenizer_source=str(plain))
    assert caught.value.field == "tokenizer_source"


def test_two_experts_that_extend_the_base_in_different_ways(
    tmp_path: Path, tiny_model: Any, extended: Any, plan: Any
) -> None:
    base = tiny_model(tmp_path / "base")
    one, other = extended("one", "<|x|>"), extended("other", "<|y|>", "<|x|>")
    assert len(plan(base, [one, other]).notes) == 2
    (note,) = plan(base, [one, other], tokenizer_source=str(one)).notes
    assert "'<|y|>'" in note
    with pytest.raises(IncompatibleModels) as caught:
        plan(base, [one, other], tokenizer_source="union")
    assert caught.value.field == "tokenizer_source"
    for word in ["'<|x|>'", "number 513", "number 512", str(one), str(other)]:
        assert word in str(caught.value)


def test_a_token_without_a_row(tmp_path: Path, tiny_model: Any, extended: Any, plan: Any) -> None:
    base, chat = tiny_model(tmp_path / "base"), extended("chat", "<|x|>", "<|y|>", vocab_size=513)
    with pytest.raises(IncompatibleModels) as caught:
        plan(base, [base, chat], tokenizer_source="union")
    for word in ["'<|y|>'", "number 513", EMBEDDING, "513 rows"]:
        assert word in str(caught.value)


def test_an_embedding_of_another_shape(tmp_path: Path, tiny_model: Any, extended: Any, plan: Any) -> None:
    base, chat = tiny_model(tmp_path / "base"), extended("chat", "<|x|>")
    config = chat / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 640}))
    with pytest.raises(
        IncompatibleModels, match=r"model\.embed_tokens\.weight .*\[513, 64\], not \[640, 64\]"
    ):
        plan(base, [base, chat], tokenizer_source="union")


def test_a_tokenizer_of_nobody(tmp_path: Path, tiny_model: Any, plan: Any) -> None:
    base = tiny_model(tmp_path / "base")
    with pytest.raises(InvalidSpec) as caught:
        plan(base, [base, base], tokenizer_source="elsewhere")
    assert (caught.value.field, caught.value.value) == ("tokenizer_source", "elsewhere")
    assert str(base) in str(caught.value.hint)


def test_a_shared_expert_s_tokenizer(tmp_path: Path, tiny_model: Any, extended: Any, plan: Any) -> None:
    base, chat = tiny_model(tmp_path / "base"), extended("chat", "<|x|>")
    request = {"architecture": "qwen_moe", "shared_experts": [chat], "tokenizer_source": str(chat)}
    target = plan(base, [base, base], **request)
    assert (target.tokenizer, target.config["vocab_size"]) == (chat, 513)


# What follows needs no models: words and numbers are enough.


def vocabulary(tokens: dict[str, int] | None, rows: int = 0, slow: bytes | None = None) -> Vocabulary:
    member = Member("experts[0].source_model", "model", None)  # type: ignore[arg-type]
    rows = rows or (max(tokens.values(), default=-1) + 1 if tokens else 0)
    return Vocabulary(member, rows, tokens, slow)


SIX = {token: number for number, token in enumerate("abcdef")}


@given(
    st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 9), min_size=1).filter(
        lambda tokens: len(set(tokens.values())) == len(tokens)
    )
)
def test_models_fit_exactly_when_one_vocabulary_extends_the_other(tokens: dict[str, int]) -> None:
    def extends(more: dict[str, int], fewer: dict[str, int]) -> bool:
        further = [number for token, number in more.items() if token not in fewer]
        return fewer.items() <= more.items() and all(number > max(fewer.values()) for number in further)

    fits = extends(tokens, SIX) or extends(SIX, tokens)
    if fits:
        check_vocabulary(vocabulary(tokens), vocabulary(SIX))
    else:
        with pytest.raises(IncompatibleModels, match=r"the token '[a-h]' is (number|unknown)"):
            check_vocabulary(vocabulary(tokens), vocabulary(SIX))


@given(st.integers(0, 4), st.integers(0, 4), st.integers(0, 3), st.integers(0, 3))
def test_every_token_has_the_row_of_the_model_that_knows_it(
    further: int, gap: int, base_fill: int, fill: int
) -> None:
    more = SIX | {f"new{i}": 6 + gap + i for i in range(further)}
    base = vocabulary(SIX, rows=6 + base_fill)
    chosen = vocabulary(more, rows=max(more.values()) + 1 + fill)
    extension = find_extension(base, chosen)
    if not further:
        assert extension is None
        return
    assert extension is not None
    assert extension.rows == chosen.rows
    assert all(number < extension.first for number in SIX.values())
    assert all(extension.first <= more[token] < extension.rows for token in further_tokens(chosen, base))
    assert extension.first <= base.rows, "rows before the first are the base's, which must have them"


def test_models_without_tokenizer_json() -> None:
    check_vocabulary(vocabulary(None, 32, b"pieces"), vocabulary(None, 32, b"pieces"))
    check_vocabulary(vocabulary(None, 6), vocabulary(SIX))
    with pytest.raises(IncompatibleModels, match=r"tokenizer\.model files differ"):
        check_vocabulary(vocabulary(None, 32, b"pieces"), vocabulary(None, 32, b"others"))
    with pytest.raises(IncompatibleModels, match=r"vocab_size is 7 .* but 6 in the base"):
        check_vocabulary(vocabulary(None, 7), vocabulary(SIX))
    slow = vocabulary(None, 32, b"pieces")
    assert choose_tokenizer("union", slow, [slow]) is slow
