"""The result of a training as files: an adapter in PEFT's layout, or a whole model, with the tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from aidocks.checkpoints.files import copy_file, sync_directory, sync_file, unfinished, write_text
from aidocks.checkpoints.layout import ADAPTER_CONFIG_FILE, is_tokenizer_file, read_json_object
from aidocks.training.run import LLMTraining

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# PEFT writes a card of its own; the registry's says what this adapter is.
_CARD = "README.md"


def save_result(trainer: Any, training: LLMTraining) -> tuple[Path, ...]:
    """Write what was trained, aside and then in one go, by the first process; return the files.

    Every process calls this: weights that ZeRO has shared out come together first.

    Args:
        trainer: The transformers.Trainer, after its last step.
    """
    state = _gathered_state(trainer)
    if not trainer.is_world_process_zero():
        return ()
    with appearing_whole(training.output) as aside:
        _save_weights(trainer, training, state, aside)
        (aside / _CARD).unlink(missing_ok=True)
        for path in sorted(training.tokenizer.iterdir()):
            if path.is_file() and is_tokenizer_file(path):
                copy_file(path, aside / path.name)
    return files_in(training.output)


@contextmanager
def appearing_whole(output: Path) -> Iterator[Path]:
    """Give a directory to write in, and bring what is in it to the disk and to its place in one go; or nothing."""
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = unfinished(output)
    try:
        yield aside
        for path in files_in(aside):
            sync_file(path)
        shutil.rmtree(output, ignore_errors=True)
        aside.rename(output)
        sync_directory(output.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def files_in(directory: Path) -> tuple[Path, ...]:
    """Return all files below a directory, in order."""
    return tuple(sorted(path for path in directory.rglob("*") if path.is_file()))


def _save_weights(trainer: Any, training: LLMTraining, state: dict[str, Any] | None, directory: Path) -> None:
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "peft_config"):
        model.save_pretrained(directory, state_dict=state, safe_serialization=True)
        # The request's name for the base, which means something on other machines, too.
        config = read_json_object(directory / ADAPTER_CONFIG_FILE)
        config["base_model_name_or_path"] = training.base_name
        write_text(directory / ADAPTER_CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")
        return
    state = dict(model.state_dict() if state is None else state)
    for tied in getattr(model, "all_tied_weights_keys", None) or ():
        state.pop(tied, None)
    stored = _stored_dtype(training.base)
    if stored is not None:
        # Trained in a wider type, a model is rounded once, to the type in which it came.
        model.config.dtype = stored
        state = {name: each.to(stored) if each.is_floating_point() else each for name, each in state.items()}
    model.save_pretrained(directory, state_dict=state, max_shard_size=training.max_shard_bytes)


def _stored_dtype(base: Path) -> torch.dtype | None:
    config = read_json_object(base / "config.json")
    return _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")))


def _gathered_state(trainer: Any) -> dict[str, Any] | None:
    """Return the weights, on the CPU of the first process; None where the model itself holds them all."""
    if not trainer.is_deepspeed_enabled:
        return None
    engine = trainer.deepspeed
    if engine.zero_optimization_stage() == 3 and hasattr(trainer.model, "peft_config"):
        return engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)  # type: ignore[no-any-return]
    return trainer.accelerator.get_state_dict(engine)  # type: ignore[no-any-return]
