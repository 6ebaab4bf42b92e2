"""The one place where a model that finds texts is loaded: for measuring, serving and training alike.

transformers fills weights that a checkpoint lacks with random numbers, and only warns. Here every tensor that the
network has must be in the files: a model of another architecture, or a head that was not saved, is refused and never
served. The one exception is the head of a reranker that is made of a plain encoder: it is made by the retriever's
``seed``, so that every process has the same one, and a training begins with the very model that was measured before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm, Pooling

from aidocks.errors import AIDocksError, CorruptCheckpoint, IncompatibleModels
from aidocks.retrieval.adding import add_adapters
from aidocks.retrieval.architecture import MODULES_FILE, TOLD_FILE, Architecture, architecture_of
from aidocks.retrieval.opening import needs_code
from aidocks.training.retriever import Retriever

#: Modules of sentence-transformers that may follow a transformer.
_FOLLOWING: dict[str, Any] = {
    "Pooling": Pooling,
    "Normalize": Normalize,
    "Dense": Dense,
    "LayerNorm": LayerNorm,
    "Dropout": Dropout,
}
_TEXT_ONLY: Any = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}


def load_embedding_model(retriever: Retriever, device: str, dtype: torch.dtype) -> SentenceTransformer:
    """Load an embedding model, in evaluation mode.

    A model of sentence-transformers keeps its modules; a plain encoder or decoder gets pooling, and normalisation
    where it is asked for. Its prompts are called ``query`` and ``passage`` (and ``document``). An adapter is added
    without being merged; of adapters for tasks the one that is asked for is active.

    Args:
        retriever: What is loaded.
        device: Of torch.
        dtype: Floating-point type of the weights.

    Raises:
        IncompatibleModels: transformers or PEFT cannot load it.
        CorruptCheckpoint: It lacks weights.
    """
    found = architecture_of(retriever.model)
    _require_code(retriever, found)
    with _loading(retriever, "an embedding model"):
        modules = _modules(retriever, found, dtype)
        told = _told(retriever)
        model = SentenceTransformer(
            modules=modules,
            device=device,
            local_files_only=True,
            trust_remote_code=retriever.remote_code,
            similarity_fn_name=told.get("similarity_fn_name"),
            truncate_dim=told.get("truncate_dim"),
        )
        missing = new_weights(network_of(model), retriever)
        # Mean pooling and its like have no use for what stands on top of the layers.
        _require_whole(retriever, [name for name in missing if "pooler" not in name.split(".")])
        make_weights(network_of(model), missing, seed=0)
        add_adapters(network_of(model), retriever, ())
    prompts = retriever.prompts
    model.prompts = {"query": prompts.query, "passage": prompts.passage, "document": prompts.passage}
    model.default_prompt_name = None
    _settle_tokenizer(model, retriever.max_length)
    return model.eval()


def load_cross_encoder(retriever: Retriever, device: str, dtype: torch.dtype) -> CrossEncoder:
    """Load a reranker, in evaluation mode: one score of a query and a passage.

    A plain encoder gets a head of its own, the same wherever the retriever's ``seed`` is the same; a decoder says yes
    or no. Of an adapter the head that was trained with it is loaded, and it must be there.

    Args:
        retriever: What is loaded.
        device: Of torch.
        dtype: Floating-point type of the weights.

    Raises:
        IncompatibleModels: transformers or PEFT cannot load it.
        CorruptCheckpoint: It lacks weights.
    """
    found = architecture_of(retriever.model)
    _require_code(retriever, found)
    is_listed = (retriever.model / MODULES_FILE).is_file()
    says_yes = found.family == "decoder" and found.labels is None
    with _loading(retriever, "a reranker"):
        model: CrossEncoder = CrossEncoder(
            str(retriever.model),
            device=device,
            local_files_only=True,
            trust_remote_code=retriever.remote_code,
            model_kwargs={"dtype": dtype, "use_safetensors": True},
            **({} if is_listed or says_yes else {"num_labels": 1}),
        )
        missing = new_weights(network_of(model), retriever)
        _require_whole(
            retriever, missing if found.kind or says_yes else [one for one in missing if _in_layers(one)]
        )
        make_weights(network_of(model), missing, retriever.seed)
        add_adapters(network_of(model), retriever, missing)
    prompts = retriever.prompts
    model.prompts = {name: text for name, text in prompts.model_dump().items() if text}
    model.default_prompt_name = None
    _settle_tokenizer(model, retriever.max_length)
    model.eval()
    return model


def network_of(model: SentenceTransformer | CrossEncoder) -> Any:
    """Return the transformers model within a model of sentence-transformers."""
    return model[0].model


def new_weights(network: Any, retriever: Retriever) -> tuple[str, ...]:
    """Return the parameters of a network that its checkpoint does not have, sorted.

    Args:
        network: As transformers made it of ``retriever.model``.
        retriever: What it was made of.
    """
    directory = retriever.model / architecture_of(retriever.model).transformer
    # On the meta device nothing is read but the headers.
    _, told = type(network).from_pretrained(
        directory,
        config=network.config,
        device_map="meta",
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    return tuple(sorted(told["missing_keys"]))


def make_weights(network: Any, names: tuple[str, ...], seed: int) -> None:
    """Give values to parameters that no file has: the same ones wherever the seed is the same.

    As BERT begins (Devlin et al. 2019, appendix A): matrices normal, with the standard deviation that the
    configuration says (0.02); biases 0; scales 1.

    Args:
        network: Transformers model.
        names: Of the parameters.
        seed: Of the values.
    """
    parameters = dict(network.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    deviation = float(getattr(network.config, "initializer_range", None) or 0.02)
    with torch.no_grad():
        for name in names:
            if name not in parameters:
                continue
            place = parameters[name]
            if place.dim() > 1:
                values = torch.empty(place.shape).normal_(0.0, deviation, generator=generator)
            else:
                values = torch.zeros(place.shape) if name.endswith("bias") else torch.ones(place.shape)
            place.copy_(values)


def stored_dtype(directory: Path) -> torch.dtype:
    """Return the floating-point type that most bytes of a model's weights have."""
    from collections import Counter

    from aidocks.checkpoints.dtypes import to_torch
    from aidocks.checkpoints.layout import read_entries

    sizes: Counter[str] = Counter()
    for entry in read_entries(directory).values():
        sizes[entry.dtype] += entry.nbytes
    named = next((to_torch(dtype) for dtype, _ in sizes.most_common()), torch.float32)
    return named if named.is_floating_point and named.itemsize > 1 else torch.float32


