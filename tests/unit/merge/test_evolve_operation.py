"""/merge/evolve from spec to registry model, in this process, on small real models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from aidocks.errors import IncompatibleModels, InvalidSpec
from aidocks.evaluate.objectives import ObjectiveSource, resolve_objective, size_objective
from aidocks.jobs.submit import plan_context
from aidocks.merge.evolve.measuring import MeasureMerge, MergeLosses
from aidocks.merge.evolve.operation import MergeEvolve
from aidocks.models.converting import ConvertPickles
from aidocks.models.registry import Registry
from aidocks.plan import Unit, UnitContext
from aidocks.settings import Settings
from aidocks.specs.merge_evolve import MergeEvolveSpec
from aidocks.specs.merge_evolve_result import MergeEvolveResult
from aidocks.specs.objective import Objective
from aidocks.specs.read import build_spec

SMALL: dict[str, Any] = {
    "objective": "perplexity:prose",
    "seqlen": 24,
    "chunks": 12,
    "generations": 3,
    "name": "result",
}
UNIT_RANGE = {"min": 0, "max": 1}


class Killed(BaseException):
    """The process that drives the plan is gone."""


class Driver:
    """Runs plans on simulated workers; everything that crosses a process boundary goes through JSON."""

    def __init__(self, settings: Settings, parallelism: int = 1) -> None:
        self.messages: list[str] = []
        self.context = plan_context(settings, "job-1", parallelism=parallelism, say=self.messages.append)
        self.journal: dict[str, BaseModel] = {}
        self.units: list[Unit[Any]] = []
        self.workers = [UnitContext(self.context.workspace) for _ in range(parallelism)]

    def run(self, spec: MergeEvolveSpec, kill_after: int | None = None) -> MergeEvolveResult:
        self.context.workspace.mkdir(parents=True, exist_ok=True)
        MergeEvolve().preflight(spec, self.context)
        plan = MergeEvolve().plan(spec, self.context)
        results: list[BaseModel] | None = None
        try:
            while True:
                stage = next(plan) if results is None else plan.send(results)
                # Backwards and spread over the workers: no unit may rely on another having run where it runs.
                for number, unit in reversed(list(enumerate(stage.units))):
                    if kill_after is not None and len(self.units) >= kill_after:
                        raise Killed
                    self._run(unit, self.workers[number % len(self.workers)])
                results = [self.journal[unit.unit_id] for unit in stage.units]
        except StopIteration as stop:
            result: MergeEvolveResult = stop.value
            return result

    def _run(self, unit: Unit[Any], worker: UnitContext) -> None:
        if unit.unit_id in self.journal:
            return
        carried = type(unit).model_validate_json(unit.model_dump_json())
        result = carried.run(worker)
        self.units.append(unit)
        self.journal[unit.unit_id] = unit.result_type.model_validate_json(result.model_dump_json())


@pytest.fixture
def models(settings: Settings, tiny_llama: Any, tmp_path: Path) -> None:
    """`good`, and `spoilt`: the same with so much noise that every share of it does harm."""
    import torch
    from safetensors.torch import load_file, save_file

    shape = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
    good = tiny_llama(tmp_path / "good", seed=3, **shape)
    spoilt = tiny_llama(tmp_path / "spoilt", seed=3, **shape)
    weights = load_file(spoilt / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    noisy = {name: w + 0.5 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}
    save_file(noisy, spoilt / "model.safetensors", metadata={"format": "pt"})
    for directory in (good, spoilt):
        Registry(settings.models_dir).import_checkpoint(directory.name, directory)


def spec(weight: Any = UNIT_RANGE, **fields: Any) -> MergeEvolveSpec:
    asked = {
        "merge_method": "linear",
        "models": [
            {"model": "good", "parameters": {"weight": 1}},
            {"model": "spoilt", "parameters": {"weight": weight}},
        ],
    }
    return build_spec(MergeEvolveSpec, SMALL | asked | fields)


def digests(directory: Path) -> dict[str, str]:
    """Hashes of all files whose bytes must not depend on how the job was run."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in ("aidocks.json", "README.md")
    }


def prose(model: Path, fields: dict[str, Any] = SMALL) -> ObjectiveSource:
    source = resolve_objective(Objective(metric="perplexity", data="prose"), (), seq_length=fields["seqlen"])
    return size_objective(source, model, chunks=fields["chunks"])


def measure(model: Path, part: Any, context: UnitContext) -> MergeLosses:
    return MeasureMerge(host=model, objectives=(prose(model),), part=part, subject="a model").run(context)


