"""What the trainers of all methods are made of: arguments, model, tokenizer, rows, adapter."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

from aidocks.errors import InvalidSpec
from aidocks.training.run import ONLINE_METHODS, WHOLE, Backend, LLMTraining, Precision
from train.adapters import adapter_config, begin_prefix, keep_exact, quantization, train_only
from train.distributed import Place
from train.methods.rows import load_rows, require_some, words_of

#: More than texts have on average, so that as many tokens come out as are needed.
_CHARACTERS_PER_TOKEN = 8
#: Weights from safetensors, files of this machine, and no code of a model's own.
_SAFE = {"local_files_only": True, "trust_remote_code": False}
#: Fields that a method's trainer reads, whichever of them the rows have.
CONVERSATION = ("prompt", "completion", "messages", "tools")
PAIR = ("prompt", "chosen", "rejected", "tools")


@dataclass(frozen=True)
class Request:
    """What :func:`train.methods.build_trainer` is asked for; see there."""

    training: LLMTraining
    place: Place
    backend: Backend
    arguments: Mapping[str, Any]
    callbacks: Sequence[transformers.TrainerCallback]

    @property
    def precision(self) -> Precision:
        """Type of the products of matrices, and of frozen weights."""
        return self.training.precision or ("bfloat16" if self.arguments.get("bf16") else "float32")

    @property
    def loaded(self) -> torch.dtype:
        """Type of the weights as they are loaded: what is trained as a whole is kept exactly."""
        found: torch.dtype = getattr(
            torch, "float32" if self.training.adapter.kind == "full" else self.precision
        )
        return found

    @property
    def directory(self) -> Path:
        """Of this process alone."""
        return Path(self.arguments["output_dir"])

    def configure(self, kind: type[transformers.TrainingArguments], **own: Any) -> Any:
        """Return the arguments of a trainer. Made before the model: of DeepSpeed it must be known how to load that.

        Args:
            kind: TRL's class of the method's arguments.
            own: Those of the method; None leaves TRL's default.
        """
        counted = "no" if self.training.method in ONLINE_METHODS else "non_padding"
        given = {"bf16": self.precision == "bfloat16", "include_num_input_tokens_seen": counted}
        given |= {name: value for name, value in own.items() if value is not None}
        return kind(**{**self.arguments, **given})


@dataclass(frozen=True)
class Parts:
    """What a trainer is made of.

    Attributes:
        model: The base, with the adapter already only where unsloth made it.
        tokenizer: With padding that the model knows.
        adapter: For the trainer to apply; None where there is nothing to apply.
    """

    model: Any
    tokenizer: Any
    adapter: Any

    def given(self, request: Request, train: Any, held_out: Any = None) -> dict[str, Any]:
        """Return what every trainer of TRL is given beside its own arguments."""
        return {
            "model": self.model,
            "train_dataset": train,
            "eval_dataset": held_out,
            "processing_class": self.tokenizer,
            "peft_config": self.adapter,
            "callbacks": list(request.callbacks),
        }


def prepare(request: Request, *, scores: bool = False) -> Parts:
    """Load model and tokenizer, and say what is trained.

    Args:
        request: The training.
        scores: Whether the model gives a score (a reward model) instead of tokens.

    Raises:
        InvalidSpec: The adapter does not fit the model or the machine, or the tokenizer has no end of text.
    """
    training = request.training
    tokenizer = load_tokenizer(training.tokenizer)
    if request.backend == "unsloth":
        from train import unsloth_backend

        model = unsloth_backend.load_model(training, request.place, request.precision)
        adapter = None
    else:
        model = load_model(request, scores=scores)
        adapter = adapter_config(training, model)
        if training.adapter.kind == "layers":
            train_only(model, training.adapter.layers)
    settle_padding(tokenizer, model)
    return Parts(model, tokenizer, adapter)


def load_model(request: Request, *, scores: bool = False) -> transformers.PreTrainedModel:
    """Return the base. Weights that are all trained are float32, frozen ones as the request's precision says."""
    training, place = request.training, request.place
    quantised = quantization(training, place)
    kind = transformers.AutoModelForSequenceClassification if scores else transformers.AutoModelForCausalLM
    further: dict[str, Any] = {"num_labels": 1} if scores else {}
    if quantised is not None:
        further |= {"quantization_config": quantised, "device_map": {"": place.device}}
    # The score of a reward model is random at first: the same one in every process, and after a restart.
    transformers.set_seed(training.hyper.seed)
    return kind.from_pretrained(
        training.base,
        dtype=request.loaded,
        use_safetensors=True,
        **_SAFE,
        **further,
    )


