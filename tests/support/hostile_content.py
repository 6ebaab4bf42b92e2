"""What hostile files hold: headers that lie, tables, YAML and GGUF, sound but for one thing."""

from __future__ import annotations

import io
import json
import random
import struct
from math import prod
from typing import Any

from tests.support.hostile_bytes import Raw, changed_bytes, changed_document, hostile_value, json_text

NAMES = (
    "a",
    "b.c",
    "model.norm.weight",
    "é",
    "",
    "\0",
    "x" * 600,
    "../a",
    "__metadata__",
    " ",
    "\U0001f600",
    Raw('"\\udfff"'),
)
_SHAPES = ((2, 3), (), (0,), (3, 1), (1, 1, 1), (0, 2**20))
_ABSURD_SHAPES = ((0, 2**62), (0, 2**62, 2**62), (1,) * 65, (2**62,), (2**32, 2**32))


def hostile_text(chance: random.Random) -> str:
    """Return a text that is no good name."""
    value = hostile_value(chance)
    return (
        value
        if isinstance(value, str)
        else chance.choice(("..", "a/b", "\udc80", "config.json", "", "/", "é"))
    )


def some_shape(chance: random.Random) -> tuple[int, ...]:
    """Return a shape, mostly a sound one."""
    return chance.choice(_SHAPES if chance.random() < 0.9 else _ABSURD_SHAPES)


def lying_header(chance: random.Random, header: dict[str, Any], data: bytes) -> tuple[str, bytes]:
    """Return a header that is sound, or wrong in one of the ways that a format's own invariants name."""
    names = [name for name in header if name != "__metadata__"]
    act = chance.randrange(12)
    if not names or act == 0:
        shape = some_shape(chance)
        header["z"] = {"dtype": "U8", "shape": list(shape), "data_offsets": [len(data), len(data)]}
        return json_text(header), data
    entry = header[chance.choice(names)]
    begin, end = entry["data_offsets"]
    if act == 1:
        entry["data_offsets"] = chance.choice(
            ([begin + 1, end + 1], [end, begin], [-1, end], [begin, 2**62], [begin], [begin, end, end])
        )
    elif act == 2:
        entry["shape"] = (
            list(some_shape(chance))
            if chance.random() < 0.5
            else [chance.choice((-1, 2**62, 2**64, 1.0, True, "2", None))]
        )
    elif act == 3:
        entry["dtype"] = chance.choice(
            ("F4", "F6_E2M3", "C64", "F128", "f32", "", None, 5, "F8_E8M0", "BOOL")
        )
    elif act == 4:
        header[chance.choice(NAMES)] = dict(entry)
    elif act == 5:
        return Raw(json_text(header)[:-1] + f",{json_text(names[0])}:{json_text(entry)}}}"), data
    elif act == 6:
        data = chance.choice((data[:-1], data + b"\0", b"", data * 2, data + bytes(4096)))
    elif act == 7:
        header["__metadata__"] = chance.choice(({"a": 1}, [], "x", None, {"a": "b" * 100_000}, {"\0": ""}))
    elif act == 8:
        return json_text(header) + chance.choice((" " * 64, "\0", "{}", "\n\n", "x")), data
    elif act < 11:
        header = changed_document(chance, header)
    return json_text(header), data


def written(chance: random.Random, content: Any) -> bytes:
    act = chance.random()
    if act < 0.04:
        return json_text(hostile_value(chance)).encode("utf-8", "surrogatepass")
    text = json_text(changed_document(chance, content) if act < 0.8 else content).encode(
        "utf-8", "surrogatepass"
    )
    return changed_bytes(chance, text) if act > 0.7 else text


def table(chance: random.Random, suffix: str, kept: list[dict[str, Any]]) -> bytes:
    """Return rows as a file of some ending, wrong in one way or another."""
    if suffix == ".parquet":
        return _parquet(chance, kept)
    wrong = [changed_document(chance, row) if chance.random() < 0.3 else row for row in kept]
    if suffix in (".jsonl", ".json"):
        lines = [json_text(row if isinstance(row, dict) else {"a": row}) for row in wrong]
        whole = "\n".join(lines) if chance.random() < 0.5 else "[" + ",\n".join(lines) + "]"
    elif suffix == ".txt":
        whole = "\n\n".join(json_text(row) for row in wrong)
    else:
        mark = "," if suffix == ".csv" else "\t"
        names = list(kept[0])
        cells = [
            [json.dumps(row.get(name)) if chance.random() < 0.9 else '"\n' for name in names] for row in kept
        ]
        whole = "\n".join(mark.join(line) for line in [names, *cells])
    content = whole.encode(chance.choice(("utf-8", "utf-8", "utf-8", "utf-16", "utf-8-sig")), "surrogatepass")
    return changed_bytes(chance, content) if chance.random() < 0.5 else content