def test_a_whole_run(settings: Settings, models: None) -> None:
    driver = Driver(settings)
    result = driver.run(spec())
    assert result.accepted
    (found,) = result.values
    assert found.value == found.found < 0.4
    assert result.held_out is not None
    assert result.held_out.z is not None
    assert result.held_out.z < -1.645
    directory = Path(str(result.path))
    assert directory == Registry(settings.models_dir).path("result")

    # What was written is what was measured.
    told, written = result.held_out.after, measure(directory, "held_out", UnitContext(directory.parent))
    assert written.losses[0].against(written.losses[0]).value_after.value == told
    # And a model alone is that model, although it was never loaded.
    good = Registry(settings.models_dir).path("good")
    alone = {scores.model: scores.scores[0] for scores in result.inputs}
    expected = measure(good, "held_out", UnitContext(directory.parent)).losses[0]
    assert alone["good"].before == expected.against(expected).value_after.value
    assert set(alone) == {"good", "spoilt"}

    config = yaml.safe_load(result.config)
    assert config["models"][1]["parameters"]["weight"] == found.value
    assert yaml.safe_load((directory / "mergekit_config.yml").read_text()) == config
    told_of = json.loads((directory / "report" / "evolution.json").read_text())
    assert len(told_of["candidates"]) == result.candidates
    assert set(result.pictures) == {"report/evolution.png", "report/before_after.png"}
    assert all((directory / name).is_file() for name in result.pictures)
    card = (directory / "README.md").read_text()
    assert "## Search" in card
    assert str(settings.home) not in card
    assert sum(message.startswith("Generation") for message in driver.messages) == result.generations


def test_models_in_directories_and_in_pytorch_files(settings: Settings, models: None, tmp_path: Path) -> None:
    import torch

    expected = Driver(settings).run(spec(generations=2, name="expected"))
    spoilt = tmp_path / "spoilt"
    torch.save(tensors(spoilt), spoilt / "pytorch_model.bin")
    (spoilt / "model.safetensors").unlink()
    allowed = settings.model_copy(update={"allowed_roots": (tmp_path,)})
    references = [{"model": "good", "parameters": {"weight": 1}}]
    references.append({"model": str(spoilt), "parameters": {"weight": UNIT_RANGE}})
    driver = Driver(allowed)
    result = driver.run(spec(generations=2, models=references))
    assert isinstance(driver.units[0], ConvertPickles)
    directory = Path(str(result.path))
    assert result.values == expected.values
    for name, tensor in tensors(Path(str(expected.path))).items():
        assert (tensors(directory)[name] == tensor).all()

    # What can be run again here names the directory, what lies beside the model does not.
    assert yaml.safe_load(result.config)["models"][1]["model"] == str(spoilt)
    published = yaml.safe_load((directory / "mergekit_config.yml").read_text())
    assert [model["model"] for model in published["models"]] == ["good", "spoilt"]
    for path in directory.rglob("*"):
        if path.suffix in (".md", ".yml") or path.parent.name == "report":
            assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_neither_workers_nor_a_kill_change_the_result(
    settings: Settings, models: None, tmp_path: Path
) -> None:
    one = Driver(settings)
    result = one.run(spec())
    expected = digests(Path(str(result.path)))
    Registry(settings.models_dir).delete("result")

    other = Driver(settings, parallelism=3)
    before = sum(not isinstance(unit, MeasureMerge) for unit in one.units)
    with pytest.raises(Killed):
        other.run(spec(), kill_after=len(one.units) // 2 + before // 2)
    done = {unit.unit_id for unit in other.units}
    other.workers = [UnitContext(other.context.workspace) for _ in range(3)]
    again = other.run(spec())
    ran = [unit.unit_id for unit in other.units]
    assert len(ran) == len(set(ran)), "nothing that was measured is measured again"
    assert done < set(ran)
    assert again == result
    assert digests(Path(str(again.path))) == expected


def test_the_initial_merge_is_the_result_where_nothing_is_better_enough(
    settings: Settings, models: None
) -> None:
    driver = Driver(settings)
    result = driver.run(spec({"min": 0, "max": 1, "initial": 0}, generations=2, z_threshold=100))
    assert not result.accepted
    assert result.objection
    assert result.values[0].value == 0
    assert result.held_out is not None
    assert result.held_out.before == result.held_out.after
    assert any(message.startswith("The initial values stay") for message in driver.messages)
    # All of the weight on one model: its bytes.
    good = Registry(settings.models_dir).path("good")
    result_weights, good_weights = (tensors(path) for path in (Path(str(result.path)), good))
    assert all((result_weights[name] == tensor).all() for name, tensor in good_weights.items())


def tensors(directory: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}


def test_filters_gradients_and_random_methods(settings: Settings, models: None) -> None:
    asked = build_spec(
        MergeEvolveSpec,
        SMALL
        | {
            "merge_method": "dare_linear",
            "base_model": "good",
            "slices": [
                {
                    "sources": [
                        {"model": "good", "layer_range": [0, 2]},
                        {"model": "spoilt", "layer_range": [0, 2]},
                    ]
                }
            ],
            "parameters": {
                "density": {"min": 0.5, "max": 1},
                "weight": [
                    {"filter": "mlp", "value": {"min": 0, "max": 1, "points": 2, "initial": 0.6}},
                    {"value": {"min": 0, "max": 1, "initial": 0.6}},
                ],
            },
            "generations": 2,
        },
    )
    result = Driver(settings).run(asked)
    assert len(result.values) == 4
    assert result.accepted
    written = measure(Path(str(result.path)), "report", UnitContext(settings.home)).losses[0]
    assert result.report is not None
    assert written.against(written).value_after.value == result.report.after


def test_a_vocabulary_that_grows_is_searched_as_well(
    settings: Settings, models: None, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spoilt = Registry(settings.models_dir).path("spoilt")
    tokenizer = AutoTokenizer.from_pretrained(spoilt)
    tokenizer.add_tokens(["<|extra|>"])
    network = AutoModelForCausalLM.from_pretrained(spoilt)
    network.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for part in (network, tokenizer):
        part.save_pretrained(tmp_path / "larger")
    Registry(settings.models_dir).delete("spoilt")
    Registry(settings.models_dir).import_checkpoint("spoilt", tmp_path / "larger")
    result = Driver(settings).run(spec(tokenizer_source="union", generations=2))
    assert result.accepted
    # A model of another vocabulary has other losses per token.
    assert result.inputs == ()
    written = measure(Path(str(result.path)), "report", UnitContext(settings.home)).losses[0]
    assert result.report is not None
    assert written.against(written).value_after.value == result.report.after


def test_a_state_does_not_depend_on_those_before_it(settings: Settings, models: None) -> None:
    driver = Driver(settings)
    driver.run(spec(generations=2))
    units = [unit for unit in driver.units if isinstance(unit, MeasureMerge)]
    assert len(units) > 8
    worker = UnitContext(driver.context.workspace)
    for unit in (*units[::-1], *units[::2]):
        assert unit.run(worker) == driver.journal[unit.unit_id]


@pytest.mark.parametrize(
    ("fields", "error", "field"),
    [
        ({"seqlen": 4096}, InvalidSpec, "seqlen"),
        ({"objective": "perplexity:nowhere.txt"}, InvalidSpec, "objective"),
        ({"guards": ["accuracy:prose"]}, InvalidSpec, "guards[0]"),
        ({"chunks": 5000}, InvalidSpec, "chunks"),
        ({"max_shard_size": "much"}, InvalidSpec, None),
        ({"merge_method": "liner"}, InvalidSpec, "merge_method"),
    ],
)
def test_what_cannot_succeed_is_refused_before_any_work(
    settings: Settings, models: None, fields: dict[str, Any], error: type[Exception], field: str | None
) -> None:
    context = plan_context(settings, "job-1")
    with pytest.raises(error) as caught:
        MergeEvolve().preflight(spec(**fields), context)
    assert field is None or caught.value.field == field  # type: ignore[attr-defined]


def test_only_causal_language_models_have_losses_of_text(
    settings: Settings, models: None, tmp_path: Path
) -> None:
    path = Registry(settings.models_dir).path("good") / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"architectures": ["LlamaModel"]}))
    other = Registry(settings.models_dir).path("spoilt") / "config.json"
    other.write_text(path.read_text())
    with pytest.raises(IncompatibleModels, match="not a causal language model"):
        MergeEvolve().preflight(spec(), plan_context(settings, "job-1"))


