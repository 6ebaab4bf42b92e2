"""What of a model that finds texts is trained: low-rank factors, heads, or everything that a text's result needs."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from transformers import PreTrainedModel

from aidocks.errors import InvalidSpec
from aidocks.retrieval.loading import network_of
from aidocks.retrieval.trainable import require_one_adapter
from aidocks.training.retriever import EmbeddingTraining, RetrieverTraining
from train.adapters import keep_exact, target_modules

#: The factors that are trained, by PEFT's name.
ADAPTER = "default"
#: What BERT and its like put between the last layer and a head; pooling of sentence-transformers leaves it unused.
_POOLER = "pooler"
#: Shares of dropout that modules of transformers keep as numbers.
_DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "dropout_p")


def prepare(model: Any, training: RetrieverTraining) -> None:
    """Settle what is trained: adds the adapter, and freezes the rest.

    Adapters that the model brings along are added to its weights before, so that the new one is trained on what the
    model gives now.

    Args:
        model: A SentenceTransformer or CrossEncoder as it was loaded.
        training: What is trained.

    Raises:
        InvalidSpec: The adapter names modules that the model does not have, or as
            :func:`aidocks.retrieval.trainable.require_one_adapter`.
    """
    makes_adapter = training.adapter.kind != "full" and not training.merge
    require_one_adapter(training.retriever, makes_adapter=makes_adapter)
    network = network_of(model)
    unload(network)
    without_dropout(model)
    embeds = isinstance(training, EmbeddingTraining)
    if training.adapter.kind == "full":
        model.requires_grad_(True)
        if embeds:
            # DDP would wait for its gradient in vain.
            for name in _tops(network):
                network.get_submodule(name).requires_grad_(False)
    else:
        model.requires_grad_(False)
        network.add_adapter(_configuration(network, training), ADAPTER)
    keep_exact(model)


def without_dropout(model: torch.nn.Module) -> None:
    """Switch off the dropout of the base: a short training gains nothing from it.

    So the loss of a step depends on the step alone, not on how many processes share it, and no time goes into random
    numbers. Factors have a dropout of their own, for whoever asks for it.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in _DROPOUTS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def unload(network: torch.nn.Module) -> None:
    """Add the active adapters to the weights, and take all adapters away."""
    layers = [
        (name, module) for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)
    ]
    wholes = [
        (name, module) for name, module in network.named_modules() if isinstance(module, ModulesToSaveWrapper)
    ]
    for name, layer in layers:
        layer.merge(safe_merge=True)
        _replace(network, name, layer.get_base_layer())
    for name, whole in wholes:
        _replace(network, name, whole.modules_to_save[whole.active_adapters[0]])
    if layers or wholes:
        # transformers would write an adapter in place of a model.
        network._hf_peft_config_loaded = False  # type: ignore[assignment]
        del network.peft_config


def trained_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return everything that is trained, by name, on the CPU; a tensor of several names under the first of them."""
    return {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def load_trained(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Give a model what another one has learned.

    Args:
        model: With the same adapter.
        state: Of :func:`trained_state`.

    Raises:
        RuntimeError: It is the state of another kind of training.
    """
    wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    wrong = sorted(wanted.keys() ^ state.keys())
    if wrong:
        raise RuntimeError(
            f"The checkpoint is of another training: {len(wrong)} tensors, such as {wrong[0]}."
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(state[name])


def _configuration(network: PreTrainedModel, training: RetrieverTraining) -> LoraConfig:
    adapter = training.adapter
    tops = _tops(network)
    heads = [] if isinstance(training, EmbeddingTraining) else tops
    names = {name.rpartition(".")[2] for name in heads}
    inside = _linear_names(network, tops)
    wanted = target_modules(network, [name for name in adapter.target_modules if name not in names])
    chosen = sorted(set(wanted) & inside)
    if not chosen:
        raise InvalidSpec(
            f"None of {', '.join(adapter.target_modules)} is in a layer of this model.",
            field="target_modules",
            value=list(adapter.target_modules),
            hint=f"There are {', '.join(sorted(inside))}.",
        )
    return LoraConfig(
        task_type=_task(network, training),
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.rslora,
        use_dora=adapter.kind == "dora",
        target_modules=chosen,
        exclude_modules=_excluded(network, chosen, tops),
        # A head is made of nothing, so it is trained and saved whole.
        modules_to_save=sorted({*names, *adapter.modules_to_save}) or None,
    )


def _task(network: PreTrainedModel, training: RetrieverTraining) -> TaskType:
    if isinstance(training, EmbeddingTraining):
        return TaskType.FEATURE_EXTRACTION
    decodes = network.get_output_embeddings() is not None
    return TaskType.CAUSAL_LM if decodes else TaskType.SEQ_CLS


def _tops(network: PreTrainedModel) -> list[str]:
    """Return the names of what stands above the layers: poolers, and the heads of a classifier."""
    tops = [name for name, _ in network.named_modules() if name.rpartition(".")[2] == _POOLER]
    if type(network).__name__.endswith("ForSequenceClassification"):
        tops += [
            name
            for name, child in network.named_children()
            if name != network.base_model_prefix and next(child.parameters(), None) is not None
        ]
    return [name for name in tops if next(network.get_submodule(name).parameters(), None) is not None]


def _linear_names(network: torch.nn.Module, tops: list[str]) -> set[str]:
    return {
        name.rpartition(".")[2]
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and not _within(name, tops)
    }


def _excluded(network: torch.nn.Module, chosen: list[str], tops: list[str]) -> list[str] | None:
    """Return those of the chosen names that are above the layers, in full."""
    found = [
        name
        for name, _ in network.named_modules()
        if name.rpartition(".")[2] in chosen and _within(name, tops)
    ]
    return found or None


def _within(name: str, tops: list[str]) -> bool:
    return any(name == top or name.startswith(f"{top}.") for top in tops)


def _replace(network: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, module)
