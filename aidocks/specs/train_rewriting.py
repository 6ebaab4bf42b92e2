"""From the words of a training request that other tools use to ours, before its fields are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from aidocks.errors import InvalidSpec
from aidocks.specs.aliases import names_of, one_name_each

#: Other words for methods. TRL has no PPO any more; RLOO is the kept method that learns from a reward model on the
#: model's own answers, and needs no value model.
METHOD_WORDS = {
    "supervised": "sft",
    "cpt": "pretrain",
    "pt": "pretrain",
    "continued_pretraining": "pretrain",
    "preference": "dpo",
    "rm": "reward",
    "ppo": "rloo",
    "rlhf": "rloo",
    "reinforcement": "grpo",
}

#: The original had two limits: of an example, and of what the model was loaded for. Both held.
_LENGTHS = ("max_seq_length", "max_total_length")


def rewritten(spec_type: type[BaseModel], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body of a training request in our words, with the defaults that depend on other fields.

    Raises:
        InvalidSpec: Two names of one thing disagree.
    """
    body = one_name_each(spec_type, with_one_length(given))
    for other in names_of("adapter", spec_type.model_fields["adapter"])[1:]:
        if other in body:
            body["adapter"] = body.pop(other)
    _switch(body, "load_in_4bit", "adapter", "qlora", unless=("lora", "qlora"))
    _switch(body, "assistant_only_loss", "loss_on", "assistant", unless=("assistant",))
    method = body.get("method", "sft")
    method = METHOD_WORDS.get(method.lower(), method.lower()) if isinstance(method, str) else method
    if body.get("merge_adapter") is None:
        body.pop("merge_adapter", None)
        soft = body.get("adapter") in ("prompt_tuning", "prefix_tuning")
        if soft:
            body["merge_adapter"] = False
    if method == "pretrain":
        body.setdefault("loss_on", "all")
    return body


def with_one_length(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body of a training request with one limit of an example, the smaller one, where it has both."""
    body = {str(name): value for name, value in given.items()}
    lengths = [length for name in _LENGTHS if isinstance(length := body.get(name), int)]
    if len(lengths) == len(_LENGTHS) and "max_length" not in body:
        for name in _LENGTHS:
            del body[name]
        body["max_length"] = min(lengths)
    return body


def _switch(body: dict[str, Any], name: str, field: str, choice: str, unless: tuple[str, ...]) -> None:
    """Read a switch of other tools that is one choice of a field of ours, which may also say nothing or the like."""
    try:
        wanted = TypeAdapter(bool | None).validate_python(body.get(name))
    except ValidationError:
        return  # the switch's own field says so
    chosen = body.get(field)
    if (wanted and chosen not in (None, *unless)) or (wanted is False and chosen == choice):
        raise InvalidSpec(
            f"`{name}` is {str(wanted).lower()}, but `{field}` is {chosen!r}.",
            field=name,
            value=body[name],
            hint=f"Leave one of them out; `{name}: true` is `{field}: {choice}`.",
        )
    if wanted:
        body[field] = choice
