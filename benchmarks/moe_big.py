"""Two models of 3.8 GB to one MoE of 6.4 GB: the whole process beside `cp` of as many bytes; and 2 workers beside 1.

From cold files (dropped from the system's cache before each run) and from warm ones, and with the hashes of the
sources known or not: whoever made the models here, or used them before, has them. ``AIDOCKS_BENCH_BIG_PEER=1`` runs
mergekit-moe once, too. Needs 30 GB of disk.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from aidocks.plan import UnitContext
from benchmarks.comparison import Comparison, Facts, Usage, drop_cache, run_process
from benchmarks.local_moe import NAME, run_ours, run_peer, write_request
from benchmarks.peers import NotAtHand, scratch_dir

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T")
Command = list[str | Path]

HIDDEN, INNER, LAYERS, VOCABULARY = 2560, 6912, 24, 49152
CONFIG = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 8192,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
RUNS = 3
SHARD_BYTES = 1_000_000_000
_NOISE_VALUES = 1 << 25


def run() -> list[Comparison]:
    if shutil.disk_usage(scratch_dir()).free < 30e9:
        raise NotAtHand("30 GB of disk are needed; AIDOCKS_BENCH_SCRATCH may lead to another disk")
    with tempfile.TemporaryDirectory(prefix="moe-big-", dir=scratch_dir()) as place:
        scratch = Path(place)
        models = [make_model(scratch / "models" / name, seed) for seed, name in enumerate("ab")]
        request = write_request(scratch / "request.yaml", models[0], models, "random")
        run_ours(request, scratch / "home")
        reference = scratch / "reference"
        (scratch / "home" / "models" / NAME).rename(reference)
        results = [
            *_beside_cp(request, scratch, "cold", fresh=True),
            *_beside_cp(request, scratch, "warm", fresh=True),
            *_beside_cp(request, scratch, "warm", fresh=False),
        ]
        if os.environ.get("AIDOCKS_BENCH_BIG_PEER"):
            results += _beside_peer(request, scratch)
        shutil.rmtree(scratch / "home")
        results += _two_workers(request, scratch)
    return results


def make_model(path: Path, seed: int) -> Path:
    """Write a Mistral with random weights and a tokenizer of as many tokens, in files of at most 1 GB."""
    from aidocks.checkpoints.writer import ShardWriter, TensorPlan, plan_shards, write_index
    from aidocks.models.gguf_import import convert_gguf, locate_smollm2

    tensors = [TensorPlan(name=name, dtype="BF16", shape=shape) for name, shape in _shapes().items()]
    noise = _noise(seed)
    shards = plan_shards(tensors, SHARD_BYTES)
    for shard in shards:
        with ShardWriter(path, shard) as writer:
            for number, tensor in enumerate(shard.tensors):
                writer.copy_ranges(tensor.name, [_cut(noise, tensor.nbytes, 4099 * number)])
    write_index(path, shards)
    (path / "config.json").write_text(json.dumps(CONFIG, indent=2))
    with tempfile.TemporaryDirectory(dir=path.parent) as small:
        convert_gguf(locate_smollm2(), Path(small))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path(small) / name, path / name)
    return path


def _shapes() -> dict[str, tuple[int, ...]]:
    hidden, inner = HIDDEN, INNER
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}.self_attn.k_proj.weight": (512, hidden),
            f"{prefix}.self_attn.v_proj.weight": (512, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}.mlp.up_proj.weight": (inner, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, inner),
        }
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}


def _noise(seed: int) -> NDArray[np.uint8]:
    """Return bytes of small normal values in bfloat16, of which every tensor is a piece."""
    import numpy as np

    values = np.random.default_rng(seed).standard_normal(_NOISE_VALUES, dtype=np.float32) * np.float32(0.02)
    return (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8)


def _cut(noise: NDArray[np.uint8], count: int, first: int) -> bytes:
    import numpy as np

    return np.resize(np.roll(noise, -2 * first), count).tobytes()


def _beside_cp(request: Path, scratch: Path, cache: str, *, fresh: bool) -> list[Comparison]:
    pairs = [
        (
            _ready(scratch, cache, lambda: run_ours(request, scratch / "home", fresh=fresh)),
            _ready(scratch, cache, lambda: _cp(scratch, sync=False)),
            _ready(scratch, cache, lambda: _cp(scratch, sync=True)),
        )
        for _ in range(RUNS)
    ]
    ours = tuple(usage.seconds for usage, _, _ in pairs)
    name = f"byo-moe, 2 experts of 3.8 GB, {cache} files, hashes {'unknown' if fresh else 'known'}"
    facts: Facts = {
        "GB": _gigabytes(scratch / "reference"), "peak MB": round(max(usage.peak_mb for usage, _, _ in pairs)),
        "must reach": "ratio 1.43 to cp, 400 MB",
    }  # fmt: skip
    return [
        Comparison(name, ours, tuple(cp.seconds for _, cp, _ in pairs), "cp", facts=facts),
        Comparison(name, ours, tuple(cp.seconds for _, _, cp in pairs), "cp and sync", facts=facts),
    ]


def _beside_peer(request: Path, scratch: Path) -> list[Comparison]:
    ours = _ready(scratch, "cold", lambda: run_ours(request, scratch / "home"))
    theirs = _ready(scratch, "cold", lambda: run_peer(request, scratch / "peer"))
    shutil.rmtree(scratch / "peer")
    name = "byo-moe, 2 experts of 3.8 GB, cold files"
    return [
        Comparison(name, (ours.seconds,), (theirs.seconds,), "mergekit-moe"),
        Comparison(f"{name}, peak memory", (ours.peak_mb,), (theirs.peak_mb,), "mergekit-moe", "MB"),
    ]


def _two_workers(request: Path, scratch: Path) -> list[Comparison]:
    """Assemble the weight files, 1 GB each, in two processes and in one; and copy the sources so: the limit."""

    def assemble(workers: int) -> list[Command]:
        program: Command = [sys.executable, "-m", "benchmarks.moe_big", request, scratch / "copy"]
        return [[*program, str(worker), str(workers)] for worker in range(workers)]

    def copy(workers: int) -> list[Command]:
        models = [scratch / "models" / name for name in "ab"]
        groups = [models[worker::workers] for worker in range(workers)]
        return [["cp", "-r", *group, scratch / "copy"] for group in groups]

    results = []
    for name, programs in (("MoE assembly", assemble), ("cp of the sources", copy)):
        pairs = [
            tuple(_ready(scratch, "cold", lambda n=n, p=programs: _at_once(p(n))) for n in (2, 1))
            for _ in range(RUNS)
        ]
        two, one = zip(*pairs, strict=True)
        facts: Facts = {"must reach": "ratio 1; 0.67 where cp does"} if programs is assemble else {}
        results.append(Comparison(f"{name} from cold files, 2 at once", two, one, "1 at once", facts=facts))
    return results


def _at_once(programs: list[Command]) -> float:
    """Run programs at the same time; return the seconds until the last has ended."""
    begin = time.perf_counter()
    for process in [subprocess.Popen(program) for program in programs]:
        assert process.wait() == 0, process.args
    return time.perf_counter() - begin


def _ready(scratch: Path, cache: str, work: Callable[[], T]) -> T:
    """Run ``work`` with nothing waiting to be written, and its sources cold or warm."""
    for leftover in ("copy", "peer"):
        shutil.rmtree(scratch / leftover, ignore_errors=True)
    (scratch / "copy").mkdir()
    sources = [scratch / "models", scratch / "reference"]
    os.sync()
    drop_cache(*sources)
    if cache == "warm":
        for path in sorted(file for source in sources for file in source.rglob("*.safetensors")):
            with path.open("rb", buffering=0) as stream:
                while stream.read(16 << 20):
                    pass
    return work()


def _cp(scratch: Path, *, sync: bool) -> Usage:
    command = 'cp -r "$1" "$2"' + (' && sync "$2"/*/*' if sync else "")
    arguments: Command = ["bash", "-c", command, "cp", scratch / "reference", scratch / "copy"]
    return run_process(arguments, scratch / "cp.log")


def _gigabytes(directory: Path) -> float:
    return round(sum(path.stat().st_size for path in directory.glob("*.safetensors")) / 1e9, 2)


def write_part(request: Path, staged: Path, worker: int, workers: int) -> None:
    """Write every ``workers``-th weight file of a request, from the one numbered ``worker`` on."""
    from benchmarks.assembly import assembly_of

    spec = json.loads(request.read_text())
    models = [Path(expert["source_model"]) for expert in spec["experts"]]
    for unit in assembly_of(staged, *models, shard_bytes=SHARD_BYTES)[worker::workers]:
        unit.run(UnitContext(staged))


if __name__ == "__main__":
    write_part(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
