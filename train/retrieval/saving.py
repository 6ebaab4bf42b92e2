"""The result of a training as files that sentence-transformers and transformers load, and what proves that they do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from aidocks.checkpoints.files import write_text
from aidocks.checkpoints.layout import ADAPTER_CONFIG_FILE, read_json_object
from aidocks.retrieval.architecture import architecture_of
from aidocks.retrieval.loading import network_of, stored_dtype
from aidocks.retrieval.verifying import make_probe, write_probe
from aidocks.training.merging import ADAPTER_DIRECTORY
from aidocks.training.retriever import EmbeddingTraining, RerankerTraining
from train.retrieval.adapters import load_trained, prepare, trained_state, unload
from train.retrieval.parts import load
from train.saving import appearing_whole, files_in

#: Texts, or queries and passages, of each side of the probe.
_PROBED = 8
#: Cards of PEFT and sentence-transformers: the registry's says what this model is.
_CARD = "README.md"


def save_result(trainer: Any, training: EmbeddingTraining | RerankerTraining) -> tuple[Path, ...]:
    """Write what was trained, aside and then in one go, by the first process; return the files.

    A whole model is written in the type in which its base is stored; the adapter that was merged stays beside it, in
    ``adapter/``, unless it stands on another one. Beside the story goes the probe, what the model in memory makes of
    some texts (:mod:`aidocks.retrieval.verifying`).

    Args:
        trainer: Of this package, after its last step.
    """
    if not trainer.is_world_process_zero():
        return ()
    model = trainer.model.eval()
    exact = _exact(model, training)
    queries, passages = trainer.train_dataset.some_texts(_PROBED)
    probe = make_probe(exact, training.retriever.kind, queries, passages)
    write_probe(probe, training.story.parent)
    with appearing_whole(training.output) as aside:
        _write(exact, training, aside)
    return files_in(training.output)


def _exact(model: Any, training: EmbeddingTraining | RerankerTraining) -> Any:
    """Return the trained model in float32, to be written and then no longer used.

    Below an adapter stands the base anew from its files: in memory it may have been rounded, and it stays as it is.
    """
    if training.adapter.kind == "full":
        return model.float()
    exact = load(training, "cpu", torch.float32)
    prepare(exact, training)
    load_trained(exact, trained_state(model))
    return exact.eval()


def _write(model: Any, training: EmbeddingTraining | RerankerTraining, directory: Path) -> None:
    network = network_of(model)
    if training.adapter.kind != "full":
        if not training.merge:
            _save(model, training, directory)
            _name_base(directory, training)
            return
        # One that was trained on another adapter belongs to no model that has a name.
        if training.retriever.adapter is None and training.retriever.task is None:
            network.save_pretrained(directory / ADAPTER_DIRECTORY)
            _name_base(directory / ADAPTER_DIRECTORY, training)
        unload(network)
    # Trained in a wider type, a model is rounded once, to the type in which it came.
    stored = stored_dtype(training.base / architecture_of(training.base).transformer)
    model.to(stored)
    network.config.dtype = stored
    _save(model, training, directory)


def _save(model: Any, training: EmbeddingTraining | RerankerTraining, directory: Path) -> None:
    if isinstance(training, RerankerTraining) and training.retriever.prompts.query:
        # Of a reranker there is only this one, so nobody has to name it.
        model.default_prompt_name = "query"
    with _in_shards(network_of(model), training.max_shard_bytes):
        model.save(str(directory), create_model_card=False)
    for card in directory.rglob(_CARD):
        card.unlink()
    if training.retriever.remote_code:
        for code in training.base.glob("*.py"):
            shutil.copy(code, directory / code.name)


@contextmanager
def _in_shards(network: Any, most: int) -> Iterator[None]:
    """Have sentence-transformers, which asks nothing about it, write weight files of at most so many bytes."""
    network.save_pretrained = partial(network.save_pretrained, max_shard_size=most)
    try:
        yield
    finally:
        del network.save_pretrained


def _name_base(directory: Path, training: EmbeddingTraining | RerankerTraining) -> None:
    """Name the base of an adapter as the request does, which means something on other machines, too."""
    (directory / _CARD).unlink(missing_ok=True)
    config = read_json_object(directory / ADAPTER_CONFIG_FILE)
    config["base_model_name_or_path"] = training.base_name
    write_text(directory / ADAPTER_CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")
