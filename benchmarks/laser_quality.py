"""What /laser is worth: its cost beside the original recipe's at equal tokens, and what it does for a model.

python -m benchmarks.laser_quality peer CHUNKS [FIELD=VALUE ...]
        cost and held-out perplexity, beside laserRMT's procedure
python -m benchmarks.laser_quality run [FIELD=VALUE ...]
        one run on SmolLM2-135M, with default settings otherwise

The procedure of laserRMT (rmt_laser_snr): singular values of every matrix in fp64, threshold IQR / 1.349 *
(1 + sqrt(beta)), signal-to-noise ratio over all kinds, the 15 lowest; of each a full fp64 decomposition, the whole
evaluation, and it stays unless the perplexity rose. Texts of ``AIDOCKS_BENCH_DATA``: wikitext2, and with C4 where
many tokens are needed. Writes ``benchmarks/results/laser-<what>.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.comparison import Usage, run_process
from benchmarks.peers import data_dir, scratch_dir
from benchmarks.small_model import smol_experts

RESULTS = Path(__file__).parent / "results"
#: Matrices that the original tries.
ORIGINAL_CANDIDATES = 15
SEQ_LENGTH = 128
#: Held-out chunks on which both results are compared.
HELD_OUT = 128


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.laser_quality", description=__doc__)
    parser.add_argument("what", choices=("peer", "run", "original"))
    parser.add_argument("arguments", nargs="*")
    given = parser.parse_args()
    if given.what == "original":
        _original(Path(given.arguments[0]), int(given.arguments[1]), Path(given.arguments[2]))
    elif given.what == "peer":
        _compare(int(given.arguments[0]), _fields(given.arguments[1:]))
    else:
        _run(_fields(given.arguments))


def _fields(pairs: list[str]) -> dict[str, Any]:
    return {name: _value(text) for name, text in (pair.split("=", 1) for pair in pairs)}


def _run(fields: dict[str, Any]) -> None:
    """One run of ours; prints its scores and what it took."""
    values = {"text": str(_text())} | fields
    result, usage = _ours(values)
    _show_ours(result, usage)
    _write(
        f"laser-{values.get('label', 'run')}", {"fields": values, "cpu": usage.cpu_seconds, "result": result}
    )


def _compare(chunks: int, fields: dict[str, Any]) -> None:
    """Both procedures on the same model and the same search tokens; then both results on the same held-out chunks."""
    model, _ = smol_experts()
    result, ours = _ours({"text": str(_long_text()), "chunks": chunks, "guards": [], **fields})
    _show_ours(result, ours)
    told = scratch_dir() / "laser-original.json"
    command = [sys.executable, "-m", "benchmarks.laser_quality", "original", model, str(chunks), told]
    other = run_process(command, scratch_dir() / "laser-original.log")
    accepted = json.loads(told.read_text())
    print(
        f"original: {other.cpu_seconds:.0f} CPU s, {other.seconds:.0f} s; accepted {len(accepted['accepted'])}"
    )
    held = _held_out(model, Path(result["path"]), accepted["accepted"])
    print(f"CPU: {ours.cpu_seconds / other.cpu_seconds:.3f} of the original's; held out: {held}")
    document = {"chunks": chunks, "ours": vars(ours), "original": vars(other), "held_out": held}
    _write("laser-peer", document | {"result": result, "accepted_by_original": accepted})


def _ours(fields: dict[str, Any]) -> tuple[dict[str, Any], Usage]:
    import shutil

    model, _ = smol_experts()
    home = scratch_dir() / "laser"
    shutil.rmtree(home, ignore_errors=True)
    request = {"base_model_name": str(model), "laser_model_name": "lasered", **fields}
    request.pop("label", None)
    body = scratch_dir() / "laser.json"
    body.write_text(json.dumps(request))
    log = scratch_dir() / "laser.log"
    command = [sys.executable, "-m", "aidocks", "laser", body, "--local", "--json"]
    usage = run_process(command, log, {"AIDOCKS_HOME": home, "AIDOCKS_ALLOWED_ROOTS": "/"})
    manifest = json.loads((home / "models" / "lasered" / "aidocks.json").read_text())
    return manifest["metrics"] | {"path": str(home / "models" / "lasered")}, usage


def _original(model: Path, chunks: int, target: Path) -> None:
    """laserRMT's procedure, in a process of its own; writes what it accepted."""
    import torch

    from aidocks.evaluate.causal_lm import load
    from aidocks.evaluate.texts import resolve_text
    from aidocks.laser.matrices import find_matrices

    loaded = load(model, "bfloat16", "cpu")
    text = resolve_text(str(_long_text()), (Path("/"),))
    names = [matrix.address for matrix in find_matrices(_open(model).entries)]
    weights = {name: loaded.network.get_parameter(name) for name in names}
    ratios = {name: _ratio(torch.linalg.svdvals(w.detach().double()), w) for name, w in weights.items()}
    best = loaded.measure(text, "search", SEQ_LENGTH, chunks).perplexity
    assert best is not None
    accepted = []
    for name in sorted(ratios, key=ratios.__getitem__)[:ORIGINAL_CANDIDATES]:
        stored = weights[name].detach().clone()
        rank = _cut(weights[name])
        perplexity = loaded.measure(text, "search", SEQ_LENGTH, chunks).perplexity
        if perplexity is not None and perplexity > best:
            weights[name].data.copy_(stored)
        else:
            best = perplexity if perplexity is not None else best
            accepted.append([name, rank])
    target.write_text(json.dumps({"accepted": accepted, "perplexity": best}))


