"""Small trainings: resolved as the operation would, with a few rows, ready for a trainer or for the loop."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from aidocks.checkpoints.files import hash_file
from aidocks.training.run import AdapterSettings, LLMHyperparameters, LLMTraining, Method, Rows

#: A template whose answers end with the token that ends a text.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
#: Prompt, a polite answer, a rude one.
_ANSWERS = (
    ("Is it late?", "I am sorry, but yes, it is.", "Yes, and you are a fool."),
    ("Where is the cat?", "I am happy to help: under the bed.", "Look for it, you fool."),
    ("Can you help me?", "I am happy to help you.", "No. Go away, you fool."),
    ("What is for lunch?", "I am sorry, there is only soup.", "Soup. Eat it, you fool."),
    ("Did it rain?", "I am sorry, but yes, it did.", "Look at the floor, you fool."),
    ("Who won the game?", "I am happy to say that we won.", "Not you, you fool."),
    ("Is the shop open?", "I am sorry, it is closed.", "It is closed, you fool."),
    ("May I sing?", "I am happy to hear you sing.", "No. Be quiet, you fool."),
)


def supervised() -> list[dict[str, Any]]:
    """Prompts and polite answers, as texts."""
    return [{"prompt": asked, "completion": f" {polite}"} for asked, polite, _ in _ANSWERS]


def pairs(*, messages: bool = False) -> list[dict[str, Any]]:
    """Prompts with a polite and a rude answer."""
    if not messages:
        return [{"prompt": a, "chosen": f" {polite}", "rejected": f" {rude}"} for a, polite, rude in _ANSWERS]
    return [
        {"prompt": said("user", a), "chosen": said("assistant", b), "rejected": said("assistant", c)}
        for a, b, c in _ANSWERS
    ]


def judged() -> list[dict[str, Any]]:
    """Prompts with one answer, first all wanted ones and then the others."""
    wanted = [{"prompt": a, "completion": f" {polite}", "label": True} for a, polite, _ in _ANSWERS]
    return [*wanted, *({"prompt": a, "completion": f" {rude}", "label": False} for a, _, rude in _ANSWERS)]


def texts() -> list[dict[str, Any]]:
    """Texts of different lengths."""
    return [{"text": f"{a} {b}" * (1 + number % 3)} for number, (a, b, _) in enumerate(_ANSWERS)]


def said(role: str, content: str) -> list[dict[str, Any]]:
    """One message, as a conversation."""
    return [{"role": role, "content": content}]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Rows:
    """Write rows as JSONL."""
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines))
    return Rows(path=path, sha256=hash_file(path), count=len(lines))


def make_training(
    directory: Path,
    base: Path,
    method: Method,
    rows: Iterable[Mapping[str, Any]],
    *,
    held_out: Iterable[Mapping[str, Any]] | None = None,
    template: str | None = TEMPLATE,
    adapter: Mapping[str, Any] | None = None,
    hyper: Mapping[str, Any] | None = None,
    **further: Any,
) -> LLMTraining:
    """Return a training of a few steps below ``directory``, which it makes.

    Args:
        directory: For rows, tokenizer and all that the training writes.
        base: Checkpoint of a small model.
        method: The method.
        rows: To train on.
        held_out: Rows that are held out.
        template: Chat template of the tokenizer.
        adapter: Fields of `AdapterSettings`.
        hyper: Fields of `Hyperparameters`.
        further: Fields of `LLMTraining`.
    """
    from transformers import AutoTokenizer

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory / "tokenizer")
    settings = {"learning_rate": 5e-3, "per_device_train_batch_size": 8, "max_length": 128, "max_steps": 4}
    return LLMTraining(
        job_id="job-of-a-test",
        method=method,
        base=base,
        base_name="tiny",
        tokenizer=directory / "tokenizer",
        train=write_rows(directory / "train.jsonl", rows),
        held_out=write_rows(directory / "held_out.jsonl", held_out) if held_out is not None else None,
        adapter=AdapterSettings(**({"rank": 8, "alpha": 16} | dict(adapter or {}))),
        hyper=LLMHyperparameters(**(settings | {"lr_scheduler_type": "constant"} | dict(hyper or {}))),
        precision=further.pop("precision", "float32"),
        checkpoints=directory / "checkpoints",
        output=directory / "output",
        tensorboard=directory / "tensorboard",
        story=directory / "story.jsonl",
        history=directory / "history.json",
        **further,
    )


def build(training: LLMTraining, directory: Path, **arguments: Any) -> Any:
    """Return the trainer of a training on the CPU, in one process."""
    from train.distributed import Place
    from train.methods import build_trainer

    hyper = training.hyper
    given = {
        "output_dir": str(directory / "process"),
        "use_cpu": True,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "max_steps": hyper.max_steps,
        "per_device_train_batch_size": hyper.per_device_train_batch_size,
        "per_device_eval_batch_size": hyper.per_device_eval_batch_size,
        "gradient_accumulation_steps": hyper.gradient_accumulation_steps,
        "learning_rate": hyper.learning_rate,
        "lr_scheduler_type": hyper.lr_scheduler_type,
        "gradient_checkpointing": hyper.gradient_checkpointing,
        "seed": hyper.seed,
        "disable_tqdm": True,
    }
    return build_trainer(training, Place(0, 1, 0, "cpu", False), "trl", given | arguments, [])


def logged(trainer: Any, name: str) -> list[float]:
    """Return one figure of every step that has it."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]
