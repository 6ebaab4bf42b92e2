"""Results whose vocabulary is made of several, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from aidocks.settings import Settings
from tests.support.merge_jobs import Driver, add_models, change, copy_model, make_family, tensors

ROWS = 512
TEMPLATE = "{% for message in messages %}<|user|>{{ message.content }}{% endfor %}"


@pytest.fixture
def place(settings: Settings, tmp_path: Path) -> Settings:
    """`base`; `chat` with the tokens `<|user|>` and `<|end|>`, and `code` with `<|end|>` and `<|fill|>`, too."""
    sources = tmp_path / "sources"
    make_family(sources, "base", "chat", "code", tie_word_embeddings=False)
    for name, *more in (("chat", "<|user|>", "<|end|>"), ("code", "<|end|>", "<|fill|>")):
        grow(sources / name, *more)
    add_models(settings, *(sources / name for name in ("base", "chat", "code")))
    return settings


def grow(model: Path, *added: str) -> None:
    from transformers import AutoTokenizer

    reader = AutoTokenizer.from_pretrained(model)
    reader.add_tokens(list(added), special_tokens=True)
    reader.save_pretrained(model)
    generator = torch.Generator().manual_seed(len(model.name))

    def more(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if "embed_tokens" not in name and "lm_head" not in name:
            return tensor
        return torch.cat([tensor, torch.randn(len(added), tensor.shape[1], generator=generator)])

    change(model, more, vocab_size=ROWS + len(added), eos_token_id=ROWS + added.index("<|end|>"))


def load(result: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(str(result.path))
    network, reader = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    ids = reader("The licensor <|user|> grants <|end|><|fill|>", return_tensors="pt")
    with torch.inference_mode():
        assert torch.isfinite(network(**ids).logits).all()
    assert reader.decode(ids["input_ids"][0]) == "The licensor <|user|> grants <|end|><|fill|>"
    return network, reader


UNION = """
merge_method: linear
base_model: base
models: [{model: base}, {model: chat}, {model: code}]
parameters: {weight: 1}
name: result
tokenizer_source: union
"""


def test_the_tokens_of_all(place: Settings) -> None:
    result = Driver(place).run(UNION, evaluate=True, chunks=2, seqlen=16)
    _, reader = load(result)
    places = dict(zip(["<|user|>", "<|end|>", "<|fill|>"], (512, 513, 514), strict=True))
    assert {token: reader.convert_tokens_to_ids(token) for token in places} == places
    base, chat, code = (tensors(place.models_dir / name) for name in ("base", "chat", "code"))
    made = tensors(Path(str(result.path)))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = made[name]
        assert rows.shape == (515, 32)
        # Those who have no row for a token take that of the only one that has it, or the mean of those.
        assert torch.allclose(rows[512], chat[name][512])
        assert torch.allclose(rows[514], code[name][513])
        assert torch.allclose(rows[513], (chat[name][513] + code[name][512]) / 2, atol=1e-6)
        known = (base[name][:ROWS] + chat[name][:ROWS] + code[name][:ROWS]) / 3
        assert torch.allclose(rows[:ROWS], known, atol=1e-6)
    assert [model.model for model in result.perplexities] == ["base", "models[1]", "models[2]", "merge"]
    assert any("each model's own tokens" in note for note in result.notes)
    assert json.loads((Path(str(result.path)) / "config.json").read_text())["vocab_size"] == 515


def test_what_is_said_of_single_tokens(place: Settings) -> None:
    text = (
        UNION.replace("tokenizer_source: union", "")
        + """
tokenizer:
  source: union
  pad_to_multiple_of: 64
  tokens:
    "<|end|>": {source: chat, force: true}
    "<|fill|>": {source: {kind: zero}, force: true}
    "<|new|>": {source: {kind: model_token, model: base, token: "</s>"}}
chat_template: "TEMPLATE"
    """.replace("TEMPLATE", TEMPLATE)
    )
    result = Driver(place).run(text)
    network, reader = load(result)
    base, chat = (tensors(place.models_dir / name) for name in ("base", "chat"))
    assert reader.convert_tokens_to_ids("<|new|>") == 515
    assert network.config.vocab_size == 576
    made = tensors(Path(str(result.path)))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = made[name]
        assert rows.shape == (576, 32)
        assert torch.allclose(rows[513], chat[name][513])
        assert torch.equal(rows[514], torch.zeros(32))
        assert torch.allclose(rows[515], base[name][1])
        # Beyond the last token each model has the mean of its rows; all rows of padding are equal.
        assert len(torch.unique(rows[516:], dim=0)) == 1
        assert torch.isfinite(rows[516:]).all()
    said = reader.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert said == "<|user|>hello"
    assert reader.apply_chat_template([{"role": "user", "content": "a"}])["input_ids"][0] == 512


def test_the_tokens_of_a_model_that_is_not_merged(place: Settings, tmp_path: Path) -> None:
    """Its numbers of special tokens come along."""
    text = """
    merge_method: linear
    models: [{model: base}, {model: code}]
    parameters: {weight: 0.5}
    name: result
    tokenizer_source: chat
    """
    result = Driver(place).run(text)
    path = Path(str(result.path))
    assert tensors(path)["lm_head.weight"].shape == (514, 32)
    assert (path / "tokenizer.json").read_bytes() == (
        place.models_dir / "chat" / "tokenizer.json"
    ).read_bytes()
    assert json.loads((path / "config.json").read_text())["eos_token_id"] == 513


def test_chat_templates_by_vote(place: Settings) -> None:
    for name, template in (("base", "{{ 1 }}"), ("chat", TEMPLATE), ("code", TEMPLATE)):
        (place.models_dir / name / "chat_template.jinja").write_text(template)
    result = Driver(place).run(UNION, chat_template="auto")
    assert (Path(str(result.path)) / "chat_template.jinja").read_text() == TEMPLATE


def test_a_copy_of_the_vocabulary_moves_nothing(place: Settings, tmp_path: Path) -> None:
    """Where all models have the same tokens, a policy changes nothing, not even a byte."""
    other = copy_model(tmp_path / "sources" / "base", tmp_path / "other")
    change(other, lambda _, tensor: tensor * 1.5)
    add_models(place, other)
    text = "{merge_method: linear, models: [{model: base}, {model: other}], parameters: {weight: 0.5}}"
    drivers = [Driver(place, job_id=f"job-00000000000-0000000{number}") for number in range(2)]
    plain = drivers[0].run(text, name="plain")
    union = drivers[1].run(text, name="union", tokenizer_source="union")
    assert "vocabulary" not in drivers[1].stages
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (Path(str(plain.path)) / name).read_bytes() == (Path(str(union.path)) / name).read_bytes()
