"""What the fields of a training request must agree on, and what one should know of it."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, get_args

from aidocks.errors import InvalidSpec
from aidocks.specs.train_data import Role
from aidocks.specs.train_hyper import batches, fewer_workers
from aidocks.training.methods import UNSLOTH_ADAPTERS, UNSLOTH_METHODS, require_loss
from aidocks.training.run import LOW_RANK, ONLINE_METHODS, WHOLE, Method

if TYPE_CHECKING:
    from aidocks.specs.train_llm import LLMTrainSpec

_SOFT = ("prompt_tuning", "prefix_tuning")

# Fields that only some methods know.
_METHODS: dict[str, tuple[Method, ...]] = {
    "packing": ("sft", "pretrain"),
    "neftune_noise_alpha": ("sft", "pretrain", "dpo", "orpo", "kto"),
    "label_smoothing": ("dpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "beta": ("dpo", "orpo", "kto", "grpo", "rloo"),
    "rewards": ONLINE_METHODS,
    "num_generations": ONLINE_METHODS,
    "temperature": ONLINE_METHODS,
}


def check(spec: LLMTrainSpec) -> None:
    """Refuse what cannot be trained as it stands.

    Raises:
        InvalidSpec: Naming the field, its value and what would be right.
    """
    _check_method(spec)
    _check_adapter(spec)
    _check_data(spec)
    _check_batches(spec)
    _check_engine(spec)
    _check_least(spec)


def _refuse(spec: LLMTrainSpec, field: str, message: str, hint: str | None = None) -> None:
    value = getattr(spec, field)
    raise InvalidSpec(message, field=field, value=_plain(value), hint=hint)


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def _check_method(spec: LLMTrainSpec) -> None:
    for field, methods in _METHODS.items():
        default = type(spec).model_fields[field].default
        if spec.method not in methods and getattr(spec, field) != default:
            _refuse(
                spec,
                field,
                f"The method {spec.method!r} does not know `{field}`.",
                f"Leave it out; it belongs to {' and '.join(methods)}.",
            )
    if spec.method in ONLINE_METHODS and not spec.rewards:
        _refuse(
            spec,
            "rewards",
            f"The method {spec.method!r} learns from rewards, and there are none.",
            'Such as [{"kind": "match", "field": "answer"}], or a reward model: [{"kind": "model", "model": …}].',
        )
    if spec.method == "pretrain" and spec.loss_on != "all":
        _refuse(spec, "loss_on", "Plain text has no answers that the loss could be on.", "Leave it out.")
    if spec.method not in ("sft", "pretrain") and spec.loss_on != "completion":
        _refuse(
            spec, "loss_on", f"The loss of {spec.method!r} is on the answers.", "Leave it out, or use `sft`."
        )
    require_loss(spec.method, spec.loss_type, spec.label_smoothing)
    if spec.beta == 0 and spec.method in ("dpo", "orpo", "kto"):
        _refuse(spec, "beta", f"With `beta` 0, {spec.method!r} learns nothing.", "0.1 is usual.")


def _check_adapter(spec: LLMTrainSpec) -> None:
    if (spec.layers is None) == (spec.adapter == "layers"):
        _refuse(
            spec,
            "layers",
            "`adapter: layers` needs `layers`."
            if spec.layers is None
            else "`layers` needs `adapter: layers`.",
            "Patterns of tensor names, or the scan that lists them.",
        )
    if spec.merge_adapter and spec.adapter in _SOFT:
        _refuse(
            spec,
            "merge_adapter",
            f"What {spec.adapter!r} trains stands before the text, and cannot be merged into weights.",
            "Leave it out: the result is the adapter.",
        )
    if spec.adapter == "prefix_tuning" and spec.gradient_checkpointing:
        _refuse(
            spec,
            "gradient_checkpointing",
            "A prefix stands in the cache of keys and values, which checkpointing does without.",
            "Leave it out, or use `prompt_tuning`.",
        )
    if spec.adapter in _SOFT and spec.method not in ("sft", "pretrain"):
        _refuse(spec, "adapter", f"{spec.adapter!r} works with `sft` and `pretrain`.", "Use `lora`.")
    for field in ("target_modules", "modules_to_save"):
        if getattr(spec, field) is not None and spec.adapter not in LOW_RANK:
            _refuse(spec, field, f"The adapter {spec.adapter!r} has no `{field}`.", "Use `lora`.")


def _check_data(spec: LLMTrainSpec) -> None:
    for role in spec.fields:
        if role not in get_args(Role) and spec.method not in ONLINE_METHODS:
            close = get_close_matches(role, get_args(Role), n=1)
            raise InvalidSpec(
                f"A column can be {', '.join(get_args(Role))}, but no {role!r}.",
                field=f"fields.{role}",
                value=spec.fields[role],
                hint=f"Did you mean {close[0]!r}?" if close else "Write role: column.",
            )
    if spec.eval_dataset is not None and spec.eval_split:
        _refuse(
            spec, "eval_split", "Held-out rows come from `eval_dataset` or from `eval_split`.", "Keep one."
        )
    if spec.eval_dataset is not None and spec.eval_dataset == spec.dataset and not spec.eval_dataset_split:
        _refuse(
            spec,
            "eval_dataset",
            "Rows cannot be measured on that are trained on, and these are the same.",
            "Leave it out: some rows are held out then. Or name another split of it as `eval_dataset_split`.",
        )
    if spec.eval_split is not None and spec.eval_split >= 1 and spec.eval_split != int(spec.eval_split):
        _refuse(spec, "eval_split", "Must be a share below 1, or a whole number of rows.")
    if spec.eval_split == 1 and isinstance(spec.eval_split, float):
        _refuse(spec, "eval_split", "A share of 1 leaves nothing to train on.", "0.1 is a tenth.")
    if (
        spec.method in ONLINE_METHODS
        and spec.max_prompt_length is not None
        and spec.max_prompt_length >= spec.max_length
    ):
        _refuse(
            spec,
            "max_prompt_length",
            f"Prompts of {spec.max_prompt_length} tokens leave nothing of {spec.max_length} for answers.",
            "Make it smaller, or `max_length` larger.",
        )


def _check_batches(spec: LLMTrainSpec) -> None:
    per_device, accumulated = batches(spec)
    if spec.method == "kto" and spec.loss_type in (None, "kto") and per_device < 2:
        _refuse(
            spec,
            "per_device_train_batch_size",
            "KTO compares each answer with others of its batch; a batch of one has none.",
            "2 or more, or `loss_type: apo_zero_unpaired`.",
        )
    together = per_device * accumulated * spec.workers
    if spec.method in ONLINE_METHODS and together % spec.num_generations:
        _refuse(
            spec,
            "num_generations",
            f"A step has {per_device} x {accumulated} x {spec.workers} = {together} answers, which are no groups of "
            f"{spec.num_generations}.",
            "per_device_train_batch_size x gradient_accumulation_steps x workers must be a multiple of it; leave one "
            "of the first two out, and it is chosen so.",
        )


def _check_engine(spec: LLMTrainSpec) -> None:
    asked = spec.deepspeed.stage not in ("auto", "off")
    if spec.adapter == "qlora" and spec.deepspeed.stage == 3:
        _refuse(spec, "deepspeed", "Stage 3 cannot divide weights in 4 bits.", "Use `lora`, or stage 2.")
    if spec.backend != "unsloth":
        return
    if asked:
        _refuse(spec, "deepspeed", "unsloth works without DeepSpeed.", "Use `backend: trl`, or 'off'.")
    if spec.workers > 1:
        _refuse(spec, "workers", "unsloth is used with one worker.", "Use `backend: trl`, or one worker.")
    if spec.method not in UNSLOTH_METHODS:
        _refuse(spec, "backend", f"unsloth does not know the method {spec.method!r}.", "Use 'trl' or 'auto'.")
    if spec.adapter not in UNSLOTH_ADAPTERS:
        _refuse(
            spec, "backend", f"unsloth does not know the adapter {spec.adapter!r}.", "Use 'trl' or 'auto'."
        )


def _check_least(spec: LLMTrainSpec) -> None:
    if spec.min_workers is None or spec.min_workers == spec.workers:
        return
    if spec.min_workers > spec.workers:
        _refuse(spec, "min_workers", f"There are {spec.workers} workers.", f"At most {spec.workers}.")
    if spec.deepspeed.stage not in ("auto", "off"):
        _refuse(
            spec,
            "min_workers",
            "What DeepSpeed's workers have divided among them can be gone on from by as many alone.",
            "Use `deepspeed: off`, or leave `min_workers` out.",
        )
    if not fewer_workers(spec):
        passes = batches(spec)[1] * spec.workers
        _refuse(
            spec,
            "min_workers",
            f"A step has {passes} forward passes, which no number of workers from {spec.min_workers} to "
            f"{spec.workers - 1} divides.",
            "Choose `gradient_accumulation_steps` so that one does.",
        )


def notes(spec: LLMTrainSpec) -> tuple[str, ...]:
    """See :meth:`aidocks.specs.train_llm.LLMTrainSpec.notes`."""
    found = []
    without_effect = {
        "lora_rank": spec.adapter not in LOW_RANK,
        "lora_alpha": spec.adapter not in LOW_RANK,
        "lora_dropout": spec.adapter not in LOW_RANK,
        "rslora": spec.adapter not in LOW_RANK,
        "virtual_tokens": spec.adapter not in _SOFT,
    }
    for field, is_without in without_effect.items():
        if is_without and getattr(spec, field) != type(spec).model_fields[field].default:
            found.append(f"`{field}` has no effect with the adapter {spec.adapter!r}.")
    if spec.max_steps is not None and spec.num_train_epochs != 1:
        found.append("`max_steps` decides when it ends; `num_train_epochs` has no effect.")
    if spec.method not in ONLINE_METHODS:
        if spec.max_completion_length != 256:
            found.append(f"`max_completion_length` has no effect with the method {spec.method!r}.")
        if spec.max_prompt_length is not None:
            found.append(
                f"`max_prompt_length` has no effect with the method {spec.method!r}: prompt and answer together are "
                "cut at `max_length`."
            )
    if spec.eval_steps is not None and not spec.evaluate:
        found.append("`eval_steps` has no effect where `evaluate` is false.")
    if spec.adapter in WHOLE and not spec.merge_adapter:
        found.append(f"`merge_adapter` has no effect: {spec.adapter!r} makes a whole model.")
    if spec.optim.endswith("8bit") and spec.deepspeed.stage not in ("auto", "off"):
        found.append(f"DeepSpeed divides the state of {spec.optim!r} only as far as bitsandbytes lets it.")
    return tuple(found)
