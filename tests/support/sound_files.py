"""Small sound files of every kind that AIDocks reads: what hostile ones are made from. No torch is needed."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

HIDDEN, INNER, LAYERS, VOCABULARY = 8, 16, 2, 12
_WIDTHS = {"F32": 4, "BF16": 2, "I64": 8, "U8": 1}

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32", "hidden_act": "silu",
    "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 4, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": [1],
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
}  # fmt: skip
QUANTISATIONS: tuple[dict[str, Any], ...] = (
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
     "llm_int8_skip_modules": ["lm_head"]},
    {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "modules_in_block_to_quantize": [["a"]]},
    {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": None},
)  # fmt: skip
ADAPTER_CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "base_model_name_or_path": "tiny", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0,
    "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "bias": "none", "use_rslora": False, "use_dora": False,
    "fan_in_fan_out": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "inference_mode": True,
    "layers_to_transform": None, "init_lora_weights": True,
}  # fmt: skip
_WORDS = ["<s>", "</s>", "<pad>", *"abcdefghi"]
TOKENIZER: dict[str, Any] = {
    "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
    "added_tokens": [
        {"id": number, "content": word, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True} for number, word in enumerate(_WORDS[:3])
    ],
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "post_processor": None, "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False,
              "vocab": {word: number for number, word in enumerate(_WORDS)}, "merges": []},
}  # fmt: skip
BESIDE: dict[str, Any] = {
    "config.json": CONFIG,
    "tokenizer.json": TOKENIZER,
    "tokenizer_config.json": {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": {"content": "</s>"},
        "model_max_length": 64, "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}],
        "added_tokens_decoder": {"0": {"content": "<s>", "special": True}},
    },
    "generation_config.json": {"bos_token_id": 0, "eos_token_id": [1], "do_sample": True, "temperature": 0.7},
    "special_tokens_map.json": {"bos_token": "<s>", "additional_special_tokens": ["</s>"]},
    "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
                     {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}],
    "config_sentence_transformers.json": {"prompts": {"query": "q: "}, "default_prompt_name": None},
}  # fmt: skip
MANIFEST: dict[str, Any] = {
    "schema_version": 1, "name": "made", "created_at": "2026-01-01T00:00:00Z", "operation": "laser", "job_id": "job-1",
    "spec": {"base_model_name": "tiny"}, "code_version": "0", "metrics": {"loss": 1.5}, "parameters": 10,
    "dtype": "F32",
    "parents": [{"field": "base_model_name", "reference": "tiny", "content_hash": "0" * 64, "path_name": "tiny"}],
    "files": [{"path": "config.json", "bytes": 2, "sha256": "0" * 64}], "architecture": "LlamaForCausalLM", "bytes": 2,
    "sections": [{"title": "T", "text": ["a"], "table": {"header": ["h"], "rows": [["1"]], "strong": [[0, 0]]}}],
}  # fmt: skip
DATASET: dict[str, Any] = {
    "id": "file-" + "0" * 24, "name": "rows", "filename": "rows.jsonl", "bytes": 3, "sha256": "0" * 64,
    "created_at": "2026-01-01T00:00:00Z", "purpose": "fine-tune", "rows": 1,
}  # fmt: skip
IDENTITY: dict[str, Any] = {
    "base_model": "0" * 64, "method": "sft", "dataset": "0" * 64, "optim": "adamw_torch", "deepspeed": "off",
    "adapter": {"kind": "lora", "rank": 8},
}  # fmt: skip
ROWS: tuple[tuple[dict[str, Any], ...], ...] = (
    ({"text": "One text."}, {"text": "Another text."}),
    ({"instruction": "Add 1 and 2.", "input": "", "output": "3"},
     {"instruction": "Say a.", "input": "b", "output": "a"}),
    (
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me", "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}]},
    ),
    ({"prompt": "p", "chosen": "good", "rejected": "bad"}, {"prompt": "q", "chosen": "yes", "rejected": "no"}),
    ({"prompt": "p", "completion": "c", "label": True}, {"prompt": "q", "completion": "d", "label": False}),
    ({"query": "what", "positive": "that", "negative": "this"}, {"query": "who", "positive": "me", "negative": "you"}),
    ({"query": "what", "passages": ["a", "b"], "labels": [1, 0]}, {"query": "who", "passages": ["c"], "labels": [1]}),
    ({"sentence1": "a cat", "sentence2": "a dog", "score": 0.5}, {"sentence1": "b", "sentence2": "c", "score": 0.1}),
)  # fmt: skip
#: Operation -> a request of it, in which `MODEL` stands for a model and `ROWS` for a file of rows.
REQUESTS: dict[str, dict[str, Any]] = {
    "laser": {"base_model_name": "MODEL", "laser_model_name": "made", "keep": [0.5]},
    "laser-scan": {"model": "MODEL"},
    "byo-moe": {"base_model": "MODEL", "name": "made", "experts": [
        {"source_model": "MODEL", "positive_prompts": ["add"]},
        {"source_model": "MODEL", "positive_prompts": ["write"]}]},
    "merge": {"merge_method": "linear", "name": "made", "models": [
        {"model": "MODEL", "parameters": {"weight": [0.5, 1]}}, {"model": "MODEL", "parameters": {"weight": 0.5}}],
        "dtype": "bfloat16", "tokenizer_source": "union"},
    "merge-evolve": {"name": "made", "merge_method": "linear", "models": [{"model": "MODEL"}, {"model": "MODEL"}],
                     "objective": "perplexity:prose", "parameters": {"weight": {"min": 0, "max": 1}}},
    "extract-lora": {"base_model": "MODEL", "model": "MODEL", "name": "made", "rank": 2},
    "train-llm": {"base_model": "MODEL", "dataset": "ROWS", "name": "made", "max_steps": 1},
    "train-emb": {"base_model": "MODEL", "dataset": "ROWS", "name": "made", "max_steps": 1},
    "train-rerank": {"base_model": "MODEL", "dataset": "ROWS", "name": "made", "max_steps": 1},
    "mine-negatives": {"model": "MODEL", "dataset": "ROWS", "name": "made"},
    "train": {"base_model_path": "MODEL", "config": {"training_data": "ROWS", "max_steps": 1}},
}  # fmt: skip


def header_of(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> tuple[dict[str, Any], bytes]:
    """Return the header of a safetensors file and its data: numbers that differ from byte to byte."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        size = _WIDTHS[dtype]
        for axis in shape:
            size *= axis
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    return header, bytes(index * 7 % 61 for index in range(position))


