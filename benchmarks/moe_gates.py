"""``hidden`` gates of four experts of SmolLM2-135M beside mergekit-moe's on the same prompts: time, and likeness."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.comparison import Comparison, compare_processes
from benchmarks.local_moe import NAME, run_ours, run_peer, write_request
from benchmarks.peers import peer, scratch_dir
from benchmarks.small_model import smol_experts

if TYPE_CHECKING:
    import torch

PROMPTS = (
    ("What is the capital of France?", "Tell me about yourself.", "Could you explain what a comet is?"),
    ("def fibonacci(n):", "import os\nfrom pathlib import Path", "class Stack:\n    def push(self, item):"),
    ("How many apples are left?", "A train travels 60 miles in 1.5 hours.", "12 * 7 = 84, so the answer is"),
    ("Once upon a time there was a king", "The mermaid looked up at the stars", "said Alice, very much surprised."),
)  # fmt: skip
_ROUTER = re.compile(r"model\.layers\.(\d+)\.(?:\w+\.)*gate\.weight")


def run() -> list[Comparison]:
    peer("mergekit-moe")
    base, experts = smol_experts()
    with tempfile.TemporaryDirectory(prefix="moe-gates-", dir=scratch_dir()) as place:
        scratch = Path(place)
        request = write_request(scratch / "request.yaml", base, [base, *experts], "hidden", prompts=PROMPTS)
        results = compare_processes(
            "byo-moe, 4 experts of 135M, hidden gates",
            lambda: run_ours(request, scratch / "home"),
            lambda: run_peer(request, scratch / "peer"),
            "mergekit-moe",
            runs=3,
        )
        ours = read_routers(scratch / "home" / "models" / NAME)
        theirs = read_routers(scratch / "peer" / "model")
    layers = tuple(likeness(ours[layer], theirs[layer]) for layer in sorted(ours))
    facts = {"layers": len(layers), "least": round(min(layers), 6), "must reach": "0.9999 in every layer"}
    return [*results, Comparison("router rows, cosine with mergekit-moe's", layers, unit="", facts=facts)]


def read_routers(model: Path) -> dict[int, torch.Tensor]:
    """Return layer -> router [experts, hidden] in float64, from the weight files of a Mixtral."""
    from safetensors import safe_open

    routers = {}
    for file in model.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a mapping
                if match := _ROUTER.fullmatch(name):
                    routers[int(match[1])] = weights.get_tensor(name).double()
    return routers


def likeness(ours_EH: torch.Tensor, theirs_EH: torch.Tensor) -> float:
    """Return the least cosine between the two rows of an expert."""
    import torch

    return float(torch.nn.functional.cosine_similarity(ours_EH, theirs_EH, dim=1).min())
