"""What routers are worth: perplexity on every expert's domain for each gate mode, beside base, experts and average.

python -m benchmarks.moe_quality tiny                     three experts of 260 thousand parameters, all gate modes
python -m benchmarks.moe_quality smol fitted trained      three of 135 million, some gate modes
python -m benchmarks.moe_quality smol4 fitted             a fourth expert (the base) whose texts overlap another's
python -m benchmarks.moe_quality smol8 fitted             eight experts on eight texts

Gates learn from one half of every text and are measured on the other; no record is on both sides. All models see the
same chunks. Needs ``AIDOCKS_BENCH_DATA``; writes ``benchmarks/results/moe-quality-<set>.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers import data_dir, scratch_dir
from benchmarks.small_model import DOMAINS, smol_experts

MODES = ("random", "cheap_embed", "hidden", "prompts", "fitted", "trained")
RESULTS = Path(__file__).parent / "results"
#: Prompts for the modes that take prompts, and for `prompts`: the mode `fitted` on nothing but these.
PROMPTS = {
    "python": (
        "Write a Python function",
        "def parse(self, text):",
        "import os, sys",
        "class Node(object):",
        "Fix the bug in this code",
    ),
    "math": (
        "Solve this word problem step by step",
        "How many apples are left?",
        "What is 12 * 7 + 5?",
        "She pays $3 for each of the 4 tickets",
        "Calculate the total cost",
    ),
    "story": (
        "Once upon a time there was a king",
        "Tell me a fairy tale",
        "said the little girl to the bird",
        "Write a story about the sea",
        "and they lived happily ever after",
    ),
}


@dataclass(frozen=True)
class Family:
    """A base, its experts, and the texts that they are for.

    Attributes:
        base: Checkpoint directory.
        experts: Of every expert: name, checkpoint directory, file of texts, domain of its prompts.
        fields: Of the request, beside models and gate mode.
    """

    base: Path
    experts: tuple[tuple[str, Path, Path, str], ...]
    fields: dict[str, Any]


def tiny() -> Family:
    """Return the smallest family: 5 layers, hidden size 64, vocabulary 512."""
    experts = tuple(
        (domain, data_dir(f"models/expert-260k-{domain}"), data_dir(f"domain_{domain}.jsonl"), domain)
        for domain in DOMAINS
    )
    fields = {"seqlen": 256, "chunks": 48, "gate_steps": 600, "fit_tokens": 16384, "gate_learning_rate": 0.05}
    return Family(data_dir("models/stories260k"), experts, fields)


def smol(extra: int = 0) -> Family:
    """Return SmolLM2-135M and three fine-tunes of it; with ``extra`` 1 or 5, four or eight experts."""
    base, paths = smol_experts()
    experts = [
        (domain, path, data_dir(f"domain_{domain}.jsonl"), domain)
        for domain, path in zip(DOMAINS, paths, strict=True)
    ]
    if extra == 1:  # the base as an expert for half of what another one is for
        experts.append(("base", base, _part("python", 0), "python"))
    if extra == 5:  # every domain twice, on different records, and the base for two texts of its own
        halves = [
            (f"{domain}-{half}", path, _part(domain, half), domain)
            for domain, path in zip(DOMAINS, paths, strict=True)
            for half in (0, 1)
        ]
        others = [("wikipedia", base, "wikitext2_raw_test.txt"), ("web", base, "c4_sample.jsonl")]
        experts = [*halves, *((name, path, data_dir(file), "story") for name, path, file in others)]
    fields = {
        "seqlen": 192, "chunks": 16, "dtype": "bfloat16", "gate_steps": 60, "gate_learning_rate": 0.05
    }  # fmt: skip
    return Family(base, tuple(experts), fields)


FAMILIES = {"tiny": tiny, "smol": smol, "smol4": lambda: smol(1), "smol8": lambda: smol(5)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moe_quality", description=__doc__)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("modes", nargs="*", help=f"of: {', '.join(MODES)} (default: all)")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="another field")
    arguments = parser.parse_args()
    family: Family = FAMILIES[arguments.family]()  # type: ignore[operator]
    chosen = dict(pair.split("=", 1) for pair in arguments.set)
    fields = family.fields | {name: json.loads(value) for name, value in chosen.items()}
    rows = _measure_parts(family, fields)
    _show(rows)
    own = {f"experts[{i}]": row["perplexities"][i] for i, row in enumerate(_experts(rows))}
    for mode in arguments.modes or MODES:
        row = _measure_mode(family, fields, mode)
        rows.append(row)
        _show([row], list(own.values()))
        RESULTS.mkdir(exist_ok=True)
        document = {"family": arguments.family, "fields": fields, "rows": rows}
        (RESULTS / f"moe-quality-{arguments.family}.json").write_text(json.dumps(document, indent=1) + "\n")


def _experts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["name"].startswith("expert ")]


def _request(family: Family, fields: dict[str, Any], mode: str) -> Any:
    from aidocks.specs.moe import MoESpec

    from_prompts = mode in ("hidden", "cheap_embed", "prompts")
    experts = [
        {
            "source_model": str(path),
            **({"positive_prompts": PROMPTS[domain]} if from_prompts else {"dataset": str(text)}),
        }
        for _, path, text, domain in family.experts
    ]
    return MoESpec.model_validate(
        {
            "base_model": str(family.base),
            "experts": experts,
            "gate_mode": "fitted" if mode == "prompts" else mode,
            "name": f"moe-{mode.replace('_', '-')}",
            "evaluate": False,
            **fields,
        }
    )


def _measure_parts(family: Family, fields: dict[str, Any]) -> list[dict[str, Any]]:
    paths = tuple(path for _, path, _, _ in family.experts)
    rows = [_measure("base", (family.base,), family, fields)]
    known: dict[Path, dict[str, Any]] = {family.base: rows[0]}
    for name, path, _, _ in family.experts:
        if path not in known:
            known[path] = _measure(f"expert {name}", (path,), family, fields)
        rows.append({**known[path], "name": f"expert {name}"})
    rows.append(_measure("average", paths, family, fields))
    return rows


def _measure_mode(family: Family, fields: dict[str, Any], mode: str) -> dict[str, Any]:
    from aidocks.jobs.runner import run_locally
    from aidocks.settings import Settings

    home = scratch_dir() / "quality"
    os.environ["AIDOCKS_ALLOWED_ROOTS"] = "/"
    settings = Settings(home=home)
    model = settings.models_dir / f"moe-{mode.replace('_', '-')}"
    if model.exists():
        import shutil

        shutil.rmtree(model)
    begin = time.perf_counter()
    job = run_locally("byo-moe", _request(family, fields, mode), settings)
    seconds = time.perf_counter() - begin
    if job.result is None:
        raise SystemExit(f"{mode}: {job.error}")
    row = _measure(f"moe {mode}", (model,), family, fields)
    row |= {
        "seconds": round(seconds, 1),
        "gate_scale": job.result["gate_scale"],
        "training": job.result["training"],
    }
    return row | {"routing": _routing(model, family, fields)}


def _domains(family: Family, fields: dict[str, Any]) -> tuple[Any, ...]:
    from aidocks.evaluate.texts import Domain, resolve_text

    return tuple(
        Domain(name=f"experts[{i}]", text=resolve_text(str(text), (Path("/"),)), chunks=fields["chunks"])
        for i, (_, _, text, _) in enumerate(family.experts)
    )


def _measure(name: str, models: tuple[Path, ...], family: Family, fields: dict[str, Any]) -> dict[str, Any]:
    from aidocks.evaluate.domains import MeasureDomains

    domains = _domains(family, fields)
    unit = MeasureDomains(models=models, domains=domains, seq_length=fields["seqlen"])
    found = unit.run(_context()).results
    return {
        "name": name,
        "perplexities": [round(result.perplexity or math.inf, 4) for result in found],
        "standard_errors": [round(result.standard_error or math.inf, 4) for result in found],
    }


def _routing(model: Path, family: Family, fields: dict[str, Any]) -> dict[str, Any]:
    """Return which expert each layer prefers, what every expert supplies of each text, and who is dead."""
    import torch

    from aidocks.evaluate.causal_lm import load
    from aidocks.moe.check import route
    from aidocks.moe.report import LEAST_PART

    loaded = load(model, None, _context().device)
    shares = []
    for domain in _domains(family, fields):
        chunks = loaded.chunks(domain.text, "held_out", fields["seqlen"], min(8, domain.chunks), 0).tokens
        shares.append(route(loaded.network, chunks).weight)
    by_layer_LE = torch.stack(shares).mean(0)
    by_domain_DE = torch.stack([share.mean(0) for share in shares])
    least = LEAST_PART / len(family.experts)
    return {
        "preferred": by_layer_LE.argmax(1).tolist(),
        "shares": [[round(float(share), 3) for share in row] for row in by_domain_DE],
        "dead": [i for i in range(len(family.experts)) if float(by_domain_DE[:, i].max()) < least],
    }


def _context() -> Any:
    from aidocks.executor import best_device
    from aidocks.plan import UnitContext

    return UnitContext(scratch_dir(), best_device(), threads=os.cpu_count() or 1)


def _show(rows: list[dict[str, Any]], own: list[float] | None = None) -> None:
    for row in rows:
        values = row["perplexities"]
        mean = math.exp(sum(map(math.log, values)) / len(values))
        line = f"{row['name']:20s} " + " ".join(f"{value:9.3f}" for value in values) + f"  mean {mean:9.3f}"
        if own:
            line += "  × own expert " + " ".join(f"{v / o:.3f}" for v, o in zip(values, own, strict=True))
            line += f"  {row['seconds']} s, scale {row['gate_scale']}, dead {row['routing']['dead']}"
        print(line, flush=True)


def _part(domain: str, half: int) -> Path:
    """Return a file with every other record of a domain's texts."""
    target = scratch_dir() / f"domain_{domain}_{half}.jsonl"
    if not target.exists():
        lines = data_dir(f"domain_{domain}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        target.write_text("".join(lines[half::2]), encoding="utf-8")
    return target


if __name__ == "__main__":
    main()