def _modules(retriever: Retriever, found: Architecture, dtype: torch.dtype) -> list[torch.nn.Module]:
    """Return the modules of an embedding model: those that its files list, or those that it needs."""
    settings: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    closed: dict[str, Any] = {"local_files_only": True, "trust_remote_code": retriever.remote_code}
    path = str(retriever.model)
    is_listed = (retriever.model / MODULES_FILE).is_file()
    if retriever.remote_code and is_listed:
        return list(SentenceTransformer(path, device="cpu", model_kwargs=settings, **closed).children())
    if is_listed:
        transformer = Transformer.load(path, subfolder=found.transformer, model_kwargs=settings, **closed)
    else:
        transformer = Transformer(
            path,
            model_kwargs=settings | closed,
            processor_kwargs=dict(closed),
            config_kwargs=dict(closed),
            # A chat template would make a message of every text.
            modality_config=_TEXT_ONLY,
            module_output_name="token_embeddings",
        )
    following = _following(retriever)
    if not any(isinstance(one, Pooling) for one in following):
        width = transformer.get_embedding_dimension()
        following.insert(0, Pooling(width, retriever.pooling or "mean"))
    if retriever.normalize is not None:
        following = [one for one in following if not isinstance(one, Normalize)]
        following += [Normalize()] if retriever.normalize else []
    return [transformer, *following]


def _following(retriever: Retriever) -> list[torch.nn.Module]:
    """Return the modules after the transformer, as the adapter's directory lists them, or else the model's."""
    places = [place for place in (retriever.adapter, retriever.model) if place is not None]
    beside = next((place for place in places if (place / MODULES_FILE).is_file()), None)
    if beside is None:
        return []
    listed = json.loads((beside / MODULES_FILE).read_text(encoding="utf-8"))
    return [
        _FOLLOWING[str(one["type"]).rpartition(".")[2]].load(
            str(beside), subfolder=str(one.get("path") or ""), local_files_only=True
        )
        for one in listed[1:]
    ]


def _told(retriever: Retriever) -> dict[str, Any]:
    """Return what sentence-transformers was told of the model as a whole."""
    for place in (retriever.adapter, retriever.model):
        if place is not None and (place / TOLD_FILE).is_file():
            told: dict[str, Any] = json.loads((place / TOLD_FILE).read_text(encoding="utf-8"))
            return told
    return {}


def _settle_tokenizer(model: SentenceTransformer | CrossEncoder, max_length: int) -> None:
    """Have the tokenizer cut at a length, and fill up shorter texts of a batch."""
    model.max_seq_length = max_length
    tokenizer, config = model.tokenizer, network_of(model).config
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id


def _in_layers(name: str) -> bool:
    """Tell whether a parameter is one of a layer or of the embeddings, and so no part of a head."""
    return any(part.isdecimal() or part.startswith("embed") for part in name.split("."))


def _require_whole(retriever: Retriever, missing: list[str] | tuple[str, ...]) -> None:
    """Refuse a checkpoint that lacks weights.

    Raises:
        CorruptCheckpoint: Naming the first of them.
    """
    if missing:
        raise CorruptCheckpoint(
            f"{retriever.name} lacks {len(missing)} of its model's weights, the first of them {missing[0]}.",
            value=retriever.name,
            hint="It is another architecture than its configuration says, or was not saved as a whole.",
        )


def _require_code(retriever: Retriever, found: Architecture) -> None:
    if found.needs_code and not retriever.remote_code:
        raise needs_code(retriever.name, found)


@contextmanager
def _loading(retriever: Retriever, what: str) -> Iterator[None]:
    """Load in silence, and say in one sentence what went wrong."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    # Progress is told by who runs units, in lines of its own.
    logging.disable_progress_bar()
    try:
        yield
    except (AIDocksError, torch.OutOfMemoryError):
        raise
    except (ValueError, OSError, KeyError, ImportError, RuntimeError, AttributeError, TypeError) as error:
        raise IncompatibleModels(
            f"{retriever.name} does not load as {what}: {_without_places(str(error), retriever)[:500]}",
            value=retriever.name,
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def _without_places(text: str, retriever: Retriever) -> str:
    """Return what a library says without the directories of this machine: it may be an answer of the service."""
    for place in (retriever.adapter, retriever.model):
        if place is not None:
            text = text.replace(str(place), place.name)
    return text