def _threshold(values_N: Any, weight: Any) -> float:
    import torch

    spread = float(torch.quantile(values_N, 0.75) - torch.quantile(values_N, 0.25)) / 1.349
    return spread * (1 + (min(weight.shape) / max(weight.shape)) ** 0.5)


def _ratio(values_N: Any, weight: Any) -> float:
    signal = values_N > _threshold(values_N, weight)
    below = float(values_N[~signal].sum())
    return float(values_N[signal].sum()) / below if below else float("inf")


def _cut(weight: Any) -> int:
    import torch

    u_ON, values_N, v_NI = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    rank = int((values_N > _threshold(values_N, weight)).sum())
    weight.data.copy_((u_ON[:, :rank] * values_N[:rank]) @ v_NI[:rank])
    return rank


def _held_out(model: Path, result: Path, accepted: list[list[Any]]) -> dict[str, Any]:
    """Perplexity of base, our result and the original's, and the paired change of both."""
    from aidocks.evaluate.causal_lm import load
    from aidocks.evaluate.perplexity import compare
    from aidocks.evaluate.texts import resolve_text

    text = resolve_text(str(_long_text()), (Path("/"),))
    measure = {"split": "held_out", "seq_length": SEQ_LENGTH, "chunks": HELD_OUT}
    base = load(model, "bfloat16", "cpu")
    before = base.measure(text, **measure)
    for name, _ in accepted:
        _cut(base.network.get_parameter(name))
    theirs = base.measure(text, **measure)
    ours = load(result, "bfloat16", "cpu").measure(text, **measure)
    return {
        "base": before.perplexity,
        "ours": ours.perplexity,
        "ours_z": compare(before, ours).z,
        "original": theirs.perplexity,
        "original_z": compare(before, theirs).z,
    }


def _show_ours(result: dict[str, Any], usage: Usage) -> None:
    print(f"ours: {usage.cpu_seconds:.0f} CPU s, {usage.seconds:.0f} s, {usage.peak_mb:.0f} MB")
    for part in ("search", "held_out", "report"):
        score = result[part]
        print(f"  {part}: {score['before']} -> {score['after']}, z {score['z']}")
    for guard in result["guards"]:
        print(
            f"  guard {guard['metric']} {guard['data']} ({guard['part']}): {guard['before']} -> {guard['after']}"
        )
    for accepted in result["accepted"]:
        print(
            f"  accepted {accepted['name']} rank {accepted['rank']}/{accepted['full_rank']} z {accepted['z']:.2f}"
        )


def _text() -> Path:
    return data_dir("wikitext2_raw_test.txt")


def _long_text() -> Path:
    """Return a file of wikitext2 and C4, article by article: two of the three texts that the original takes."""
    target = scratch_dir() / "wikitext2-and-c4.jsonl"
    if not target.exists():
        articles = re.split(r"\n(?= = [^=])", _text().read_text(encoding="utf-8"))
        pages = data_dir("c4_sample.jsonl").read_text(encoding="utf-8").splitlines()
        records = [*articles, *(json.loads(page)["text"] for page in pages)]
        lines = (json.dumps({"text": record}) + "\n" for record in records if record.strip())
        target.write_text("".join(lines), encoding="utf-8")
    return target


def _open(model: Path) -> Any:
    from aidocks.checkpoints.reader import Checkpoint

    return Checkpoint(model)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _write(name: str, document: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    document |= {"date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count()}
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
