"""What a directory holds that finds texts: an embedding model, a reranker, or something either can be made of.

Read from configurations and headers alone: no torch, no weights. Whatever cannot be used as it stands is named here,
before any work: modules that are not understood, weights that are pickles, code that a model brings along.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from aidocks.checkpoints.layout import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CONFIG_FILE,
    read_entries,
    read_json_object,
)
from aidocks.errors import AIDocksError, CorruptCheckpoint, IncompatibleModels, UnsafeCheckpoint
from aidocks.models.card import read_license
from aidocks.retrieval.own_code import native_copy, native_source, why_own_code
from aidocks.training.retriever import Prompts, RetrieverKind
from aidocks.training.shapes import ModelShape, context_of, shape_of

MODULES_FILE = "modules.json"
#: What sentence-transformers says of a model as a whole.
TOLD_FILE = "config_sentence_transformers.json"
#: What it says of the transformer: how many tokens it reads.
TRANSFORMER_FILE = "sentence_bert_config.json"
#: Modules of sentence-transformers that are understood, by the last part of their names.
_MODULES = frozenset({"Transformer", "Pooling", "Normalize", "Dense", "LayerNorm", "Dropout", "LogitScore"})
_OWN = "sentence_transformers."
_QUERY_PROMPTS = ("query", "retrieval.query", "retrieval_query")
_PASSAGE_PROMPTS = (
    "passage",
    "document",
    "corpus",
    "retrieval.passage",
    "retrieval_passage",
    "retrieval.document",
)
#: Older files of sentence-transformers: setting -> pooling.
_OLD_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
#: The task of a model that has an adapter for queries and one for passages.
RETRIEVAL_TASK = "retrieval"
#: Its adapters, as Jina v3 calls them.
RETRIEVAL_SIDES = ("retrieval_query", "retrieval_passage")
#: Modules that get no factors: what is on top of the layers, and what most uses leave unused.
_ON_TOP = frozenset({"pooler", "classifier", "score", "lm_head", "cls", "embeddings", "predictions", "head"})
_LONGEST = 131_072


class Architecture(BaseModel):
    """What is known of a model that finds texts, without loading it."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    kind: RetrieverKind | None = Field(
        description="What is stored; None: an encoder or decoder of which either can be made."
    )
    family: Literal["encoder", "decoder"]
    model_type: str
    pooling: str | None = Field(description="As stored; several joined by '+'. None: the model does not say.")
    normalize: bool | None = Field(
        description="Vectors of length 1, as stored; None: the model does not say."
    )
    prompts: Prompts = Prompts()
    dimensions: int = Field(description="Length of its vectors.")
    max_length: int = Field(description="Tokens that it reads of a text, as its files say.")
    context: int | None = Field(description="Tokens that it could read at most, as its configuration says.")
    labels: int | None = Field(None, description="Of a sequence classifier: how many.")
    tasks: tuple[str, ...] = Field(
        (), description="Its adapters for tasks, and `retrieval` for query and passage."
    )
    licence: str | None = None
    needs_code: str | None = Field(
        None, description="Why it cannot be run without the Python code that it brings along; None: it can."
    )
    native: str | None = Field(None, description="Hub model with the same weights, without code of its own.")
    transformer: str = Field("", description="Sub-directory of the transformer; most have none.")
    shape: ModelShape

    @property
    def linear(self) -> tuple[str, ...]:
        """Last names of the matrices of its layers, sorted: what an adapter is put on.

        Without the pooler and the head: mean pooling leaves the pooler unused, and a weight without a gradient stops
        a training over several workers.
        """
        inner = [one for one in self.shape.linear if not _ON_TOP & set(one.name.split(".")[:-1])]
        return tuple(sorted({one.kind for one in inner}))

    def can_be(self, kind: RetrieverKind) -> bool:
        """Tell whether it is of a kind, or can be made so."""
        return self.kind in (None, kind)


def architecture_of(directory: Path) -> Architecture:
    """Return what a model's directory holds.

    Args:
        directory: In the layout of transformers or of sentence-transformers; not that of an adapter.

    Raises:
        IncompatibleModels: It is no model of texts, or has parts that are not understood, named.
        UnsafeCheckpoint: Some of its weights are there only as pickles.
        CorruptCheckpoint, UnknownModel: Files are missing or cannot be read.
    """
    try:
        return _read(directory)
    except AIDocksError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
        # Values of another form than anybody writes.
        raise CorruptCheckpoint(
            f"The configuration of {directory.name} is not understood: {error}.", value=directory.name
        ) from error