def safetensors(header: str | bytes, data: bytes, length: int | None = None) -> bytes:
    """Return a file of a header's text and data; ``length`` is what it says of its header, if that is to be a lie."""
    text = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return struct.pack("<Q", (len(text) if length is None else length) % 2**64) + text + data


def llama_tensors() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the tensors of the model that CONFIG describes."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.embed_tokens.weight": ("F32", (VOCABULARY, HIDDEN))
    }
    for layer in range(LAYERS):
        shapes = {
            "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,), "self_attn.q_proj": (8, HIDDEN),
            "self_attn.k_proj": (4, HIDDEN), "self_attn.v_proj": (4, HIDDEN), "self_attn.o_proj": (HIDDEN, 8),
            "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
        }  # fmt: skip
        found |= {f"model.layers.{layer}.{name}.weight": ("F32", shape) for name, shape in shapes.items()}
    return found | {"model.norm.weight": ("F32", (HIDDEN,))}


def write_model(directory: Path) -> Path:
    """Write a sound model."""
    directory.mkdir(parents=True, exist_ok=True)
    header, data = header_of(llama_tensors())
    (directory / "model.safetensors").write_bytes(safetensors(json.dumps(header), data))
    for name, content in BESIDE.items():
        if not name.startswith(("modules", "config_sent")):
            (directory / name).write_text(json.dumps(content))
    return directory


def write_adapter(directory: Path) -> Path:
    """Write a sound adapter of such a model."""
    directory.mkdir(parents=True, exist_ok=True)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    header, data = header_of(
        {f"{prefix}.lora_A.weight": ("F32", (2, HIDDEN)), f"{prefix}.lora_B.weight": ("F32", (8, 2))}
    )
    (directory / "adapter_model.safetensors").write_bytes(safetensors(json.dumps(header), data))
    (directory / "adapter_config.json").write_text(json.dumps(ADAPTER_CONFIG))
    return directory
