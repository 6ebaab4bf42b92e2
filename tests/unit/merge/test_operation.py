"""/merge from request to registry model, in this process, on small real models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from aidocks.checkpoints.reader import Checkpoint
from aidocks.evaluate.perplexity import MeasurePerplexity
from aidocks.jobs.model import Status
from aidocks.jobs.runner import run_locally
from aidocks.models.registry import Registry
from aidocks.plan import UnitContext
from aidocks.settings import Settings
from aidocks.specs.merge_result import MergeResult
from tests.support.merge_jobs import (
    Driver,
    add_adapter,
    add_models,
    change,
    copy_model,
    digests,
    left_behind,
    make_family,
    request,
    tensors,
    weights,
)

PNG = b"\x89PNG\r\n"
SLERP = """
slices:
  - sources:
      - {model: one, layer_range: [0, 4]}
      - {model: two, layer_range: [0, 4]}
merge_method: slerp
base_model: one
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.4]}
    - {value: 0.5}
dtype: bfloat16
name: result
"""
LINEAR = """
merge_method: linear
models: [{model: one, parameters: {weight: 0.75}}, {model: two, parameters: {weight: 0.25}}]
name: result
"""


@pytest.fixture
def place(settings: Settings, tmp_path: Path) -> Settings:
    """An installation whose registry holds `one` and `two`; paths below the test's directory are allowed."""
    make_family(tmp_path / "sources", "one", "two")
    add_models(settings, *(tmp_path / "sources" / name for name in ("one", "two")))
    return settings.model_copy(update={"allowed_roots": (tmp_path,)})


def arc(base: torch.Tensor, other: torch.Tensor, t: float) -> torch.Tensor:
    """Return the point of the arc between two tensors, in float64."""
    a, b = base.double(), other.double()
    cos = float((a * b).sum() / a.norm() / b.norm())
    if abs(cos) > 0.9995:
        return (1 - t) * a + t * b
    angle = math.acos(cos)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def asked_t(name: str) -> float:
    """Return what :data:`SLERP` says of a tensor: gradients from the first layer, at 0, to the last, at 1."""
    at = int(name.split(".")[2]) / 3 if ".layers." in name else 0.0
    if "self_attn" in name:
        values = [0, 0.5, 0.3, 0.7, 1]
        begin = min(int(at * 4), 3)
        return values[begin] + (at * 4 - begin) * (values[begin + 1] - values[begin])
    return 1 - 0.6 * at if "mlp" in name else 0.5


def test_a_whole_run(place: Settings) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    registry = Registry(place.models_dir)
    result = Driver(place).run(SLERP)
    path = registry.path("result")
    assert (result.path, result.dtype, result.architecture) == (str(path), "bfloat16", "LlamaForCausalLM")
    one, two, made = (tensors(registry.path(name)) for name in ("one", "two", "result"))
    assert made.keys() == one.keys()
    for name, found in made.items():
        assert found.dtype == torch.bfloat16
        expected = arc(one[name], two[name], asked_t(name))
        # Rounded once: half a step of bfloat16, and what float32 computes.
        assert bool(((found.double() - expected).abs() <= expected.abs() * 2**-8 * 1.001 + 1e-7).all()), name

    network = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    assert network.dtype == torch.bfloat16
    loaded = network.state_dict()
    assert all(torch.equal(loaded[name], found) for name, found in made.items())
    assert result.parameters == sum(p.numel() for p in network.parameters())
    tokenizers = [AutoTokenizer.from_pretrained(registry.path(name)) for name in ("one", "result")]
    assert len({tuple(reader("Once upon a time")["input_ids"]) for reader in tokenizers}) == 1
    assert network.generate(**tokenizers[1]("Once", return_tensors="pt"), max_new_tokens=3).shape[1] > 3

    manifest = registry.manifest("result")
    assert [(parent.field, parent.reference) for parent in manifest.parents] == [
        ("base_model", "one"),
        ("slices[0].sources[1].model", "two"),
    ]
    for parent in manifest.parents:
        assert parent.content_hash == Checkpoint(registry.path(parent.reference)).content_hash()
    assert {file.path for file in manifest.files} | {"aidocks.json"} == {
        file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()
    }
    card = (path / "README.md").read_text()
    assert "slerp of one, two" in card
    assert "t 0 … 1" in card
    assert json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_it_writes_down_makes_the_same_model_again(place: Settings) -> None:
    first = Driver(place).run(SLERP, seed=3, compute_dtype="float64")
    config = (Path(str(first.path)) / "mergekit_config.yml").read_text()
    assert yaml.safe_load(config)["compute_dtype"] == "float64"
    again = Driver(place, job_id="job-00000000000-c0ffee01").run(config, name="again")
    assert weights(Path(str(again.path))) == weights(Path(str(first.path)))
    assert again.parts == first.parts


FRANKENMERGE = """
slices:
  - sources: [{model: one, layer_range: [0, 3]}]
  - sources: [{model: two, layer_range: [1, 4]}]
merge_method: passthrough
name: result
"""


