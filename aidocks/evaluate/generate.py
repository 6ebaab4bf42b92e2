"""One answer of a causal language model to one question, streamed as it is written."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: The answer, without special tokens.
        tokens: Tokens that were generated, the end of text included.
        seconds: Time of generation, without loading the model.
        tokens_per_s: tokens / seconds.
    """

    text: str
    tokens: int
    seconds: float
    tokens_per_s: float


def answer(
    model_path: Path,
    question: str,
    *,
    max_new_tokens: int = 128,
    on_text: Callable[[str], None] | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> Answer:
    """Ask a model: by its chat template where it has one, else the question is a text to go on with.

    Args:
        model_path: Checkpoint directory.
        question: What is asked.
        max_new_tokens: Length limit of the answer in tokens.
        on_text: Called with each piece of the answer when it is there.
        temperature: 0 takes the most likely token each time; above, tokens are drawn.
        seed: Of the drawing.

    Raises:
        IncompatibleModels: When the model does not load as a causal language model.
        InvalidSpec: When the question leaves no room for an answer in the model's context.
    """
    from aidocks.executor import best_device, let_threads_sleep

    let_threads_sleep()
    import torch

    from aidocks.evaluate.causal_lm import load

    model = load(model_path, None, best_device())
    prompt = _prompt(model.tokenizer, question).to(model.network.device)
    _require_room(model.network, prompt.shape[1], max_new_tokens)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
        torch.manual_seed(seed)
    begin = time.perf_counter()
    ids = model.network.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_new_tokens,
        pad_token_id=_pad_id(model.tokenizer),
        streamer=_Streamer(model.tokenizer, on_text) if on_text else None,
        **sampling,
    )[0, prompt.shape[1] :]
    seconds = time.perf_counter() - begin
    text = model.tokenizer.decode(ids, skip_special_tokens=True).strip()
    return Answer(text, len(ids), seconds, len(ids) / seconds if seconds else 0.0)


def _prompt(tokenizer: Any, question: str) -> torch.Tensor:
    import torch

    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        # The template writes special tokens itself.
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(question)["input_ids"]
    return torch.tensor([ids])


def _pad_id(tokenizer: Any) -> int:
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)


def _require_room(network: Any, prompt_tokens: int, max_new_tokens: int) -> None:
    from aidocks.errors import InvalidSpec

    limit = getattr(network.config, "max_position_embeddings", None)
    if not prompt_tokens:
        raise InvalidSpec("The question is empty.", field="question")
    if limit and prompt_tokens + max_new_tokens > limit:
        raise InvalidSpec(
            f"The question has {prompt_tokens} tokens; with {max_new_tokens} of an answer that is more than "
            f"the model's context of {limit}.",
            field="max_new_tokens",
            value=max_new_tokens,
        )


class _Streamer:
    """Receives token ids from ``generate`` and passes text on as soon as it is certain.

    Bytes of one character may be spread over several tokens: a piece ends where the decoded text is complete.
    """

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._ids: list[int] = []
        self._said = ""
        self._in_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._in_prompt:  # generate passes the prompt first
            self._in_prompt = False
            return
        self._ids += value.flatten().tolist()
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._pass_on(text)

    def end(self) -> None:
        self._pass_on(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _pass_on(self, text: str) -> None:
        # What is shown and what is returned must agree: blanks before the answer are left out here too.
        text = text.lstrip()
        if len(text) > len(self._said):
            self._on_text(text[len(self._said) :])
            self._said = text