def _read(directory: Path) -> Architecture:
    modules = _modules(directory)
    inner = _transformer(directory, modules)
    if (inner / ADAPTER_CONFIG_FILE).is_file():
        raise IncompatibleModels(
            f"{directory.name} holds both a model and an adapter, and it is not clear which is meant.",
            value=directory.name,
            hint=f"Move {ADAPTER_CONFIG_FILE} and its weights to a directory of their own.",
        )
    if not (inner / CONFIG_FILE).is_file():
        raise CorruptCheckpoint(
            f"{directory.name} has no {CONFIG_FILE}.",
            value=directory.name,
            hint="Copy the configuration beside the weights; it says which architecture they belong to.",
        )
    config = read_json_object(inner / CONFIG_FILE)
    entries = read_entries(inner)
    told = _told(directory / TOLD_FILE)
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise IncompatibleModels(
            f"{directory.name} does not say of which type it is (model_type in {CONFIG_FILE}).",
            value=directory.name,
        )
    family = _family(config, model_type)
    kind, labels = _kind(config, modules, told, directory)
    shape = shape_of(config, entries)
    strange = next((name for name, _ in modules if name not in _MODULES), None)
    needs_code = why_own_code(config, entries, strange, is_decoder=family == "decoder")
    pooling, dimensions = _pooling(directory, modules, shape.hidden)
    return Architecture(
        kind=kind,
        family=family,
        model_type=model_type,
        pooling=pooling,
        normalize=any(one == "Normalize" for one, _ in modules) if modules else None,
        prompts=_prompts(told.get("prompts")),
        dimensions=dimensions,
        max_length=_max_length(inner, config),
        context=context_of(config),
        labels=labels,
        tasks=_tasks(directory),
        licence=read_license(directory),
        needs_code=needs_code,
        native=native_copy(directory, config) if needs_code else None,
        transformer="" if inner == directory else inner.name,
        shape=shape,
    )


def told_beside(adapter: Path, base: Architecture) -> Architecture:
    """Return what is known of a base, with what an adapter's directory says of its own use.

    Args:
        adapter: In PEFT's layout, maybe with the modules of sentence-transformers and a head beside it.
        base: What the adapter was trained on.
    """
    modules = _modules(adapter)
    told = _told(adapter / TOLD_FILE)
    known: dict[str, Any] = {}
    kind = _adapter_kind(adapter, modules, told)
    if kind is not None:
        known["kind"] = kind
    if kind == "reranker" and base.family == "encoder":
        known["labels"] = 1
    if any(name == "Pooling" for name, _ in modules):
        pooling, dimensions = _pooling(adapter, modules, base.shape.hidden)
        known |= {"pooling": pooling, "dimensions": dimensions}
        known["normalize"] = any(name == "Normalize" for name, _ in modules)
    if told.get("prompts"):
        known["prompts"] = _prompts(told["prompts"])
    length = _told(adapter / TRANSFORMER_FILE).get("max_seq_length")
    if isinstance(length, int) and length > 0:
        known["max_length"] = min(length, base.context or length)
    return base.model_copy(update=known)


def _adapter_kind(
    adapter: Path, modules: list[tuple[str, str]], told: Mapping[str, Any]
) -> RetrieverKind | None:
    """Return what an adapter was trained for, if its directory says."""
    task = read_json_object(adapter / ADAPTER_CONFIG_FILE).get("task_type")
    is_reranker = told.get("model_type") == "CrossEncoder" or any(name == "LogitScore" for name, _ in modules)
    if task == "SEQ_CLS" or is_reranker:
        return "reranker"
    return "embedding" if task == "FEATURE_EXTRACTION" or modules else None


