"""Which files of a directory in Hugging Face layout are what: weights, configuration, what travels along."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from aidocks.checkpoints.header import TensorEntry, has_half_characters, read_header
from aidocks.checkpoints.writer import INDEX_FILE, SINGLE_FILE
from aidocks.errors import CorruptCheckpoint, UnknownModel, UnsafeCheckpoint

CONFIG_FILE = "config.json"
#: What an adapter in the layout of PEFT consists of.
ADAPTER_CONFIG_FILE, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
#: Endings of architectures that are causal language models: losses of text can be measured of them.
CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")
_SHARD_NAME = re.compile(r"[^/\\\0.][^/\\\0]{0,230}\.safetensors")
_MAX_JSON_BYTES = 256 << 20
#: What a configuration may name, and how long a name may be: errors repeat them.
_MOST_ARCHITECTURES, _LONGEST_NAME = 8, 200
#: Formats that are, or may hold, Python pickles: loading one can run code.
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_TRAVELS = frozenset({".json", ".jinja", ".txt", ".model", ".tiktoken"})
#: What a part in a sub-directory consists of.
_OF_MODULES = frozenset({".json", ".safetensors", ".txt", ".model"})
_LICENCES = ("license", "licence", "notice", "use_policy")
# What describes the parent's training or this installation's bookkeeping, not the model's use.
_STAYS = frozenset(
    {
        CONFIG_FILE,
        INDEX_FILE,
        "aidocks.json",
        ADAPTER_CONFIG_FILE,
        "all_results.json",
        "eval_results.json",
        "pytorch_model.bin.index.json",
        "train_results.json",
        "trainer_state.json",
        "requirements.txt",
    }
)


def read_config(directory: Path) -> dict[str, Any]:
    """Return config.json.

    Raises:
        CorruptCheckpoint: When it is missing, not a JSON object, or calls a model what no model is called.
        UnsafeCheckpoint: When the model consists of code that the checkpoint brings along.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise CorruptCheckpoint(
            f"{directory.name} holds weights but no {CONFIG_FILE}.",
            hint="Copy the configuration beside the weights; it says which architecture they belong to.",
        )
    config = read_json_object(path)
    _require_names(config, directory.name)
    if config.get("auto_map") and not _is_native(config.get("model_type")):
        raise UnsafeCheckpoint(
            f"{directory.name} needs Python code of its own (auto_map in {CONFIG_FILE}), and "
            f"transformers has no model type {config.get('model_type')!r}.",
            hint="AIDocks never runs code from a checkpoint; use a model that transformers supports itself.",
        )
    return config


def _require_names(config: dict[str, Any], name: str) -> None:
    architectures = config.get("architectures")
    names = [
        *(architectures if isinstance(architectures, list) else [architectures]),
        config.get("model_type"),
    ]
    if len(names) > _MOST_ARCHITECTURES + 1 or any(
        len(each) > _LONGEST_NAME if isinstance(each, str) else isinstance(each, list | dict)
        for each in names
    ):
        raise CorruptCheckpoint(f"{CONFIG_FILE} of {name} names no kind of model that there is.")


