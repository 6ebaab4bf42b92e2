"""Hostile files of every kind that AIDocks reads, and the public doors through which they are opened.

Each kind is a function of a seeded chance and an empty directory: it writes files there and yields what it is that
opens them. A door answers, or refuses with an error of ours; whatever else it does is a fault, and so is a look at what
lies beside the directory. Where a door answers, the kind compares the answer with what plain code reads there.
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.support import sound_files as sound
from tests.support.hostile_bytes import Raw, changed_bytes, changed_document, json_text
from tests.support.hostile_content import (
    NAMES,
    gguf_file,
    hostile_text,
    lying_header,
    some_shape,
    table,
    written,
    yaml_text,
)

Door = Callable[[], object]
Kind = Callable[[random.Random, Path], Iterator[Door]]

_SECRET = b"a secret that lies beside"


def safetensors(chance: random.Random, place: Path) -> Iterator[Door]:
    """A weight file whose header lies."""
    from aidocks.checkpoints.reader import Checkpoint

    tensors = {
        chance.choice(NAMES[:5]) + str(number): (
            chance.choice(("F32", "BF16", "I64", "U8")),
            some_shape(chance),
        )
        for number in range(chance.randint(0, 5))
    }
    header, data = sound.header_of(
        {name: tensor for name, tensor in tensors.items() if max(tensor[1], default=0) < 99}
    )
    text, content = lying_header(chance, header, data)
    length = len(text.encode("utf-8", "surrogatepass")) + chance.choice(
        (-1, 1, 8, -8, 2**62, 2**63, 10**8, -(10**6))
    )
    raw = sound.safetensors(text, content, length if chance.random() < 0.1 else None)
    path = place / "model.safetensors"
    path.write_bytes(changed_bytes(chance, raw) if chance.random() < 0.4 else raw)
    (place / "config.json").write_text("{}")

    def read() -> object:
        checkpoint = Checkpoint(place)
        _compare(checkpoint, path)
        return checkpoint

    yield read


def index(chance: random.Random, place: Path) -> Iterator[Door]:
    """An index of weight files that names what is not there, or elsewhere."""
    from aidocks.checkpoints.layout import weights_present
    from aidocks.checkpoints.reader import Checkpoint

    outside = place.parent / "outside.safetensors"
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    weight_map: dict[str, Any] = {}
    for number, shard in enumerate(shards):
        header, data = sound.header_of({f"t{number}.{part}": ("F32", (2, 2)) for part in "ab"})
        weight_map |= {name: shard for name in header if name != "__metadata__"}
        content = sound.safetensors(json_text(header), data)
        (place / shard).write_bytes(changed_bytes(chance, content) if chance.random() < 0.15 else content)
        outside.write_bytes(content)
    document: dict[str, Any] = {"metadata": {"total_size": 64}, "weight_map": weight_map}
    act = chance.random()
    if act < 0.3:
        names = (
            "../outside.safetensors", str(outside), ".", "", "\0", "a\0.safetensors", shards[0] + "/", f"./{shards[0]}",
            "x" * 10_000_000 if chance.random() < 0.02 else "y" * 300, "~/x.safetensors", "%2e%2e/x.safetensors",
            "..\\x.safetensors", "x.safetensors", "dir.safetensors", "con.bin", Raw('"\\ud800.safetensors"'),
        )  # fmt: skip
        weight_map[chance.choice(list(weight_map))] = chance.choice(names)
        (place / "dir.safetensors").mkdir()
    elif act < 0.8:
        document = changed_document(chance, document)
    else:
        (place / chance.choice(shards)).unlink()
    text = json_text(document).encode("utf-8", "surrogatepass")
    (place / "model.safetensors.index.json").write_bytes(
        changed_bytes(chance, text) if chance.random() < 0.2 else text
    )
    (place / "config.json").write_text("{}")

    def read() -> object:
        checkpoint = Checkpoint(place)
        for file in checkpoint.weight_files:
            assert file.parent == place, f"{file} lies elsewhere"
            _compare(checkpoint, file)
        return checkpoint

    yield read
    yield lambda: weights_present(place)


def beside(chance: random.Random, place: Path) -> Iterator[Door]:
    """A model whose configuration or tokenizer is not what it should be."""
    from aidocks.merge.adapter import read_adapter
    from aidocks.models.registry import Registry
    from aidocks.models.tokenizer_files import read_template, read_tokenizer
    from aidocks.retrieval.architecture import architecture_of

    model = sound.write_model(place / "model")
    name = chance.choice(list(sound.BESIDE))
    content: Any = sound.BESIDE[name]
    if name == "config.json" and chance.random() < 0.3:
        content = content | {"quantization_config": chance.choice(sound.QUANTISATIONS)}
    (model / name).write_bytes(written(chance, content))
    if name == "modules.json":
        (model / "1_Pooling").mkdir()
        (model / "1_Pooling" / "config.json").write_bytes(written(chance, {"word_embedding_dimension": 8}))
    registry = Registry(place / "models")
    yield lambda: _imported(registry, model)
    yield lambda: read_tokenizer(model)
    yield lambda: read_template(model)
    yield lambda: architecture_of(model)
    yield from _requests(chance, place, model)
    adapter = sound.write_adapter(place / "adapter")
    (adapter / "adapter_config.json").write_bytes(written(chance, sound.ADAPTER_CONFIG))
    yield lambda: read_adapter(adapter)
    yield lambda: _imported(registry, adapter)


def links(chance: random.Random, place: Path) -> Iterator[Door]:
    """A model in an allowed directory, with links of all sorts in it."""
    from aidocks.models.registry import Registry
    from aidocks.models.resolve import ModelResolver

    root = place / "root"
    model = sound.write_model(root / "model")
    secret = sound.write_model(place.parent / "secret")
    (secret / "README.md").write_bytes(_SECRET)
    inside = sound.write_model(root / "other")
    for _ in range(chance.randint(1, 3)):
        name = chance.choice([*(path.name for path in model.iterdir()), "LICENSE", "1_Pooling", "extra.json"])
        goal = chance.choice((secret, inside)) / chance.choice((name, "config.json", "README.md", ".", ".."))
        link = model / name
        if link.is_symlink() or link.is_file():
            link.unlink()
        elif link.is_dir():
            continue
        goals = (
            goal,
            os.path.relpath(goal, model),
            model / name,
            "/etc/passwd",
            f"../model/../../../secret/{goal.name}",
            "loop",
        )
        link.symlink_to(chance.choice(goals))
    if chance.random() < 0.1:
        (model / "loop").unlink(missing_ok=True)
        (model / "loop").symlink_to("loop")
    roundabout = (Path(f"{root}/model/../model"), Path(f"{root}/../../secret"))
    chosen = chance.choice((model, model, root / "link", secret, *roundabout))
    (root / "link").symlink_to(chance.choice((model, secret)))

    def take() -> object:
        found = ModelResolver(place / "models", (root,)).resolve(str(chosen)).path
        assert found.resolve().is_relative_to(root.resolve()), f"{found} lies outside"
        taken = Registry(place / "models").import_checkpoint("taken", found)
        for path in taken.path.rglob("*"):
            assert not path.is_symlink(), f"{path} is a link"
            assert path.is_dir() or _SECRET not in path.read_bytes(), f"{path} has been read outside"
        return taken

    yield take


def manifest(chance: random.Random, place: Path) -> Iterator[Door]:
    """A model of the registry whose manifest was changed."""
    from aidocks.models.card import card, read_license
    from aidocks.models.registry import Registry
    from aidocks.models.resolve import ModelResolver

    sound.write_model(place / "models" / "made")
    (place / "models" / "made" / "aidocks.json").write_bytes(written(chance, sound.MANIFEST))
    front = f"---\nlicense: mit\ntags: [{json.dumps(hostile_text(chance))}]\n---\n".encode(
        "utf-8", "surrogatepass"
    )
    (place / "models" / "made" / "README.md").write_bytes(changed_bytes(chance, front))
    registry = Registry(place / "models")
    yield lambda: registry.get("made")
    yield registry.list
    yield lambda: card(registry.manifest("made"))
    yield lambda: registry.file("made", hostile_text(chance))
    yield lambda: ModelResolver(place / "models", ()).resolve("made")
    yield lambda: read_license(place / "models" / "made")


def state(chance: random.Random, place: Path) -> Iterator[Door]:
    """What this installation's own programs have written beside checkpoints and data sets, changed."""
    from aidocks.datasets.parts import PartedUploads
    from aidocks.datasets.store import DatasetStore
    from aidocks.training.resuming import find_checkpoint

    left = place / "checkpoints" / "job-1"
    (
        left
        / chance.choice(("checkpoint-00000001", "checkpoint-" + "9" * 5000, "checkpoint-1", "checkpoint-٣"))[
            :200
        ]
    ).mkdir(parents=True)
    (left / "training-identity.json").write_bytes(written(chance, sound.IDENTITY))
    yield lambda: find_checkpoint(place / "checkpoints", "job-1")
    store = DatasetStore(place / "datasets")
    kept = place / "datasets" / "rows"
    kept.mkdir(parents=True)
    (kept / "data.jsonl").write_text('{"text": "a"}\n')
    (kept / "dataset.json").write_bytes(written(chance, sound.DATASET))
    yield store.all
    yield lambda: store.get(chance.choice(("rows", str(sound.DATASET["id"]), hostile_text(chance))))
    coming = place / "datasets" / ".staging" / str(sound.DATASET["id"])
    coming.mkdir(parents=True)
    about = {"id": coming.name, "name": None, "filename": "a.jsonl", "bytes": 3, "part_bytes": 10}
    (coming / "upload.json").write_bytes(written(chance, about))
    (coming / "data.jsonl").write_bytes(b"{}\n"[: chance.randint(0, 3)])
    uploads = PartedUploads(store)
    yield lambda: uploads.write(coming.name, chance.choice((0, 1, 3, 2**62)), b"{}")
    yield lambda: uploads.complete(coming.name)