def _parquet(chance: random.Random, kept: list[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    made = pa.Table.from_pylist([{key: json.dumps(value) for key, value in row.items()} for row in kept])
    extra = chance.choice(("null", "duration", "binary", "map", "double", "large", ""))
    count = made.num_rows
    more = {
        "null": pa.nulls(count), "duration": pa.array([2**62] * count, pa.duration("ns")),
        "binary": pa.array([b"\xff"] * count),
        "map": pa.array([[("a", 1), ("a", 2)]] * count, pa.map_(pa.string(), pa.int64())),
        "double": pa.array([float("nan")] * count), "large": pa.array([2**40] * count, pa.timestamp("s")),
    }  # fmt: skip
    if extra:
        made = made.append_column(chance.choice(("text", "prompt", "more", "")), more[extra])
    stream = io.BytesIO()
    pq.write_table(made, stream, compression=chance.choice(("NONE", "SNAPPY", "ZSTD")))
    return changed_bytes(chance, stream.getvalue()) if chance.random() < 0.8 else stream.getvalue()


def yaml_text(chance: random.Random, body: Any) -> str:
    """Return a request as YAML (of which JSON is a part), with what YAML alone can do."""
    text = json_text(body)
    act = chance.randrange(9)
    if act == 0:
        lines = ["a0: &a0 [x, x]"]
        depth = chance.choice((5, 25, 300))
        lines += [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]" for n in range(1, depth)]
        return "\n".join([*lines, f"models: *a{depth - 1}"])
    if act == 1:
        return "a: &a\n  b: *a\nmodels: [*a]\n"
    if act == 2:
        return "models: " + "[" * chance.choice((50, 2000, 100_000))
    if act == 3:
        tag = chance.choice(("!!python/object/apply:os.system [x]", "!!binary ====", "!!int maybe",
                             "!!timestamp 9999-99-99",
                             "!!set {a, b}", "!!omap [a]", "!<tag:x> y", "!!float .inf",
                             "!!int 0b2", "0o9", "1:99:99", "!!str"))  # fmt: skip
        return f"name: {tag}\nmodels: {text}"
    if act == 4:
        return f"<<: [{text}, {text}]\n<<: *x\n? [a]\n: b\n"
    if act == 5:
        return "---\n" * chance.choice((2, 2000)) + text
    if act == 6:
        return "".join(f"{'  ' * n}a:\n" for n in range(chance.choice((30, 900)))) + "x"
    return text


def gguf_file(chance: random.Random) -> bytes:
    """Return a GGUF file of a one-layer model, mostly a sound one: magic, version, counts, fields, tensors, data."""
    fields, tensors = _gguf_fields(chance), dict(_GGUF_TENSORS)
    if chance.random() < 0.2:
        fields.pop(chance.choice(list(fields)))
    if chance.random() < 0.2:
        tensors[chance.choice(list(tensors))] = chance.choice(
            ((32,), (64, 32), (0, 32), (32, 2**59), (1,) * 9)
        )
    head, data = b"", b""
    for name, shape in tensors.items():
        kind = chance.choice((0, 1, 2, 8)) if chance.random() < 0.99 else chance.choice((6, 12, 40, 2**31))
        head += _gguf_text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        head += struct.pack("<IQ", kind, len(data))
        data += bytes(min(prod(shape), 1 << 14) // 32 * {0: 128, 1: 64, 2: 18, 8: 34}.get(kind, 32))
        data += bytes(-len(data) % 32)
    version = chance.choice((1, 2, 2**31)) if chance.random() < 0.05 else 3
    start = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(fields))
    start += b"".join(
        _gguf_text(key) + value for key, value in chance.sample(list(fields.items()), len(fields))
    )
    start += head
    return start + bytes(-len(start) % 32) + data


#: Bytes that have no character of their own to stand for them in a vocabulary.
_BLANK = [*range(33), *range(127, 161), 173]
_ALPHABET = [chr(256 + _BLANK.index(byte) if byte in _BLANK else byte) for byte in range(256)]
_GGUF_WORDS = ("<s>", "</s>", *_ALPHABET, "ab")
_GGUF_TENSORS: dict[str, tuple[int, ...]] = {
    "token_embd.weight": (32, len(_GGUF_WORDS)), "output_norm.weight": (32,),
    **{f"blk.0.{name}.weight": (32,) for name in ("attn_norm", "ffn_norm")},
    **{f"blk.0.{name}.weight": (32, 32) for name in ("attn_q", "attn_k", "attn_v", "attn_output",
                                                     "ffn_gate", "ffn_up", "ffn_down")},
}  # fmt: skip


def _gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _gguf_fields(chance: random.Random) -> dict[str, bytes]:
    """Return names and values; a value is the number of its type and its bytes."""

    def mostly(sound: int, *others: int) -> bytes:
        return struct.pack("<II", 4, sound if chance.random() < 0.95 else chance.choice(others))

    def text(value: str) -> bytes:
        return struct.pack("<I", 8) + _gguf_text(value)

    count = len(_GGUF_WORDS)
    words = b"".join(map(_gguf_text, _GGUF_WORDS))
    return {
        "general.architecture": text("llama"), "llama.attention.head_count": mostly(2, 0, 1, 3, 33),
        "llama.embedding_length": mostly(32, 0, 31, 2**32 - 1), "llama.feed_forward_length": mostly(32, 0, 64),
        "llama.context_length": mostly(64, 0, 2**32 - 1), "llama.block_count": mostly(1, 0, 2, 2**32 - 1),
        "llama.attention.layer_norm_rms_epsilon": struct.pack("<If", 6, 1e-5),
        "tokenizer.ggml.model": text("gpt2"),
        "tokenizer.ggml.pre": text("smollm" if chance.random() < 0.95 else "x"),
        "tokenizer.ggml.tokens": struct.pack("<IIQ", 9, 8, count) + words,
        "tokenizer.ggml.token_type": struct.pack(f"<IIQ{count}i", 9, 5, count, 3, 3, *[1] * (count - 2)),
        "tokenizer.ggml.merges": struct.pack("<IIQ", 9, 8, 1) + _gguf_text("a b" if chance.random() < 0.95 else "a"),
        "tokenizer.ggml.bos_token_id": mostly(0, count), "tokenizer.ggml.eos_token_id": mostly(1, 2**32 - 1),
    }  # fmt: skip