@pytest.fixture
def mixed_text(shared_data: Path, tmp_path: Path) -> Path:
    """Records of mathematics and of Python, in turn."""
    files = [(shared_data / name).open() for name in ("domain_math.jsonl", "domain_python.jsonl")]
    records = [line for _, pair in zip(range(300), zip(*files, strict=False), strict=False) for line in pair]
    text = tmp_path / "mixed.jsonl"
    text.write_text("".join(records))
    return text


def experts(shared_data: Path, names: Sequence[str]) -> list[str]:
    return [str(shared_data / "models" / f"expert-260k-{name}") for name in names]


def test_found_values_beat_the_plain_average_of_real_experts(
    home: Path, shared_data: Path, mixed_text: Path
) -> None:
    settings = Settings(home=home, allowed_roots=(shared_data, mixed_text.parent))
    python, maths = experts(shared_data, ("python", "math"))
    asked = build_spec(
        MergeEvolveSpec,
        {
            "merge_method": "slerp",
            "base_model": python,
            "models": [{"model": python}, {"model": maths}],
            "parameters": {"t": [{"filter": "mlp", "value": UNIT_RANGE}, {"value": UNIT_RANGE}]},
            "objective": f"perplexity:{mixed_text}",
            "seqlen": 64,
            "chunks": 64,
            "generations": 6,
            "name": "result",
        },
    )
    result = Driver(settings).run(asked)
    assert result.accepted
    for score in (result.held_out, result.report):
        assert score is not None
        assert score.after is not None
        assert score.before is not None
        assert score.after < score.before
    assert result.held_out is not None
    assert result.held_out.z is not None
    assert result.held_out.z < -1.645
