"""Whole builds: what the result holds, says and shows; and through the door that needs no service."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from aidocks.checkpoints.reader import Checkpoint
from aidocks.jobs.model import Status
from aidocks.jobs.runner import run_locally
from aidocks.models.registry import Registry
from aidocks.settings import Settings
from aidocks.specs.moe import MoESpec
from aidocks.specs.read import build_spec

BASE_CONFIG = {"bos_token_id", "eos_token_id", "pad_token_id", "vocab_size", "rms_norm_eps", "head_dim"}
PNG = b"\x89PNG\r\n"


def test_the_result_says_what_it_is(tmp_path: Path, tiny_llama: Any, build: Any, experts_of: Any) -> None:
    paths = [tiny_llama(tmp_path / f"model-{seed}", seed=seed) for seed in range(3)]
    built = build(paths[0], experts_of(*paths), evaluate=True)
    result = built.result
    assert [m.model for m in result.perplexities] == ["base", "experts[1]", "experts[2]", "moe"]
    assert all(m.perplexity and m.standard_error and m.tokens == 4 * 31 for m in result.perplexities)
    assert sum(share.load for share in result.experts) == pytest.approx(1, abs=1e-4)
    assert sum(share.weight for share in result.experts) == pytest.approx(1, abs=1e-4)
    model = AutoModelForCausalLM.from_pretrained(built.path)
    assert result.parameters == sum(p.numel() for p in model.parameters())
    mlp = 3 * 64 * 176 * 4
    assert result.active_parameters == result.parameters - mlp
    assert result.bytes == Checkpoint(built.path).total_bytes
    for picture in result.pictures:
        assert (built.path / picture).read_bytes().startswith(PNG)
    report = json.loads((built.path / "report" / "routing.json").read_text())
    assert report["tokens"] == 4 * 32
    assert [round(sum(layer), 3) for layer in report["load"]] == [1.0] * 4


def test_configuration_and_tokenizer_are_the_bases(
    tmp_path: Path, tiny_llama: Any, build: Any, experts_of: Any
) -> None:
    base = tiny_llama(tmp_path / "base", rms_norm_eps=3e-6)
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    built = build(base, experts_of(base, base, base), experts_per_token=1)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (built.path / name).read_bytes() == (base / name).read_bytes()
    ours, theirs = AutoConfig.from_pretrained(built.path), AutoConfig.from_pretrained(base)
    for name in BASE_CONFIG | {"rope_parameters", "max_position_embeddings", "tie_word_embeddings", "dtype"}:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (ours.num_local_experts, ours.num_experts_per_tok, ours.output_router_logits) == (3, 1, False)
    stray = json.loads((built.path / "config.json").read_text()).keys() - ours.to_dict().keys()
    assert stray == {"rope_theta"}  # for readers other than transformers 5
    text = "The licensor grants 12 rights."
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (base, built.path)]
    assert len({tuple(tokenizer(text)["input_ids"]) for tokenizer in tokenizers}) == 1


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_have_the_type_that_was_asked_for(
    dtype: str, tmp_path: Path, tiny_llama: Any, build: Any, experts_of: Any
) -> None:
    base = tiny_llama(tmp_path / "base")
    other = tiny_llama(tmp_path / "other", seed=1, dtype=torch.bfloat16)
    built = build(base, experts_of(base, other), dtype=dtype)
    stored, source = Checkpoint(built.path), Checkpoint(other)
    wanted = getattr(torch, dtype)
    assert {stored.tensor(name).dtype for name in stored.entries} == {wanted}
    found = stored.tensor("model.layers.1.block_sparse_moe.experts.1.w2.weight")
    assert torch.equal(found, source.tensor("model.layers.1.mlp.down_proj.weight").to(wanted))
    assert AutoConfig.from_pretrained(built.path).dtype == wanted


def test_the_default_type_is_the_bases(tmp_path: Path, tiny_llama: Any, build: Any, experts_of: Any) -> None:
    base, other = tiny_llama(tmp_path / "base", dtype=torch.bfloat16), tiny_llama(tmp_path / "other", seed=1)
    stored = Checkpoint(build(base, experts_of(base, other)).path)
    assert {entry.dtype for entry in stored.entries.values()} == {"BF16"}


def test_copying_needs_no_torch(tmp_path: Path, tiny_llama: Any, build: Any, experts_of: Any) -> None:
    base = tiny_llama(tmp_path / "base")
    kept: list[str] = []

    def keep(units: list[Any]) -> list[Any]:
        kept.extend(unit.model_dump_json() for unit in units if type(unit).__name__ == "AssembleShard")
        return units

    build(base, experts_of(base, base), order=keep)
    gates = next(tmp_path.glob("run-*/workspaces/job/gates"))
    assert gates.is_dir()
    code = """
import sys
from pathlib import Path
from aidocks.moe.assemble import AssembleShard
from aidocks.plan import UnitContext
unit = AssembleShard.model_validate_json(sys.argv[1])
unit.run(UnitContext(Path(sys.argv[2])))
assert not {"torch", "numpy"} & set(sys.modules)
"""
    root = Path(__file__).resolve().parents[3]
    subprocess.run([sys.executable, "-c", code, kept[0], str(tmp_path)], check=True, cwd=root)


def test_as_a_local_job(tmp_path: Path, tiny_llama: Any, home: Path, experts_of: Any) -> None:
    base = tiny_llama(tmp_path / "base")
    settings = Settings(home=home, allowed_roots=(tmp_path,))
    Registry(settings.models_dir).import_checkpoint("tiny", base)
    spec = build_spec(
        MoESpec, {"base_model": "tiny", "experts": experts_of("tiny", base), "chunks": 2, "seqlen": 16}
    )
    job = run_locally("byo-moe", spec, settings)
    assert (job.status, job.error) == (Status.SUCCEEDED, None)
    assert job.result is not None
    name = f"tiny-moe-{job.id[-8:]}"
    assert (job.output_name, job.result["model"]) == (name, name)
    manifest = Registry(settings.models_dir).manifest(name)
    assert [parent.field for parent in manifest.parents] == [
        "base_model",
        "experts[0].source_model",
        "experts[1].source_model",
    ]
    assert manifest.metrics["perplexity"].keys() == {"base", "experts[1]", "moe"}
    assert (manifest.architecture, manifest.parameters) == ("MixtralForCausalLM", job.result["parameters"])
    assert "perplexity.moe" in (Registry(settings.models_dir).path(name) / "README.md").read_text()


def test_a_build_that_died_after_publication_answers_with_its_result(
    tmp_path: Path, tiny_llama: Any, build: Any, experts_of: Any
) -> None:
    from aidocks.models.resolve import ModelResolver
    from aidocks.moe.operation import BuildMoE
    from aidocks.plan import PlanContext

    base = tiny_llama(tmp_path / "base")
    built = build(base, experts_of(base, base), name="done")
    context = PlanContext(
        job_id="job-00000000000-c0ffee00",
        workspace=tmp_path / "gone",
        registry=Registry(built.path.parent),
        resolver=ModelResolver(built.path.parent, []),
        cache_dir=tmp_path / "cache",
    )
    body = {"base_model": "gone", "name": "done", "experts": experts_of("gone", "gone")}
    plan = BuildMoE().plan(build_spec(MoESpec, body), context)
    with pytest.raises(StopIteration) as stop:
        next(plan)
    assert stop.value.value == built.result
