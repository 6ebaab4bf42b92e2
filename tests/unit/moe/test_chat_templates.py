"""Chat templates: rendered by a real tokenizer of the result, or refused before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from aidocks.errors import InvalidSpec
from aidocks.models.chat_templates import TEMPLATES

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A model."},
    {"role": "user", "content": " Why? "},
]
RENDERED = {
    "alpaca": (
        "Be brief.\n\n### Instruction:\nWho are you?\n\n### Response:\nA model.</s>\n\n### Instruction:\n Why? \n\n",
        "### Response:\n",
    ),
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n"
        "<|im_start|>assistant\nA model.<|im_end|>\n<|im_start|>user\n Why? <|im_end|>\n",
        "<|im_start|>assistant\n",
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWho are you?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA model.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "mistral": ("<s>[INST] Be brief.\n\nWho are you? [/INST] A model.</s>[INST]  Why?  [/INST]", ""),
}


def test_every_template_is_tested() -> None:
    assert RENDERED.keys() == TEMPLATES.keys()


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_by_name_renders_a_chat(name: str, tmp_path: Path, tiny_model: Any, assemble: Any) -> None:
    base = tiny_model(tmp_path / "base")
    settings = base / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": "the base's own"}))
    (base / "chat_template.json").write_text('{"chat_template": "an older form"}')
    moe = assemble(base, [base, base], chat_template=name)
    tokenizer = AutoTokenizer.from_pretrained(moe.path)
    chat, prompt = RENDERED[name]
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == chat
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == chat + prompt
    assert (moe.path / "chat_template.jinja").read_text() == TEMPLATES[name].text
    assert "chat_template" not in json.loads((moe.path / "tokenizer_config.json").read_text())
    assert not (moe.path / "chat_template.json").exists()


@pytest.mark.parametrize("name", ["alpaca", "mistral"])
def test_a_role_that_a_template_does_not_know(
    name: str, tmp_path: Path, tiny_model: Any, assemble: Any
) -> None:
    base = tiny_model(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(assemble(base, [base, base], chat_template=name).path)
    with pytest.raises(Exception, match="no role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_a_literal_template(tmp_path: Path, tiny_model: Any, assemble: Any) -> None:
    base = tiny_model(tmp_path / "base")
    text = (
        "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}"
        "{% generation %}{{ m.content | tojson }}{% endgeneration %}\n{% endfor %}"
    )
    moe = assemble(base, [base, base], chat_template=text)
    rendered = AutoTokenizer.from_pretrained(moe.path).apply_chat_template(CHAT[:3], tokenize=False)
    assert rendered == '"Be brief.""Who are you?"'
    assert (moe.path / "chat_template.jinja").read_text() == text


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("chatlm", ["'chatlm'", "alpaca, chatml, llama3, mistral"]),
        ("{% for m in messages %}\n{{ m.content }", ["line 2"]),
        ("{% for m in messages %}\n{{ m.content }}", ["line 2", "endfor"]),
        ("{{ x }}\n\n{% load 'secrets' %}", ["line 3", "load"]),
        ("{{ x }}\n{{ y | shout }}", ["line 2", "shout"]),
        ("{% include 'other' %}", ["line 1", "another template"]),
        ("{{ " + "(" * 50_000 + "x }}", ["line 1", "nested"]),
    ],
)
def test_a_template_that_is_none(
    template: str, words: list[str], tmp_path: Path, tiny_model: Any, plan: Any
) -> None:
    base = tiny_model(tmp_path / "base")
    with pytest.raises(InvalidSpec) as caught:
        plan(base, [base, base], chat_template=template)
    assert caught.value.field == "chat_template"
    for word in words:
        assert word in str(caught.value)


def test_a_template_is_not_computed(tmp_path: Path, tiny_model: Any, plan: Any) -> None:
    base = tiny_model(tmp_path / "base")
    endless = "{{ 9 ** 9 ** 9 ** 9 }}{{ 'x' | center(99999999999) }}"
    assert plan(base, [base, base], chat_template=endless).chat_template == endless


def test_marks_that_are_no_tokens_are_said(tmp_path: Path, tiny_model: Any, plan: Any) -> None:
    base = tiny_model(tmp_path / "base")
    (note,) = plan(base, [base, base], chat_template="chatml").notes
    assert "<|im_start|>" in note
    assert not plan(base, [base, base], chat_template="mistral").notes