def test_layers_put_on_one_another(place: Settings) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = Driver(place).run(FRANKENMERGE, evaluate=True, chunks=2, seqlen=16)
    registry, path = Registry(place.models_dir), Path(str(result.path))
    assert result.steps[-1].layers == json.loads((path / "config.json").read_text())["num_hidden_layers"] == 6
    one, two, made = (tensors(registry.path(name)) for name in ("one", "two", "result"))
    for number, (source, layer) in enumerate([(one, 0), (one, 1), (one, 2), (two, 1), (two, 2), (two, 3)]):
        for rest in ("self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight"):
            expected = source[f"model.layers.{layer}.{rest}"]
            # As bytes: what is copied keeps the sign of a zero, too.
            assert made[f"model.layers.{number}.{rest}"].numpy().tobytes() == expected.numpy().tobytes()
    assert torch.equal(made["model.embed_tokens.weight"], one["model.embed_tokens.weight"])
    assert torch.equal(made["model.norm.weight"], two["model.norm.weight"])
    network = AutoModelForCausalLM.from_pretrained(path)
    reader = AutoTokenizer.from_pretrained(path)
    assert network.generate(**reader("Once", return_tensors="pt"), max_new_tokens=3).shape[1] > 3
    assert {part.method for part in result.parts} == {"passthrough"}


def test_what_is_copied_keeps_its_bits(place: Settings) -> None:
    """Whatever they are: zeros with a sign, and numbers below the normal ones."""
    odd = torch.tensor([0.0, -0.0, 1e-42, -1e-45, 3e38] * 6 + [0.0, 0.0])
    name = "model.layers.0.input_layernorm.weight"
    registry = Registry(place.models_dir)
    change(registry.path("one"), lambda found, tensor: odd if found == name else tensor)
    copied = Driver(place).run(FRANKENMERGE)
    assert tensors(Path(str(copied.path)))[name].numpy().tobytes() == odd.numpy().tobytes()


def test_a_dry_run_leaves_no_trace(place: Settings) -> None:
    known = set(left_behind(place.home))
    plain = run_locally("merge", request(SLERP, dry_run=True), place)
    assert (plain.status, plain.error, plain.output_name) == (Status.SUCCEEDED, None, None)
    assert set(left_behind(place.home)) == known
    # The name is still to be had, and the plan does not depend on what would be measured.
    measured = run_locally("merge", request(SLERP, dry_run=True, evaluate=True), place)
    results = [
        MergeResult.model_validate(job.result).model_copy(update={"seconds": None})
        for job in (plain, measured)
    ]
    assert results[0] == results[1]
    planned = results[0]
    assert (planned.model, planned.path, planned.dry_run) == (None, None, True)

    real = Driver(place).run(SLERP)
    (step,) = planned.steps
    path = Path(str(real.path))
    sources = [Checkpoint(Registry(place.models_dir).path(name)) for name in ("one", "two")]
    assert step.read_bytes == sum(source.total_bytes for source in sources)
    assert step.written_bytes == planned.bytes == Checkpoint(path).total_bytes == sources[0].total_bytes // 2
    assert step.files == len(list(path.glob("*.safetensors"))) == 1
    assert step.tensors == len(Checkpoint(path).entries)
    assert step.memory_bytes > 0
    assert planned.parts == real.parts
    assert planned.steps == real.steps


def test_a_dry_run_counts_the_files_that_there_would_be(place: Settings) -> None:
    planned = Driver(place).run(LINEAR, dry_run=True, max_shard_size="60KB")
    real = Driver(place).run(LINEAR, max_shard_size="60KB")
    files = list(Path(str(real.path)).glob("*.safetensors"))
    assert planned.steps[0].files == len(files) == real.steps[0].files > 2


def perplexity(model: Path) -> float | None:
    measure = MeasurePerplexity(model=model, split="held_out", seq_length=16, chunks=3)
    return measure.run(UnitContext(model)).perplexity