def rows(chance: random.Random, place: Path) -> Iterator[Door]:
    """A file of rows that are not what its ending or its first rows promise."""
    from aidocks.datasets.store import DatasetStore
    from aidocks.retrieval.data.check import check_retrieval_data
    from aidocks.training.data.examples import check_data
    from aidocks.training.data.reading import source_of_path

    kept = [dict(row) for row in chance.choice(sound.ROWS)] * chance.choice((1, 2, 20))
    suffix = chance.choice((".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt"))
    path = place / f"rows{suffix}"
    path.write_bytes(table(chance, suffix, kept))
    source: list[Any] = []

    def opened() -> Any:
        source.append(source_of_path(str(path), (place,)))
        return source[0]

    yield opened
    method = chance.choice(("sft", "pretrain", "dpo", "orpo", "kto", "grpo"))
    yield lambda: check_data(source[0], method) if source else None
    kind = chance.choice(("embedding", "reranker"))
    yield lambda: check_retrieval_data(source[0], kind) if source else None
    yield lambda: DatasetStore(place / "datasets").add(path, "rows") if suffix != ".tsv" else None


def spec(chance: random.Random, place: Path) -> Iterator[Door]:
    """A request in JSON or YAML, from a slip of the pen to a bomb."""
    from aidocks.operations import find_operation
    from aidocks.specs.read import build_spec, read_spec_file

    name = chance.choice(list(sound.REQUESTS))
    body = (
        changed_document(chance, sound.REQUESTS[name], 3) if chance.random() < 0.8 else sound.REQUESTS[name]
    )
    if chance.random() < 0.5:
        path, text = place / "spec.json", json_text(body).encode("utf-8", "surrogatepass")
    else:
        path, text = place / "spec.yaml", yaml_text(chance, body).encode("utf-8", "surrogatepass")
    path.write_bytes(changed_bytes(chance, text) if chance.random() < 0.4 else text)
    spec_type = find_operation(name).spec_type()
    yield lambda: build_spec(spec_type, read_spec_file(path))


