"""How a checkpoint stores matrices as two factors: names, shapes and config.json, and the way back to dense.

``X.weight`` [O, I] of rank K becomes ``X.factor_a.weight`` [O, K] and ``X.factor_b.weight`` [K, I], of which it is the
product. Every other tensor, the bias of X among them, keeps its name and its bytes.

config.json has a model type of its own, with the original configuration inside. So transformers refuses the
directory unless :mod:`aidocks.laser.factored` is imported; as the original type it would load it and fill each
missing ``X.weight`` with random numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aidocks.checkpoints.files import OutputFile, copy_file, write_text
from aidocks.checkpoints.header import TensorEntry
from aidocks.checkpoints.reader import Checkpoint
from aidocks.checkpoints.writer import (
    ShardPlan,
    ShardWriter,
    TensorPlan,
    parse_size,
    plan_shards,
    write_index,
)
from aidocks.errors import CorruptCheckpoint, IncompatibleModels, InvalidSpec

#: ``model_type`` of such a checkpoint. Whoever does not know it says so by this name: it is the module to import.
MODEL_TYPE = "aidocks.laser.factored"
#: What generation looks for in config.json itself where a model has no generation_config.json, beside special tokens.
_GENERATION = frozenset(
    {
        "do_sample",
        "length_penalty",
        "max_length",
        "no_repeat_ngram_size",
        "num_beams",
        "repetition_penalty",
        "temperature",
        "top_k",
        "top_p",
    }
)
_WEIGHT, _A, _B = ".weight", ".factor_a.weight", ".factor_b.weight"
#: Where a model's own class would read sizes: it fails there, with this text in the message.
_REFUSED_AT = ("vocab_size", "text_config")
_REFUSAL = (
    "stored as factors: import aidocks.laser.factored, then load it with AutoModelForCausalLM.from_pretrained"
)


class FactoredConfigFile(BaseModel):
    """What config.json of a checkpoint with factors says, beside what every reader looks for.

    Attributes:
        factor_ranks: Full name of each matrix that is stored as factors -> rank.
        base_model_type: ``model_type`` of the same model with dense matrices.
        base_config: The rest of its config.json. Were the type in it, the model's own class would take this part
            for its configuration, as transformers does with models that are made of several.
    """

    model_config = ConfigDict(frozen=True)

    factor_ranks: dict[str, Annotated[int, Field(ge=0)]] = Field(min_length=1)
    base_model_type: str
    base_config: dict[str, Any]

    @property
    def dense_config(self) -> dict[str, Any]:
        """config.json of the same model with dense matrices."""
        return {**self.base_config, "model_type": self.base_model_type}


def is_factored(config: Mapping[str, Any]) -> bool:
    """Say whether this config.json belongs to a checkpoint with factors."""
    return config.get("model_type") == MODEL_TYPE


def read_factored(config: Mapping[str, Any]) -> FactoredConfigFile:
    """Return what config.json of a checkpoint with factors says.

    Raises:
        IncompatibleModels: For the config.json of another kind of model.
        CorruptCheckpoint: Where it has the model type, but not what belongs to it.
    """
    if not is_factored(config):
        raise IncompatibleModels(
            f"A model of type {config.get('model_type')!r} is not stored as factors.",
            value=config.get("model_type"),
        )
    try:
        return FactoredConfigFile.model_validate(config)
    except ValidationError as error:
        flaw = error.errors()[0]
        where = ".".join(str(part) for part in flaw["loc"])
        raise CorruptCheckpoint(
            f"config.json of a model stored as factors is damaged: {where}: {flaw['msg']}."
        ) from error


def dense_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json of the same model with dense matrices: the one given, where they are dense already."""
    return read_factored(config).dense_config if is_factored(config) else dict(config)


