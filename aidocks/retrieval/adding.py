"""Adding adapters in PEFT's layout to a loaded network, tensor by tensor: nothing is left as it was made by chance.

PEFT and transformers make an adapter's parts with random numbers, fill in what they find in the file, and only warn of
the rest; the head that was trained with a reranker is lost so (transformers 5.17 makes it anew). Here every tensor of
the file has a place in the network, and every part of the adapter in the network is in the file.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from aidocks.checkpoints.layout import ADAPTER_FILE
from aidocks.errors import CorruptCheckpoint
from aidocks.merge.adapter import Adapter, read_adapter
from aidocks.merge.adapter_config import parse_key
from aidocks.retrieval.architecture import RETRIEVAL_SIDES, RETRIEVAL_TASK
from aidocks.training.retriever import Retriever

#: What an adapter of ours is called within a network.
ADAPTER_NAME = "default"


def add_adapters(network: Any, retriever: Retriever, new: Collection[str]) -> None:
    """Add the adapter of a model, and those for its task, to its network.

    Args:
        network: Transformers model, on its device.
        retriever: What it was made of.
        new: Parameters of the network that its checkpoint does not have; an adapter must bring them.

    Raises:
        IncompatibleModels: An adapter does not fit.
        CorruptCheckpoint: An adapter lacks a part.
    """
    names = task_adapters(retriever.task)
    for name in names:
        _add(network, retriever.model / name, name)
    if retriever.adapter is not None:
        brought = _add(network, retriever.adapter, ADAPTER_NAME)
        lacking = sorted(set(new) - brought)
        if lacking:
            raise CorruptCheckpoint(
                f"Neither the adapter {retriever.name!r} nor its base has {lacking[0]}, a part of the head that it was "
                "trained with.",
                value=retriever.name,
                hint="Save the whole head with the adapter (modules_to_save), or merge it where it was trained.",
            )
    # Of two sides both are, until `activate` says which text comes: a training must be told one of them.
    active = [*names, *([ADAPTER_NAME] if retriever.adapter is not None else [])]
    if active:
        network.set_adapter(active if len(active) > 1 else active[0])
        for parameter in network.parameters():
            parameter.requires_grad_(False)


def task_adapters(task: str | None) -> tuple[str, ...]:
    """Return the adapters of a task: none, one, or that of queries and that of passages."""
    if task is None:
        return ()
    return RETRIEVAL_SIDES if task == RETRIEVAL_TASK else (task,)


def activate(network: Any, retriever: Retriever, role: str | None) -> None:
    """Of a model with an adapter for queries and one for passages, use that of one side.

    Args:
        network: As :func:`add_adapters` left it.
        retriever: What it was made of.
        role: ``query`` or ``passage``; None is a passage.
    """
    if retriever.task != RETRIEVAL_TASK:
        return
    side = RETRIEVAL_SIDES[0 if role == "query" else 1]
    network.set_adapter(side if retriever.adapter is None else [side, ADAPTER_NAME])


def _add(network: Any, directory: Path, name: str) -> set[str]:
    """Add one adapter; return the network's own parameters that it replaced."""
    from peft import PeftConfig
    from safetensors.torch import load_file

    adapter = read_adapter(directory)
    stored = load_file(directory / ADAPTER_FILE)
    parts = {key: parsed for key in stored if (parsed := parse_key(key)) is not None}
    prefix = _prefix(network, adapter, {module for module, _ in parts.values()})
    settings = PeftConfig.from_pretrained(str(directory))
    # Exactly what the file has: a name such as `dense` would also mean modules that were left out when it was trained.
    settings.target_modules = {prefix(module) for module, part in parts.values() if part.startswith("lora_")}
    settings.exclude_modules = settings.layers_to_transform = settings.layers_pattern = None
    settings.modules_to_save = None
    settings.inference_mode = True
    with warnings.catch_warnings():
        # That there are several adapters, of which one is used at a time, is what is wanted.
        warnings.simplefilter("ignore", UserWarning)
        network.add_adapter(settings, adapter_name=name)
    places = dict(network.named_parameters())
    replaced: set[str] = set()
    filled: set[str] = set()
    with torch.no_grad():
        for key, (module, part) in parts.items():
            own = prefix(module)
            place = _place(places, own, part, name)
            if place is None or places[place].shape != stored[key].shape:
                adapter.refuse(f"it has {key}, for which the model has no place", None, directory.name)
            places[place].copy_(stored[key])
            (filled if part.startswith("lora_") else replaced).add(place)
    made = {place for place in places if "lora_" in place and name in place.split(".")}
    if made != filled:
        raise CorruptCheckpoint(
            f"The adapter {directory.name} lacks {sorted(made - filled)[0]}.", value=directory.name
        )
    return {place.replace(".base_layer.", ".") for place in replaced}


def _place(places: Mapping[str, Any], module: str, part: str, name: str) -> str | None:
    """Return the parameter that a tensor of an adapter belongs to; None where there is none."""
    if part.startswith("lora_"):
        candidates = (f"{module}.{part}.{name}.weight", f"{module}.{part}.{name}")
    else:
        candidates = (f"{module}.{part}", f"{module}.base_layer.{part}")
    return next((one for one in candidates if one in places), None)


def _prefix(network: Any, adapter: Adapter, modules: Collection[str]) -> Any:
    """Return how the adapter's names of modules become the network's.

    An adapter of a language model says `model.layers.0`, where the bare decoder in the network says `layers.0`.
    """
    known = {name for name, _ in network.named_modules()}
    own = str(network.base_model_prefix)
    ways: list[Any] = [
        lambda name: name,
        lambda name: name.removeprefix(f"{own}."),
        lambda name: f"{own}.{name}",
    ]
    for way in ways:
        if all(way(module) in known for module in modules):
            return way
    strange = next(module for module in sorted(modules) if module not in known)
    adapter.refuse(f"it changes {strange}, which the model does not have", None, adapter.directory.name)
