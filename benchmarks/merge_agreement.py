"""Every deterministic method beside mergekit on the same file: the largest difference, in steps of bfloat16.

python -m benchmarks.merge_agreement [METHOD ...]

Both compute in float32 and round once. The models are the three SmolLM2-135M fine-tunes and their base in float32, each
value changed by a thousandth of itself, at random: between weights in bfloat16 thousands of differences are equally
large, and which of them a sparsifying method keeps is an accident of the sort in use (the peer's keeps no order). A
step is the distance between neighbouring bfloat16 numbers. Where inputs cancel to less than 2^-12 of the largest of
them, float32 has no right digits left for either program to agree on; such values are counted apart.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from aidocks.checkpoints.files import copy_file
from aidocks.checkpoints.reader import Checkpoint
from aidocks.checkpoints.writer import SINGLE_FILE, ShardPlan, ShardWriter, TensorPlan
from benchmarks.local_merge import NAME, run_ours, run_peer, write_config
from benchmarks.peers import scratch_dir
from benchmarks.small_model import made_once, smol_experts

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merge_agreement", description=__doc__)
    parser.add_argument("methods", nargs="*")
    chosen = parser.parse_args().methods
    base, *experts = (_without_ties(model, seed) for seed, model in enumerate(_models()))
    configs = _configs(base, tuple(experts))
    rows = []
    with tempfile.TemporaryDirectory(prefix="merge-agreement-", dir=scratch_dir()) as place:
        scratch = Path(place)
        for name in chosen or configs:
            config = write_config(scratch / f"{name}.yaml", configs[name])
            ours = run_ours(config, scratch / "home")
            theirs = run_peer(config, scratch / "peer")
            inputs = {configs[name].get("base_model"), *(model["model"] for model in configs[name]["models"])}
            worst = _compare(
                scratch / "home" / "models" / NAME,
                scratch / "peer" / "model",
                [Checkpoint(Path(path)) for path in inputs if path],
            )
            rows.append({"method": name, **worst, "seconds": ours.seconds, "peer_seconds": theirs.seconds})
            print(json.dumps(rows[-1]), flush=True)
    RESULTS.mkdir(exist_ok=True)
    document = {"date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(), "methods": rows}
    (RESULTS / "merge-agreement.json").write_text(json.dumps(document, indent=1) + "\n")


def _models() -> tuple[Path, ...]:
    base, experts = smol_experts()
    return (base, *experts)


def _without_ties(model: Path, seed: int) -> Path:
    """Return a copy in float32 with every value changed by about a thousandth of itself; made once."""

    def make(target: Path) -> None:
        import torch

        source = Checkpoint(model)
        generator = torch.Generator().manual_seed(seed)
        plans = tuple(TensorPlan(name=e.name, dtype="F32", shape=e.shape) for e in source.entries.values())
        with ShardWriter(target, ShardPlan(file_name=SINGLE_FILE, tensors=plans)) as writer:
            for plan in plans:
                values = source.tensor(plan.name).float()
                writer.write(plan.name, values * (1 + 1e-3 * torch.randn(values.shape, generator=generator)))
        for file in [model / "config.json", *source.metadata_files()]:
            copy_file(file, target / file.name)

    return made_once(scratch_dir() / "smol-float32" / model.name, make)


def _configs(base: Path, experts: tuple[Path, ...]) -> dict[str, dict[str, Any]]:
    python, math, _ = map(str, experts)

    def merge(method: str, models: list[str], parameters: dict[str, Any], **more: Any) -> dict[str, Any]:
        inputs = [
            {"model": m, "parameters": {"weight": w}} for m, w in zip(models, (0.5, 0.3, 0.4), strict=False)
        ]
        return {
            "merge_method": method,
            "models": inputs,
            "parameters": parameters,
            "dtype": "float32",
            "out_dtype": "bfloat16",
        } | more

    on_base = {"base_model": str(base)}
    all_three = [python, math, str(experts[2])]
    pair = {"base_model": python, "models": [{"model": python}, {"model": math}]}
    plain = {"models": [{"model": m} for m in all_three]}
    return {
        "linear": merge("linear", all_three, {}),
        "slerp": merge("slerp", [], {"t": [0, 0.3, 1]}) | pair,
        "nuslerp": merge("nuslerp", [python, math], {}),
        "multislerp": merge("multislerp", all_three, {}),
        "karcher": merge("karcher", [], {}) | plain,
        "task_arithmetic": merge("task_arithmetic", all_three, {}, **on_base),
        "ties": merge("ties", all_three, {"density": 0.5}, **on_base),
        "breadcrumbs": merge("breadcrumbs", all_three, {"density": 0.6, "gamma": 0.02}, **on_base),
        "breadcrumbs_ties": merge("breadcrumbs_ties", all_three, {"density": 0.6}, **on_base),
        "sce": merge("sce", all_three, {"select_topk": 0.3}, **on_base),
        "model_stock": merge("model_stock", [], {}, **on_base) | plain,
        "nearswap": merge("nearswap", [], {"t": 0.001}) | pair,
        "arcee_fusion": merge("arcee_fusion", [], {}) | pair,
        "passthrough": merge("passthrough", [], {"scale": 0.5}) | {"models": [{"model": python}]},
    }


def _compare(ours: Path, theirs: Path, inputs: list[Checkpoint]) -> dict[str, Any]:
    """Return the largest difference in steps of bfloat16, and how many values differ at all, or are cancelled."""
    import torch

    one, other = Checkpoint(ours), Checkpoint(theirs)
    assert one.entries.keys() == other.entries.keys(), one.entries.keys() ^ other.entries.keys()
    worst, where, differing, cancelled, total = 0, "", 0, 0, 0
    for name in one.entries:
        a, b = one.tensor(name), other.tensor(name)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        steps = (_ordinal(a) - _ordinal(b)).abs()
        differing += int((steps > 0).sum())
        total += steps.numel()
        largest = torch.stack([source.tensor(name).float().abs() for source in inputs]).amax(dim=0)
        is_small = torch.maximum(a.float().abs(), b.float().abs()) < 2**-12 * largest
        cancelled += int((steps[is_small] > 1).sum())
        steps[is_small] = 0
        if int(steps.max()) > worst:
            worst, where = int(steps.max()), name
    return {
        "steps": worst,
        "where": where,
        "differing": differing / total,
        "cancelled": cancelled / total,
    }


def _ordinal(values: Any) -> Any:
    import torch

    # Sign and magnitude as integers on one line: neighbouring numbers are one apart.
    bits = values.contiguous().view(torch.int16).to(torch.int32)
    return torch.where(bits >= 0, bits, -32768 - bits)


if __name__ == "__main__":
    main()