def read_json_object(path: Path) -> dict[str, Any]:
    """Return a JSON file whose top level is an object.

    Raises:
        CorruptCheckpoint: Naming the file and what is wrong with it.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"larger than {_MAX_JSON_BYTES >> 20} MiB")
        raw = path.read_bytes()
        document = json.loads(raw.decode())
        if has_half_characters(raw):
            raise ValueError("it has half of a character")
    except (OSError, ValueError, RecursionError) as error:
        # Errors of the system also name the directories of this machine.
        why = error.strerror if isinstance(error, OSError) else error
        raise CorruptCheckpoint(f"{path.name} of {path.parent.name} cannot be read: {why}.") from error
    if not isinstance(document, dict):
        raise CorruptCheckpoint(f"{path.name} of {path.parent.name} is not a JSON object.")
    return document


def read_entries(directory: Path) -> dict[str, TensorEntry]:
    """Return every tensor of the checkpoint: file after file, in the order of their data.

    Raises:
        UnknownModel: When there are no weights.
        UnsafeCheckpoint: When there are weights, but only in pickle formats.
        CorruptCheckpoint: When the files contradict each other or the format.
    """
    if (directory / SINGLE_FILE).is_file():
        return read_header(directory / SINGLE_FILE)[0]
    if (directory / INDEX_FILE).is_file():
        return _read_sharded(directory)
    raise _no_weights(directory)


def is_adapter(directory: Path) -> bool:
    """Tell whether a directory holds an adapter rather than a model."""
    return (directory / ADAPTER_CONFIG_FILE).is_file() and not (directory / CONFIG_FILE).is_file()


def weights_present(directory: Path) -> bool:
    """Tell whether every file of the weights, or of an adapter, is there, without reading any of them."""
    if is_adapter(directory):
        return (directory / ADAPTER_FILE).is_file()
    if not (directory / CONFIG_FILE).is_file():
        return False
    if (directory / SINGLE_FILE).is_file():
        return True
    try:
        weight_map = read_json_object(directory / INDEX_FILE).get("weight_map")
    except CorruptCheckpoint:
        return False
    shards = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not all(isinstance(name, str) and _SHARD_NAME.fullmatch(name) for name in shards):
        return False
    return bool(shards) and all((directory / name).is_file() for name in dict.fromkeys(shards))


def metadata_files(directory: Path) -> list[Path]:
    """Return what belongs beside new weights of the same model: tokenizer, template, licence and the like."""
    return sorted(path for path in directory.iterdir() if _travels(path.name) and path.is_file())


def module_files(directory: Path) -> list[Path]:
    """Return the files of a model's parts that lie in sub-directories of their own.

    Those are the modules that sentence-transformers lists (pooling, dense layers), and adapters for tasks. Copies of
    the weights in other formats, which lie in sub-directories, too, are not among them.
    """
    places = {place for place in _listed_modules(directory) if (directory / place).is_dir()}
    for config in directory.glob(f"*/{ADAPTER_CONFIG_FILE}"):
        # The adapter that a whole model was made with lies beside it for the record.
        if config.parent.name != "adapter" and (config.parent / ADAPTER_FILE).is_file():
            places.add(config.parent.name)
    return sorted(
        path
        for place in places
        for path in (directory / place).iterdir()
        if path.is_file() and not path.name.startswith(".") and path.suffix in _OF_MODULES
    )


def _listed_modules(directory: Path) -> set[str]:
    """Return the sub-directories that modules.json names, if there is one that can be read."""
    path = directory / "modules.json"
    try:
        listed = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    except (OSError, ValueError, RecursionError):
        return set()
    places = [one.get("path") for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    return {
        place
        for place in places
        if isinstance(place, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}", place)
    }


def is_tokenizer_file(path: Path) -> bool:
    """Tell whether a file beside weights belongs to the tokenizer or its chat template."""
    return path.suffix in (".model", ".tiktoken", ".jinja") or path.name in (
        "added_tokens.json",
        "chat_template.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    )


def _travels(name: str) -> bool:
    if name.startswith(".") or name in _STAYS or name.endswith(".index.json"):
        return False
    return Path(name).suffix in _TRAVELS or name.lower().startswith(_LICENCES)


def _read_sharded(directory: Path) -> dict[str, TensorEntry]:
    weight_map = read_json_object(directory / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _broken_index(directory, "it has no weight_map")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise _broken_index(directory, f"{str(shard)[:120]!r} is not the name of a weight file beside it")
    entries: dict[str, TensorEntry] = {}
    for shard in dict.fromkeys(weight_map.values()):
        if not (directory / shard).is_file():
            raise _broken_index(directory, f"the weight file {shard} that it names is missing")
        found = read_header(directory / shard)[0]
        for name, entry in found.items():
            if weight_map.get(name) != shard:
                raise _broken_index(
                    directory, f"{shard} holds the tensor {name[:200]}, which it does not place there"
                )
            entries[name] = entry
    missing = next((name for name in weight_map if name not in entries), None)
    if missing is not None:
        raise _broken_index(directory, f"{weight_map[missing]} does not hold the tensor {missing[:200]}")
    return entries


def _broken_index(directory: Path, flaw: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"The weights of {directory.name} are incomplete or contradict {INDEX_FILE}: {flaw}.",
        hint="Download or copy the whole checkpoint again.",
    )


def _no_weights(directory: Path) -> Exception:
    names = sorted(path.name for path in directory.iterdir())
    if ADAPTER_CONFIG_FILE in names:
        return UnknownModel(
            f"{directory.name} is an adapter, not a whole model.",
            hint="Merge it into its base model first: aidocks merge takes 'base+adapter' for a model.",
        )
    pickles = [name for name in names if Path(name).suffix in _PICKLES]
    if pickles:
        return UnsafeCheckpoint(
            f"{directory.name} has weights only as {pickles[0]}, a format that can run code when loaded.",
            hint="Convert it to safetensors on a machine that may run that code, "
            "or take a revision that has model.safetensors.",
        )
    ggufs = [name for name in names if name.endswith(".gguf")]
    if ggufs:
        return UnknownModel(
            f"{directory.name} has weights only as {ggufs[0]}.",
            hint="Import the GGUF file: aidocks models import.",
        )
    return UnknownModel(
        f"{directory.name} holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE}.",
        hint="Name a directory in Hugging Face layout with safetensors weights.",
    )


def _is_native(model_type: object) -> bool:
    """Tell whether transformers itself has this model type, without importing it."""
    if not isinstance(model_type, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", model_type):
        return False
    package = find_spec("transformers")
    roots = package.submodule_search_locations if package else None
    folder = model_type.replace("-", "_")
    return any((Path(root) / "models" / folder).is_dir() for root in roots or ())