def load_reference(request: Request) -> transformers.PreTrainedModel | None:
    """Return the model that answers are compared with; None where that is the trained one without its adapter."""
    if request.training.adapter.kind not in WHOLE:
        return None
    # In the type of the trained one, so that at first both say the same.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        request.training.base, dtype=request.loaded, use_safetensors=True, **_SAFE
    )
    return model.requires_grad_(False)


def load_tokenizer(directory: Path) -> Any:
    """Return a tokenizer.

    Raises:
        InvalidSpec: It has no token that ends a text, so no model could learn to stop.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, **_SAFE)
    if tokenizer.eos_token_id is None:
        raise InvalidSpec(
            "The tokenizer names no token that ends a text.",
            field="base_model",
            hint="Give it an `eos_token` in tokenizer_config.json.",
        )
    return tokenizer


def settle_padding(tokenizer: Any, model: Any) -> None:
    """Give a tokenizer a padding token that the model has a row for, without a new one: the token that ends a text.

    What pads is never learned from, whatever token it is: the trainers mark the loss by position. So the token that
    ends a text stays a wanted one, too.
    """
    known = model.get_input_embeddings().num_embeddings
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= known:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def rows_of(request: Request, columns: Sequence[str]) -> tuple[Any, Any]:
    """Return the rows to train on, and those that are held out or None."""
    training = request.training
    held_out = training.held_out
    return (
        load_rows(training.train, columns, request.directory),
        load_rows(held_out, columns, request.directory) if held_out and held_out.count else None,
    )


def count_prompt(tokenizer: Any) -> Callable[[Any], int]:
    """Return what counts the tokens of a prompt, a text or messages."""

    def count(prompt: Any) -> int:
        if isinstance(prompt, str):
            return len(tokenizer(prompt)["input_ids"])
        return len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))

    return count


def as_texts(rows: Any, tokenizer: Any) -> Any:
    """Return rows of texts, of rows of conversations: in the tokenizer's chat template."""
    from trl.data_utils import maybe_apply_chat_template

    names = [name for name in rows.column_names if name != "tools"]

    def write(row: dict[str, Any]) -> dict[str, str]:
        tools = json.loads(row["tools"]) if row.get("tools") else None
        written = maybe_apply_chat_template(row, tokenizer, tools=tools)
        return {name: written[name] for name in names}

    return rows.map(
        write,
        remove_columns=rows.column_names,
        features=datasets.Features({name: datasets.Value("string") for name in names}),
    )


def require_template(tokenizer: Any, rows: Any) -> None:
    """Refuse conversations where the tokenizer has no chat template.

    Raises:
        InvalidSpec: Saying how to give it one.
    """
    first = rows[0]
    spoken = any(isinstance(first.get(name), list) for name in ("prompt", "messages"))
    if spoken and not tokenizer.chat_template:
        raise InvalidSpec(
            "The rows are conversations, but the tokenizer has no chat template.",
            field="chat_template",
            hint="Name one, such as 'chatml', or use rows of texts.",
        )


def finish(trainer: transformers.Trainer, request: Request, what: str) -> transformers.Trainer:
    """Make a trainer of TRL fit to train, and return it.

    Args:
        trainer: Just built.
        request: The training.
        what: What was too long in the rows that the trainer left out.

    Raises:
        InvalidSpec: It left out all of them.
    """
    training = request.training
    require_some(len(trainer.train_dataset), training.train.count, what, training.hyper.max_length)
    if trainer.eval_dataset is not None and len(trainer.eval_dataset) == 0:
        trainer.eval_dataset = None
        trainer.args.eval_strategy = transformers.trainer_utils.IntervalStrategy.NO
    model: Any = trainer.model
    if "ref" in getattr(model, "peft_config", {}):
        # A copy of the adapter that has learned nothing yet: without any adapter the model says the same.
        model.delete_adapter("ref")
    if _stage(trainer.args) == 3:
        return trainer  # each process has only its part of the weights
    if training.adapter.kind == "prefix_tuning":
        tokenizer: Any = trainer.processing_class
        words = words_of(training.train, _CHARACTERS_PER_TOKEN * training.adapter.virtual_tokens)
        begin_prefix(model, tokenizer(words)["input_ids"])
    if training.adapter.kind != "qlora":
        keep_exact(model)
    return trainer


def _stage(arguments: transformers.TrainingArguments) -> int:
    plugin = arguments.deepspeed_plugin
    return int(plugin.zero_stage) if plugin is not None else 0


def as_json(row: str) -> dict[str, Any]:
    """Return a row from the column of whole rows."""
    found: dict[str, Any] = json.loads(row)
    return found
