"""What hostile files hold: headers that lie, tables, YAML and GGUF, sound but for one thing."""

from __future__ import annotations

import io
import json
import random
import struct
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
_SHAPES = (
    (2, 3),
    (),
    (0,),
    (0, 2**62),
    (0, 2**62, 2**62),
    (1,) * 65,
    (2**62,),
    (2**32, 2**32),
    (3, 1),
    (1, 1, 1),
)


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
    return chance.choice(_SHAPES)


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
    """Return a GGUF file of a few fields and tensors: magic, version, counts, fields, tensors, data."""

    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text)) + text.encode()

    def number(key: str, value: int) -> bytes:
        return string(key) + struct.pack("<II", 4, value)

    words = [string(word) for word in ("<s>", "</s>", "a", "b", "ab")]
    fields = [
        string("general.architecture") + struct.pack("<I", 8) + string("llama"),
        number("llama.attention.head_count", chance.choice((1, 2, 0))), number("llama.embedding_length", 32),
        number("llama.feed_forward_length", 32), number("llama.context_length", 64), number("llama.block_count", 1),
        string("llama.attention.layer_norm_rms_epsilon") + struct.pack("<If", 6, 1e-5),
        string("tokenizer.ggml.model") + struct.pack("<I", 8) + string("gpt2"),
        string("tokenizer.ggml.pre") + struct.pack("<I", 8) + string(chance.choice(("smollm", "llama-bpe", "x"))),
        string("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, len(words)) + b"".join(words),
        string("tokenizer.ggml.token_type") + struct.pack("<IIQ", 9, 5, 5) + struct.pack("<5i", 3, 3, 1, 1, 1),
        string("tokenizer.ggml.merges") + struct.pack("<IIQ", 9, 8, 1) + string("a b"),
        number("tokenizer.ggml.bos_token_id", 0), number("tokenizer.ggml.eos_token_id", chance.choice((1, 99))),
    ]  # fmt: skip
    chance.shuffle(fields)
    fields = fields[: chance.choice((len(fields), len(fields), len(fields) - 1))]
    shapes = {
        "token_embd.weight": (32, 5),
        "output_norm.weight": (32,),
        "blk.0.attn_q.weight": (32, 32),
        "blk.0.attn_k.weight": (32, 32),
    }
    head, data = b"", b""
    for name, shape in shapes.items():
        kind = chance.choice((0, 0, 1, 8, 2, 40))
        head += string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        head += struct.pack("<IQ", kind, len(data))
        size = shape[0] * (shape[1] if len(shape) > 1 else 1) * {0: 4, 1: 2}.get(kind, 2)
        data += bytes(-(-size // 32) * 32)
    start = (
        b"GGUF"
        + struct.pack("<IQQ", chance.choice((3, 3, 3, 2, 1)), len(shapes), len(fields))
        + b"".join(fields)
        + head
    )
    return start + bytes(-len(start) % 32) + data
