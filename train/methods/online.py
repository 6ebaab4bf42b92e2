"""Learning from rewards for answers of the model's own: GRPO and RLOO."""

from __future__ import annotations

from typing import Any

import transformers
import trl

from aidocks.errors import InvalidSpec
from aidocks.training.rewards import fields_of, reward_functions
from train.methods.parts import Request, as_json, count_prompt, finish, prepare, require_template
from train.methods.rows import WHOLE_ROW, load_rows, require_some, without_long_prompts
from train.rewards import for_trainer


def build(request: Request) -> transformers.Trainer:
    """Return the trainer. Errors as for :func:`train.methods.build_trainer`.

    It measures nothing on held-out rows: to do that it would have to write answers to all of them.
    """
    training = request.training
    if not training.rewards:
        raise InvalidSpec(
            f"The method {training.method!r} learns from rewards, and there is none.",
            field="rewards",
            hint="For instance [{'kind': 'match', 'field': 'answer'}].",
        )
    # Before the arguments: once they are made, whatever is loaded is divided as DeepSpeed's stage 3 wants it.
    functions = reward_functions(training.rewards, request.place.device)
    args = _configure(request, [function.weight for function in functions])
    train = load_rows(training.train, ("prompt",), request.directory, whole=True)
    _require_fields(train, fields_of(training.rewards))
    parts = prepare(request)
    require_template(parts.tokenizer, train)
    count, longest = count_prompt(parts.tokenizer), _longest_prompt(request, parts.model)
    train = without_long_prompts(train, count, longest)
    require_some(len(train), training.train.count, "the prompt is", longest)
    kind = trl.GRPOTrainer if training.method == "grpo" else trl.RLOOTrainer
    trainer = kind(
        reward_funcs=[for_trainer(function) for function in functions],
        args=args,
        **parts.given(request, train),
    )
    return finish(trainer, request, "the prompt is")


def _configure(request: Request, weights: list[float]) -> Any:
    training, hyper, world = request.training, request.training.hyper, request.place.world_size
    batch = hyper.per_device_train_batch_size * training.passes(world) * world
    if batch % hyper.num_generations:
        raise InvalidSpec(
            f"The {batch} answers of a step cannot be divided among prompts of {hyper.num_generations} answers each.",
            field="num_generations",
            value=hyper.num_generations,
            hint="per_device_train_batch_size * gradient_accumulation_steps * workers must be a multiple of it.",
        )
    own: dict[str, Any] = {
        "max_completion_length": hyper.max_completion_length,
        "num_generations": hyper.num_generations,
        "temperature": hyper.temperature,
        "beta": hyper.beta,
        "reward_weights": weights,
        # Of the reference that both load by themselves where no adapter can be switched off.
        "model_init_kwargs": {
            "dtype": request.loaded,
            "use_safetensors": True,
            "local_files_only": True,
            "trust_remote_code": False,
        },
    }
    if training.method == "rloo":
        return request.configure(trl.RLOOConfig, **own)
    return request.configure(trl.GRPOConfig, loss_type=hyper.loss_type, **own)


def _longest_prompt(request: Request, model: Any) -> int:
    """Return how many tokens a prompt may have, so that an answer has room after it."""
    hyper = request.training.hyper
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or hyper.max_length
    room: int = context - hyper.max_completion_length
    if room < 1:
        raise InvalidSpec(
            f"Answers of {hyper.max_completion_length} tokens leave no room for a prompt in a context of {context}.",
            field="max_completion_length",
            value=hyper.max_completion_length,
        )
    return min(room, hyper.max_prompt_length or room)


def _require_fields(rows: Any, needed: set[str]) -> None:
    """Refuse rows without what the rewards compare with.

    Raises:
        InvalidSpec: Saying what the rows have.
    """
    for number, row in enumerate(rows[WHOLE_ROW] if needed else (), start=1):
        fields = as_json(row)
        missing = sorted(name for name in needed if fields.get(name) is None)
        if missing:
            raise InvalidSpec(
                f"A reward compares with the field {missing[0]!r}, which example {number} does not have.",
                field="rewards",
                value=missing[0],
                hint=f"It has {', '.join(sorted(fields))}.",
            )