def factored_config(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return config.json of a model of which these matrices (full name -> rank) are stored as factors.

    Args:
        config: Of the base, which may hold factors itself.
        ranks: As :func:`choose_factored` returns it; without any, the result is the configuration given.
    """
    if not ranks:
        return dict(config)
    known = read_factored(config).factor_ranks if is_factored(config) else {}
    base = dense_config(config)
    return {
        "model_type": MODEL_TYPE,
        "architectures": [f"Factored{name}" for name in base.get("architectures") or ()],
        "dtype": base.get("dtype") or base.get("torch_dtype"),
        **{key: _REFUSAL for key in _REFUSED_AT if key in base},
        **{key: value for key, value in base.items() if key.endswith("_token_id") or key in _GENERATION},
        "factor_ranks": dict(sorted((known | dict(ranks)).items())),
        "base_model_type": base.pop("model_type"),
        "base_config": base,
    }


def saves_room(shape: tuple[int, ...], rank: int) -> bool:
    """Say whether two factors of this rank have fewer entries than the matrix."""
    return rank * sum(shape) < prod(shape)


def factor_names(name: str) -> tuple[str, str]:
    """Return the names of the two factors of a matrix ``X.weight``."""
    module = name.removesuffix(_WEIGHT)
    assert module != name, f"{name} is not the weight of a module"
    return module + _A, module + _B


def matrix_name(tensor: str) -> str:
    """Return the name of the matrix that a tensor is a factor of; every other name as it is."""
    for ending in (_A, _B):
        if tensor.endswith(ending):
            return tensor.removesuffix(ending) + _WEIGHT
    return tensor


def choose_factored(
    entries: Mapping[str, TensorEntry], ranks: Mapping[str, int], linear: Iterable[str]
) -> dict[str, int]:
    """Return which matrices (full name -> rank) are worth storing as factors, and can be.

    Args:
        entries: Of the base.
        ranks: Full names of the matrices whose rank was reduced -> rank.
        linear: Names of matrices that transformers keeps as a linear map of its own, see
            :func:`aidocks.laser.factored.linear_weights`.
    """
    possible = set(linear)
    return {
        name: rank
        for name, rank in sorted(ranks.items())
        if name in possible and name.endswith(_WEIGHT) and saves_room(entries[name].shape, rank)
    }


def plan_tensors(entries: Mapping[str, TensorEntry], ranks: Mapping[str, int]) -> list[TensorPlan]:
    """Return every tensor of a result in which these matrices (full name -> rank) are stored as factors.

    In the order of the base, so that a file of the result mostly reads one of the base.
    """
    planned = []
    for name, entry in entries.items():
        if name not in ranks:
            planned.append(TensorPlan(name=name, dtype=entry.dtype, shape=entry.shape))
            continue
        rows, columns = entry.shape
        shapes = ((rows, ranks[name]), (ranks[name], columns))
        planned += [
            TensorPlan(name=factor, dtype=entry.dtype, shape=shape)
            for factor, shape in zip(factor_names(name), shapes, strict=True)
        ]
    return planned


def to_dense(source: Path, target: Path, *, max_shard_size: str = "5GB") -> tuple[OutputFile, ...]:
    """Write a checkpoint with factors as an ordinary one, for whatever reads no factors: GGUF, merges, engines.

    Every product is computed in fp32 (fp64 for fp64) and rounded once to the type that is stored; all else is copied
    as bytes.

    Args:
        source: Checkpoint directory with factors.
        target: Directory that does not exist yet, or is empty.
        max_shard_size: Largest weight file, such as 500MB or 5GB.

    Returns:
        The files written: weights, their index, config.json, tokenizer and what else belongs beside weights.

    Raises:
        IncompatibleModels: When the source is not stored as factors.
        CorruptCheckpoint: When a factor is missing, or two do not fit together.
        InvalidSpec: When the target holds something, or the size is none.
        InsufficientDisk: When it does not fit.
    """
    checkpoint = Checkpoint(source)
    stored = read_factored(checkpoint.config)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InvalidSpec(f"{target} is not an empty directory.", field="target", value=str(target))
    shards = plan_shards(_plan_dense(checkpoint, stored), parse_size(max_shard_size))
    target.mkdir(parents=True, exist_ok=True)
    written = [_write_dense(checkpoint, target, shard) for shard in shards]
    written.append(write_config(target, stored.dense_config))
    written += [copy_file(file, target / file.name) for file in checkpoint.metadata_files()]
    return (*written, *write_index(target, shards))


def write_config(directory: Path, config: Mapping[str, Any]) -> OutputFile:
    """Write config.json."""
    return write_text(directory / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _plan_dense(checkpoint: Checkpoint, stored: FactoredConfigFile) -> list[TensorPlan]:
    planned: dict[str, TensorPlan] = {}
    for name, rank in stored.factor_ranks.items():
        a, b = (checkpoint.entries.get(factor) for factor in factor_names(name))
        if a is None or b is None or a.dtype != b.dtype or len(a.shape) != 2 or len(b.shape) != 2:
            raise CorruptCheckpoint(f"{checkpoint.path.name} lacks a factor of {name}.", value=name)
        if not a.shape[1] == rank == b.shape[0]:
            raise CorruptCheckpoint(
                f"The factors of {name} are {list(a.shape)} and {list(b.shape)}, not of rank {rank}.",
                value=name,
            )
        planned[name] = TensorPlan(name=name, dtype=a.dtype, shape=(a.shape[0], b.shape[1]))
    names = dict.fromkeys(
        whole if (whole := matrix_name(name)) in planned else name for name in checkpoint.entries
    )
    return [planned.get(name) or _plan_copy(checkpoint.entries[name]) for name in names]


def _plan_copy(entry: TensorEntry) -> TensorPlan:
    return TensorPlan(name=entry.name, dtype=entry.dtype, shape=entry.shape)


def _write_dense(checkpoint: Checkpoint, target: Path, shard: ShardPlan) -> OutputFile:
    import torch

    with ShardWriter(target, shard) as writer:
        for tensor in shard.tensors:
            if tensor.name in checkpoint.entries:
                writer.copy(tensor.name, checkpoint.entries[tensor.name])
                continue
            a_OK, b_KI = (checkpoint.tensor(factor) for factor in factor_names(tensor.name))
            computed = torch.promote_types(a_OK.dtype, torch.float32)
            product_OI = a_OK.to(computed) @ b_KI.to(computed)
            writer.write(tensor.name, product_OI.to(a_OK.dtype))
    return writer.output