def test_the_result_is_measured_beside_its_parents(place: Settings, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("The licensor grants a licence to each of the contributors. " * 60)
    fields: dict[str, Any] = {"evaluate": True, "chunks": 3, "seqlen": 16, "text": ["prose", str(words)]}
    make_family(tmp_path / "sources", "one", "two", "three", "zero")
    add_models(place, *(tmp_path / "sources" / name for name in ("zero", "three")))
    text = """
    merge_method: task_arithmetic
    base_model: zero
    models:
      - {model: one, parameters: {weight: 0.5}}
      - {model: three, parameters: {weight: 0.5}}
    name: result
    """
    result = Driver(place).run(text, **fields)
    found = {model.model: model for model in result.perplexities}
    assert list(found) == ["base", "models[0]", "models[1]", "average", "merge"]
    assert [model.reference for model in result.perplexities][:3] == ["zero", "one", "three"]
    assert found["merge"].reference == "result"
    registry = Registry(place.models_dir)
    for model, name in (("base", "zero"), ("models[0]", "one"), ("models[1]", "three"), ("merge", "result")):
        assert [part.domain for part in found[model].domains] == ["prose", "words.txt"]
        assert found[model].domains[0].perplexity == pytest.approx(perplexity(registry.path(name)), rel=1e-9)
        assert [part.tokens for part in found[model].domains] == [3 * 15] * 2
    average = Driver(place, job_id="job-00000000000-c0ffee02").run(
        "{merge_method: linear, models: [{model: one}, {model: three}], parameters: {weight: 1}, name: average}"
    )
    assert found["average"].domains[0].perplexity == pytest.approx(
        perplexity(Path(str(average.path))), rel=1e-6
    )
    path = Path(str(result.path))
    assert result.pictures == ("report/perplexity.png",)
    assert (path / "report" / "perplexity.png").read_bytes().startswith(PNG)
    report = json.loads((path / "report" / "report.json").read_text())
    assert [model["model"] for model in report["perplexities"]] == list(found)
    assert "plain average of the models" in (path / "README.md").read_text()
    assert [section.title for section in registry.manifest("result").sections] == ["Merge", "Perplexity"]


def test_only_what_has_an_average_is_averaged(place: Settings, tmp_path: Path) -> None:
    """Not models of other depths, or with adapters; and not one that only lends its tokens."""
    sources = tmp_path / "sources"
    make_family(sources, "deep", num_hidden_layers=6)
    make_family(sources, "untied", tie_word_embeddings=False)
    make_family(sources, "speaker")
    adapter = add_adapter(tmp_path / "adapter")
    fields: dict[str, Any] = {"evaluate": True, "chunks": 2, "seqlen": 16}
    asked = {
        f"""
        slices:
          - sources: [{{model: {sources}/deep, layer_range: [0, 3]}}]
          - sources: [{{model: one, layer_range: [1, 4]}}]
        merge_method: passthrough
        """: ["slices[0].sources[0]", "slices[1].sources[0]", "merge"],
        f"""
        merge_method: linear
        models: [{{model: one}}, {{model: {sources}/untied}}]
        parameters: {{weight: 1}}
        """: ["models[0]", "models[1]", "merge"],
        f"""
        merge_method: linear
        models: [{{model: one}}, {{model: two}}, {{model: one+{adapter}}}]
        parameters: {{weight: 1}}
        """: ["models[0]", "models[1]", "merge"],
        f"""
        merge_method: linear
        models: [{{model: one}}, {{model: two}}]
        parameters: {{weight: 1}}
        tokenizer_source: {sources}/speaker
        """: ["models[0]", "models[1]", "average", "merge"],
    }
    for number, (text, models) in enumerate(asked.items()):
        driver = Driver(place, job_id=f"job-00000000000-0000000{number}")
        result = driver.run(text, name=f"result-{number}", **fields)
        assert [model.model for model in result.perplexities] == models
        assert all(model.domains[0].perplexity for model in result.perplexities)


def test_a_report_names_no_directory_of_this_machine(place: Settings, tmp_path: Path) -> None:
    other = copy_model(tmp_path / "sources" / "two", tmp_path / "other")
    change(other, lambda _, tensor: tensor, rms_norm_eps=1e-3)
    adapter = add_adapter(tmp_path / "style")
    text = f"""
    merge_method: linear
    models: [{{model: one}}, {{model: {other}}}, {{model: {other}+{adapter}}}]
    parameters: {{weight: 1}}
    name: result
    """
    result = Driver(place).run(text, evaluate=True, chunks=2, seqlen=16)
    path = Path(str(result.path))
    card, report = (path / "README.md").read_text(), (path / "report" / "report.json").read_text()
    assert str(tmp_path) not in card.partition("## How it was made")[0]
    assert str(tmp_path) not in report
    assert json.loads(report)["steps"][0]["models"] == ["one", "other", "other+style"]
    assert any("rms_norm_eps is 0.001 in 'other'" in note for note in json.loads(report)["notes"])
    # Nor does the configuration, which is uploaded with the model.
    assert str(tmp_path) not in (path / "mergekit_config.yml").read_text()
    parents = Registry(place.models_dir).manifest("result").parents
    assert [parent.path_name for parent in parents] == ["one", "other", "style"]


def test_as_a_local_job_with_a_name_of_its_own_making(place: Settings, tmp_path: Path) -> None:
    """The name tells of the first model, not of what is added to it."""
    adapter = add_adapter(tmp_path / "style")
    text = f"models: [{{model: one+{adapter}}}]\nparameters: {{weight: 1}}\n"
    for given in ("base_model: one\nmerge_method: task_arithmetic\n", "merge_method: linear\n"):
        job = run_locally("merge", request(given + text), place)
        assert (job.status, job.error) == (Status.SUCCEEDED, None)
        assert job.result is not None
        method = job.result["merge_method"].replace("_", "-")
        assert job.output_name == job.result["model"] == f"one-{method}-{job.id[-8:]}"
    assert not list((place.home / "workspaces").iterdir())


def test_the_end_of_a_job_that_died_after_publication(place: Settings) -> None:
    driver = Driver(place)
    result = driver.run(LINEAR)
    before = digests(Path(str(result.path)))
    ran = len(driver.units)
    for name in ("one", "two"):
        Registry(place.models_dir).delete(name)
    assert driver.run(LINEAR) == result
    assert len(driver.units) == ran
    assert digests(Path(str(result.path))) == before