def gguf(chance: random.Random, place: Path) -> Iterator[Door]:
    """A GGUF file that was damaged."""
    from aidocks.models.gguf_import import import_gguf
    from aidocks.models.registry import Registry

    path = place / "model.gguf"
    content = gguf_file(chance)
    path.write_bytes(changed_bytes(chance, content, 4) if chance.random() < 0.7 else content)
    yield lambda: import_gguf(path, Registry(place / "models"), "taken")


KINDS: dict[str, Kind] = {
    kind.__name__: kind for kind in (safetensors, index, beside, links, manifest, state, rows, spec, gguf)
}


def _compare(checkpoint: Any, path: Path) -> None:
    """Assert that every tensor of a file is the bytes of that file that its header names, and none beside."""
    from aidocks.errors import AIDocksError

    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    told = json.loads(raw[8 : 8 + length])
    told.pop("__metadata__", None)
    mine = {name: entry for name, entry in checkpoint.entries.items() if entry.file == path}
    assert set(mine) == set(told), "the tensors are others than in the header"
    for name, entry in mine.items():
        begin, end = (8 + length + offset for offset in told[name]["data_offsets"])
        assert (entry.begin, entry.end) == (begin, end), f"{name!r} begins or ends elsewhere"
        assert 8 + length <= begin <= end <= len(raw), f"{name!r} reaches out of the file"
        try:
            tensor = checkpoint.tensor(name)
        except AIDocksError:
            continue  # a type that cannot be computed with
        assert list(tensor.shape) == told[name]["shape"]
        found = tensor.contiguous().flatten().view(_bytes_type()).numpy().tobytes() if tensor.numel() else b""
        assert found == raw[begin:end], f"{name!r} has other bytes"


def _bytes_type() -> Any:
    import torch

    return torch.uint8


def _imported(registry: Any, source: Path) -> object:
    from aidocks.errors import NameTaken

    try:
        info = registry.import_checkpoint("taken", source)
    except NameTaken:
        return None
    assert registry.get("taken") == info
    registry.delete("taken")
    return info


def _requests(chance: random.Random, place: Path, model: Path) -> Iterator[Door]:
    """Yield the checks of requests that name a model, as they are made before a job is accepted."""
    from aidocks.jobs.submit import plan_context
    from aidocks.operations import find_operation
    from aidocks.settings import Settings
    from aidocks.specs.read import build_spec

    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sound.ROWS[1] * 8))
    text = json.dumps(sound.REQUESTS).replace("MODEL", str(model)).replace("ROWS", str(place / "rows.jsonl"))
    requests = json.loads(text)
    settings = Settings(home=place / "home", allowed_roots=(place,))
    for name in chance.sample(list(requests), 2):
        operation = find_operation(name).load()
        request = build_spec(operation.spec_type, requests[name])
        yield lambda made=operation, asked=request: made.preflight(asked, plan_context(settings, "job-1"))
