"""Answers: streamed as they are returned, within limits, by the chat template where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aidocks.errors import InvalidSpec
from aidocks.evaluate.generate import answer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


def test_what_is_streamed_is_what_is_returned(model: Path) -> None:
    pieces: list[str] = []
    said = answer(model, "The licence", max_new_tokens=20, on_text=pieces.append)
    assert "".join(pieces).rstrip() == said.text
    assert len(pieces) > 1
    assert 1 <= said.tokens <= 20
    assert said.seconds > 0


def test_greedy_answers_repeat_and_seeds_decide_otherwise(model: Path) -> None:
    assert answer(model, "Go", max_new_tokens=8).text == answer(model, "Go", max_new_tokens=8).text
    drawn = {answer(model, "Go", max_new_tokens=8, temperature=5.0, seed=seed).text for seed in (1, 1, 2, 3)}
    assert 1 < len(drawn) <= 3


def test_the_chat_template_is_used(model: Path, tmp_path: Path, tiny_llama: Any) -> None:
    chatty = tiny_llama(tmp_path / "chatty")
    (chatty / "chat_template.jinja").write_text("{{ messages[0].content }} and so on and so on")
    with_template = answer(chatty, "The licence", max_new_tokens=8).text
    assert with_template == answer(model, "The licence and so on and so on", max_new_tokens=8).text


@pytest.mark.parametrize(
    ("question", "limit", "field"),
    [("", 4, "question"), ("word " * 600, 4, "max_new_tokens"), ("Go", 600, "max_new_tokens")],
)
def test_a_question_without_room_for_an_answer(question: str, limit: int, field: str, model: Path) -> None:
    with pytest.raises(InvalidSpec) as caught:
        answer(model, question, max_new_tokens=limit)
    assert caught.value.field == field
