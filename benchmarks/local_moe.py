"""``aidocks byo-moe --local`` and mergekit-moe as processes, on one and the same file of a request."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.comparison import Usage, run_process
from benchmarks.peers import peer

NAME = "bench-moe"


def write_request(path: Path, base: Path, experts: Sequence[Path], gate_mode: str, **fields: Any) -> Path:
    """Write the file of a request that both programs take.

    Args:
        path: Where it goes.
        base: Directory of the base model.
        experts: Directories of the experts.
        gate_mode: As in the request.
        fields: Others; ``prompts``, if there, is a list of prompts for every expert.
    """
    prompts = fields.pop("prompts", None)
    sources = [{"source_model": str(expert)} for expert in experts]
    if prompts is not None:
        sources = [source | {"positive_prompts": list(p)} for source, p in zip(sources, prompts, strict=True)]
    request = {
        "base_model": str(base),
        "gate_mode": gate_mode,
        "dtype": "bfloat16",
        "experts": sources,
        **fields,
    }
    path.write_text(json.dumps(request, indent=1))  # which is YAML, too
    return path


def run_ours(request: Path, home: Path, *, fresh: bool = True) -> Usage:
    """Build the MoE of a request in a data directory of its own; the result is ``home/models/bench-moe``.

    Args:
        request: From :func:`write_request`.
        home: The data directory.
        fresh: Begin with an empty one. Else only the result goes, and hashes of the sources are known.
    """
    shutil.rmtree(home if fresh else home / "models" / NAME, ignore_errors=True)
    home.mkdir(parents=True, exist_ok=True)
    models = [model["source_model"] for model in json.loads(request.read_text())["experts"]]
    return run_process(
        [sys.executable, "-m", "aidocks", "byo-moe", request, "--local", "--no-evaluate", "--name", NAME],
        home / "benchmark.log",
        {
            "AIDOCKS_HOME": home,
            "AIDOCKS_ALLOWED_ROOTS": ":".join({str(Path(path).parent) for path in models}),
        },
    )


def run_peer(request: Path, target: Path) -> Usage:
    """Build it with mergekit-moe into ``target``.

    Raises:
        NotAtHand: The program is not on this machine.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    return run_process(
        [
            peer("mergekit-moe"),
            request,
            target / "model",
            "--i-understand-this-is-not-useful-without-training",
        ],
        target / "benchmark.log",
    )