def _told(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _modules(directory: Path) -> list[tuple[str, str]]:
    """Return last name and sub-directory of every module; none where there is no list of them.

    Modules of a name that is not sentence-transformers' keep the whole of it: they are code of the model's own.
    """
    path = directory / MODULES_FILE
    if not path.is_file():
        return []
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        found = [(str(one["type"]), str(one.get("path") or "")) for one in listed]
    except (OSError, ValueError, TypeError, KeyError, RecursionError, AttributeError) as error:
        raise CorruptCheckpoint(f"{MODULES_FILE} of {directory.name} is no list of modules.") from error
    modules = []
    for name, place in found:
        if PurePosixPath(place).is_absolute() or ".." in PurePosixPath(place).parts or "\\" in place:
            raise CorruptCheckpoint(f"{MODULES_FILE} of {directory.name} leads out of it: {place!r}.")
        last = name.rpartition(".")[2]
        if name.startswith(_OWN) and last not in _MODULES:
            raise IncompatibleModels(
                f"{directory.name} has a module {last}, which AIDocks does not know how to train or to serve.",
                value=directory.name,
                hint="Understood are models of a transformer, pooling, dense layers and normalisation.",
            )
        if place and last == "Dense":
            _require_safetensors(directory / place)
        modules.append((last if name.startswith(_OWN) else name, place))
    return modules


def _require_safetensors(module: Path) -> None:
    if not (module / "model.safetensors").is_file():
        raise UnsafeCheckpoint(
            f"The module {module.name} of {module.parent.name} has no weights in safetensors format.",
            value=module.parent.name,
            hint="Load it with sentence-transformers on a machine that may run pickles, and save it again.",
        )


def _transformer(directory: Path, modules: list[tuple[str, str]]) -> Path:
    """Return the directory of the transformer itself."""
    if not modules:
        return directory
    name, place = modules[0]
    if name in _MODULES and name != "Transformer":
        raise IncompatibleModels(
            f"{directory.name} begins with {name}, and not with a transformer.", value=directory.name
        )
    return directory / place if place else directory


def _kind(
    config: Mapping[str, Any], modules: list[tuple[str, str]], told: Mapping[str, Any], directory: Path
) -> tuple[RetrieverKind | None, int | None]:
    """Return what is stored, and how many labels it has if it classifies."""
    said = told.get("model_type")
    if said not in (None, "SentenceTransformer", "CrossEncoder"):
        raise IncompatibleModels(
            f"{directory.name} is a {said}: its vectors are no dense ones, one for each text.",
            value=directory.name,
            hint="Take a model whose vectors are dense.",
        )
    labels = _labels(config) if _ending(config, "ForSequenceClassification") else None
    if said == "CrossEncoder" or any(name == "LogitScore" for name, _ in modules):
        return "reranker", labels
    if modules:
        return "embedding", None
    return ("reranker" if labels == 1 else None), labels


def _labels(config: Mapping[str, Any]) -> int:
    names = config.get("id2label")
    if isinstance(names, Mapping) and names:
        return len(names)
    count = config.get("num_labels")
    return count if isinstance(count, int) else 2


def _ending(config: Mapping[str, Any], *endings: str) -> bool:
    named = config.get("architectures")
    return isinstance(named, list) and any(isinstance(one, str) and one.endswith(endings) for one in named)


def _family(config: Mapping[str, Any], model_type: str) -> Literal["encoder", "decoder"]:
    """Tell decoders, which read from left to right, from encoders."""
    if _ending(config, "ForCausalLM", "LMHeadModel"):
        return "decoder"
    if _ending(config, "ForMaskedLM"):
        return "encoder"
    classes = native_source(model_type)
    masked = re.search(r"^class \w+ForMaskedLM\b", classes, re.M)
    causal = re.search(r"^class \w+(ForCausalLM|LMHeadModel)\b", classes, re.M)
    return "decoder" if causal and not masked else "encoder"


def _pooling(directory: Path, modules: list[tuple[str, str]], hidden: int) -> tuple[str | None, int]:
    """Return how vectors of tokens become that of the text, and the length of the vectors."""
    pooling, dimensions = None, hidden
    for name, place in modules:
        if name == "Pooling":
            settings = read_json_object(directory / place / CONFIG_FILE)
            modes = settings.get("pooling_mode") or [
                mode for key, mode in _OLD_POOLING.items() if settings.get(key)
            ]
            listed = [modes] if isinstance(modes, str) else [str(mode) for mode in modes]
            listed = listed or ["mean"]
            width = settings.get("embedding_dimension") or settings.get("word_embedding_dimension") or hidden
            pooling, dimensions = "+".join(listed), int(width) * len(listed)
        elif name == "Dense":
            dimensions = int(
                read_json_object(directory / place / CONFIG_FILE).get("out_features") or dimensions
            )
    return pooling, dimensions


def _prompts(stored: Any) -> Prompts:
    found = stored if isinstance(stored, Mapping) else {}
    query = next((found[key] for key in _QUERY_PROMPTS if isinstance(found.get(key), str)), "")
    passage = next((found[key] for key in _PASSAGE_PROMPTS if isinstance(found.get(key), str)), "")
    return Prompts(query=query, passage=passage)


def _max_length(inner: Path, config: Mapping[str, Any]) -> int:
    """Return how many tokens a model reads: as sentence-transformers was told, else by tokenizer and positions."""
    context = context_of(config)
    if context and str(config.get("model_type")) in (
        "roberta",
        "xlm-roberta",
        "camembert",
        "mpnet",
        "longformer",
    ):
        # Their positions begin after that of the padding.
        context -= 2
    said = _told(inner / TRANSFORMER_FILE).get("max_seq_length")
    if isinstance(said, int) and said > 0:
        # There is no embedding for a place beyond the context.
        return min(said, context or _LONGEST, _LONGEST)
    tokenizer = _told(inner / "tokenizer_config.json").get("model_max_length")
    known = [one for one in (context, tokenizer) if isinstance(one, int | float) and 0 < one <= _LONGEST]
    return int(min(known)) if known else 512


def _tasks(directory: Path) -> tuple[str, ...]:
    """Return the adapters for tasks that lie in sub-directories."""
    names = sorted(
        path.parent.name
        for path in directory.glob(f"*/{ADAPTER_CONFIG_FILE}")
        if (path.parent / ADAPTER_FILE).is_file() and path.parent.name != "adapter"
    )
    return (RETRIEVAL_TASK, *names) if set(RETRIEVAL_SIDES) <= set(names) else tuple(names)
