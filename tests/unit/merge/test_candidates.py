"""Candidates of a search among merges: which models can be measured in the place of the merge."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from aidocks.checkpoints.header import build_header
from aidocks.evaluate.objectives import ObjectiveSource
from aidocks.evaluate.texts import TextSource
from aidocks.merge.build import Step
from aidocks.merge.evolve.candidates import Candidates
from aidocks.merge.members import open_members
from aidocks.merge.target import plan_target
from aidocks.models.resolve import ModelResolver
from aidocks.specs.merge_evolve import MergeEvolveSpec
from aidocks.specs.read import build_spec

NAMES = ("wte.weight", "h.0.ln_1.weight", "h.1.ln_1.weight", "ln_f.weight")


def save(directory: Path, *names: str) -> str:
    """Save a model of tensors [1, 1] of zeros."""
    directory.mkdir()
    header = {name: ("F32", (1, 1), 4 * place, 4 * place + 4) for place, name in enumerate(names)}
    (directory / "model.safetensors").write_bytes(build_header(header, {}) + bytes(4 * len(names)))
    (directory / "config.json").write_text(json.dumps({"n_layer": 2, "vocab_size": 1}))
    return str(directory)


def test_models_are_measured_alone_whatever_they_call_their_tensors(tmp_path: Path) -> None:
    hub = save(tmp_path / "hub", *NAMES, "h.0.attn.bias", "h.1.attn.masked_bias")
    saved = save(tmp_path / "saved", *(f"transformer.{name}" for name in NAMES))
    spec = build_spec(
        MergeEvolveSpec,
        {
            "merge_method": "linear",
            "models": [
                {"model": hub, "parameters": {"weight": {"min": 0, "max": 1}}},
                {"model": saved, "parameters": {"weight": 0.5}},
            ],
            "objective": "perplexity:prose",
        },
    )
    merge = spec.merge(spec.genome.initial)
    members = open_members(merge, ModelResolver(tmp_path / "registry", [tmp_path]))
    target = plan_target(merge, members)
    start = Step("", merge, members, None, target, target.plan_files(1 << 20), tmp_path / "start")
    objective = ObjectiveSource(metric="perplexity", text=TextSource(name="prose"), sizes={"search": 1})
    alone = Candidates(spec, start).alone((objective,), "search")
    assert list(alone) == [hub, saved]
    assert [tensor.operands[0].tensor for tensor in alone[hub].tensors] == list(NAMES)
    # Where a model has layers that the merge has not, it is another one.
    more = replace(members[hub], tensors={**members[hub].tensors, "h.2.ln_1.weight": target.tensors[0]})
    other = replace(start, members={**members, hub: more})
    assert list(Candidates(spec, other).alone((objective,), "search")) == [saved]
