"""/extract-lora from request to registry, in this process, on small real models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aidocks.checkpoints.reader import Checkpoint
from aidocks.errors import CorruptCheckpoint, IncompatibleModels, InvalidSpec, UnknownModel
from aidocks.jobs.submit import plan_context
from aidocks.merge.adapter import read_adapter
from aidocks.merge.extraction.operation import ExtractLora
from aidocks.merge.rows import StoredRows
from aidocks.models.parents import DescribeParent
from aidocks.models.registry import Registry
from aidocks.plan import Unit, UnitContext
from aidocks.settings import Settings
from aidocks.specs.extract_lora import ExtractLoraResult, ExtractLoraSpec
from aidocks.specs.read import build_spec

Change = Callable[[dict[str, torch.Tensor]], None]


class Driver:
    """Runs plans; everything that crosses a process boundary goes through JSON."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.units: list[Unit[Any]] = []
        self.said: list[str] = []

    def run(self, job: str = "job-1", **fields: Any) -> ExtractLoraResult:
        spec = build_spec(ExtractLoraSpec, {"name": "adapter", **fields})
        context = plan_context(self.settings, job, say=self.said.append)
        context.workspace.mkdir(parents=True, exist_ok=True)
        ExtractLora().preflight(spec, context)
        plan = ExtractLora().plan(spec, context)
        results: list[Any] | None = None
        try:
            while True:
                stage = next(plan) if results is None else plan.send(results)
                self.units += stage.units
                results = [self._run(unit, UnitContext(context.workspace)) for unit in stage.units]
        except StopIteration as stop:
            found: ExtractLoraResult = stop.value
            return ExtractLoraResult.model_validate_json(found.model_dump_json())

    def _run(self, unit: Unit[Any], context: UnitContext) -> Any:
        carried = type(unit).model_validate_json(unit.model_dump_json())
        assert carried.unit_id == unit.unit_id
        result = carried.run(context)
        assert all(file.path.is_file() for file in carried.outputs(result))
        return unit.result_type.model_validate_json(result.model_dump_json())

    def add(self, name: str, source: Path, change: Change | None = None, **config: Any) -> str:
        """Import a changed copy of a model."""
        copy = self.settings.home / f"source-{name}"
        copy.mkdir()
        for file in source.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        tensors = load_file(source / "model.safetensors")
        if change:
            change(tensors)
        save_file({n: t.contiguous() for n, t in tensors.items()}, copy / "model.safetensors")
        document = json.loads((copy / "config.json").read_text()) | config
        (copy / "config.json").write_text(json.dumps(document))
        Registry(self.settings.models_dir).import_checkpoint(name, copy)
        return name

    def path(self, name: str) -> Path:
        return Registry(self.settings.models_dir).path(name)


@pytest.fixture
def driver(settings: Settings, stories260k: Path) -> Driver:
    made = Driver(settings)
    made.add("base", stories260k)
    return made


def noise(scale: float, *parts: str) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        for name, tensor in sorted(tensors.items()):
            if any(part in name for part in parts):
                tensor += scale * torch.randn(tensor.shape, generator=generator)

    return change


def drop(name: str) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]

    return change


def adapted(driver: Driver, name: str, base: str = "base") -> dict[str, torch.Tensor]:
    """Return all tensors of the base with an adapter of the registry."""
    adapter, checkpoint = read_adapter(driver.path(name)), Checkpoint(driver.path(base))
    found = {}
    for tensor, entry in adapter.entries(checkpoint.entries).items():
        stored = checkpoint.entries.get(tensor)
        rows = adapter.apply(tensor, StoredRows(tensor, stored) if stored else None)
        found[tensor] = (
            rows.read(0, max(1, int(torch.Size(entry.shape[:-1]).numel()))).reshape(entry.shape).clone()
        )
    return found


def test_the_full_rank_gives_the_model_back(driver: Driver, stories260k: Path) -> None:
    driver.add("tuned", stories260k, noise(0.1, ""))
    result = driver.run(model="tuned", base_model="base", rank=512)
    assert result.error < 1e-6
    assert all(row.error < 1e-6 and row.energy == pytest.approx(1) for row in result.matrices)
    assert result.lost == ()
    wanted = load_file(driver.path("tuned") / "model.safetensors")
    got = adapted(driver, "adapter")
    assert set(got) == set(wanted)
    for name, tensor in wanted.items():
        assert torch.allclose(got[name], tensor, atol=1e-6), name
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= set(result.saved)
    config = json.loads((driver.path("adapter") / "adapter_config.json").read_text())
    assert "model.embed_tokens" in config["modules_to_save"]
    assert config["ensure_weight_tying"]


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_the_error_is_the_least_of_that_rank(driver: Driver, stories260k: Path, alpha: float | None) -> None:
    driver.add("tuned", stories260k, noise(0.05, "mlp", "q_proj"))
    result = driver.run(model="tuned", base_model="base", rank=6, alpha=alpha)
    before, after = (load_file(driver.path(name) / "model.safetensors") for name in ("base", "tuned"))
    got = adapted(driver, "adapter")
    left = total = 0.0
    for row in result.matrices:
        delta = (after[row.tensor] - before[row.tensor]).double()
        values = torch.linalg.svdvals(delta)
        assert row.rank == (6 if values[0] > 0 else 0)
        assert row.difference == pytest.approx(float(delta.norm()), rel=1e-6)
        assert row.relative_difference == pytest.approx(
            float(delta.norm() / before[row.tensor].norm()), rel=1e-6
        )
        if row.rank:
            least = float(values[6:].norm() / values.norm())
            assert row.error == pytest.approx(least, rel=1e-5)
            real = (after[row.tensor] - got[row.tensor]).double().norm() / delta.norm()
            assert row.error == pytest.approx(float(real), rel=1e-4)
            left, total = left + float(values[6:].square().sum()), total + float(values.square().sum())
    assert result.error == pytest.approx((left / total) ** 0.5, rel=1e-5)
    assert result.alpha == (alpha or 6)
    assert result.saved == ()
    config = json.loads((driver.path("adapter") / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (6, alpha or 6)
    assert config["target_modules"] == ["down_proj", "gate_proj", "q_proj", "up_proj"]
    assert (config["modules_to_save"], config["rank_pattern"]) == (None, {})
    stored = load_file(driver.path("adapter") / "adapter_model.safetensors")
    assert sum(t.numel() for t in stored.values()) == result.parameters
    assert sum(t.nbytes for t in stored.values()) == result.bytes


def test_ranks_by_energy_and_types(driver: Driver, stories260k: Path) -> None:
    driver.add("tuned", stories260k, noise(0.05, "mlp", "layers.1.self_attn"))
    result = driver.run(model="tuned", base_model="base", rank=60, energy=0.6, dtype="bfloat16")
    ranks = {row.tensor: row.rank for row in result.matrices if row.rank}
    assert len(set(ranks.values())) > 1
    assert result.rank == max(ranks.values()) < 60
    assert all(row.energy >= 0.6 for row in result.matrices)
    adapter = read_adapter(driver.path("adapter"))
    assert {name: factors.a.shape[0] for name, factors in adapter.factors.items()} == ranks
    assert {factors.scale for factors in adapter.factors.values()} == {1.0}
    assert {factors.a.dtype for factors in adapter.factors.values()} == {"BF16"}
    wanted = load_file(driver.path("tuned") / "model.safetensors")
    for row in result.matrices:
        if row.rank:
            got = adapted(driver, "adapter")[row.tensor]
            assert float((got - wanted[row.tensor]).norm()) == pytest.approx(
                row.error * row.difference, rel=1e-3
            )
            assert row.error**2 == pytest.approx(1 - row.energy, abs=1e-2)


def test_only_what_is_asked_for(driver: Driver, stories260k: Path) -> None:
    driver.add("tuned", stories260k, noise(0.05, ""))
    result = driver.run(
        model="tuned",
        base_model="base",
        rank=4,
        include=["layers\\.[12]\\.", "embed"],
        exclude=["v_proj", "norm"],
        embeddings="skip",
        method="randomized",
    )
    assert {row.tensor.split(".")[2] for row in result.matrices} == {"1", "2"}
    assert not [row for row in result.matrices if "v_proj" in row.tensor]
    assert result.saved == result.lost == ()
    config = json.loads((driver.path("adapter") / "adapter_config.json").read_text())
    assert "model.layers.1.mlp.up_proj" in config["target_modules"]
    assert result.method == "randomized"


def test_another_vocabulary_is_saved_whole_with_its_tokenizer(driver: Driver, stories260k: Path) -> None:
    def grow(tensors: dict[str, torch.Tensor]) -> None:
        noise(0.05, "mlp")(tensors)
        name = "model.embed_tokens.weight"
        tensors[name] = torch.cat([tensors[name], torch.ones(3, tensors[name].shape[1])])

    driver.add("tuned", stories260k, grow, vocab_size=515)
    result = driver.run(model="tuned", base_model="base")
    assert result.saved == ("model.embed_tokens.weight",)
    assert adapted(driver, "adapter")["model.embed_tokens.weight"].shape[0] == 515
    skipped = driver.run("job-2", model="tuned", base_model="base", embeddings="skip", name="other")
    assert skipped.saved == ()


def test_the_registry_shows_an_adapter_as_what_it_is(driver: Driver, stories260k: Path) -> None:
    driver.add("tuned", stories260k, noise(0.05, "mlp"))
    result = driver.run(model="tuned", base_model="base", rank=4)
    registry = Registry(driver.settings.models_dir)
    info = registry.get("adapter")
    assert info.operation == "extract-lora"
    assert info.architecture == "LoRA of LlamaForCausalLM"
    assert info.parameters == result.parameters
    assert "adapter" in [row.name for row in registry.list()]
    manifest = registry.manifest("adapter")
    assert [(parent.field, parent.reference) for parent in manifest.parents] == [
        ("model", "tuned"), ("base_model", "base"),
    ]  # fmt: skip
    card = registry.file("adapter", "README.md").read_text()
    assert "library_name: peft" in card
    assert 'PeftModel.from_pretrained(base, "adapter")' in card
    assert "AutoTokenizer" not in card
    with pytest.raises(UnknownModel, match="an adapter, not a whole model"):
        plan_context(driver.settings, "x").resolver.open("adapter", field="model")
    parent = DescribeParent(
        field="models[0].model.lora",
        reference="adapter",
        directory=driver.path("adapter"),
        cache_dir=driver.settings.cache_dir,
    ).run(UnitContext(driver.settings.home))
    assert len(parent.content_hash) == 64
    # An attempt that ended after publication finds its own result.
    count = len(driver.units)
    assert driver.run(model="tuned", base_model="base", rank=4) == result
    assert len(driver.units) == count


@pytest.mark.parametrize("part", ["norm", "embed_tokens"])
def test_what_differs_in_no_matrix_is_stored_whole(driver: Driver, stories260k: Path, part: str) -> None:
    driver.add("tuned", stories260k, noise(0.1, part))
    result = driver.run(model="tuned", base_model="base")
    assert (result.rank, result.error, result.lost) == (0, 0, ())
    assert result.saved
    assert all(part in name for name in result.saved)
    wanted = load_file(driver.path("tuned") / "model.safetensors")
    got = adapted(driver, "adapter")
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())
    config = json.loads((driver.path("adapter") / "adapter_config.json").read_text())
    # What PEFT asks for where no layer is to get factors.
    assert config["target_modules"] == "dummy-target-modules"
    only = driver.run("job-2", model="tuned", base_model="base", include=[part], name="only")
    assert (only.saved, only.matrices) == (result.saved, ())


def test_pytorch_files_are_converted_first(driver: Driver, stories260k: Path) -> None:
    driver.add("tuned", stories260k, noise(0.05, "mlp"))
    wanted = driver.run(model="tuned", base_model="base", rank=4)
    places = {}
    for name in ("tuned", "base"):
        places[name] = driver.settings.home / "pickled" / name
        places[name].mkdir(parents=True)
        for file in driver.path(name).iterdir():
            if file.suffix == ".json" and file.name != "aidocks.json":
                (places[name] / file.name).write_bytes(file.read_bytes())
        torch.save(load_file(driver.path(name) / "model.safetensors"), places[name] / "pytorch_model.bin")
    driver.settings = driver.settings.model_copy(update={"allowed_roots": str(driver.settings.home)})
    fields = {"model": str(places["tuned"]), "base_model": str(places["base"])}
    found = driver.run("job-2", **fields, rank=4, name="other")
    assert found.matrices == wanted.matrices
    one, other = (load_file(driver.path(n) / "adapter_model.safetensors") for n in ("adapter", "other"))
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())
    assert [p.path_name for p in Registry(driver.settings.models_dir).manifest("other").parents] == [
        "tuned", "base",
    ]  # fmt: skip


def test_models_that_do_not_belong_together_are_refused(
    driver: Driver, stories260k: Path, tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    other = tiny_llama(tmp_path / "other", num_hidden_layers=5, intermediate_size=64)
    driver.add("other", other)
    with pytest.raises(IncompatibleModels, match=r"mlp\.down_proj\.weight is \[64, 64\], in the base"):
        driver.run(model="other", base_model="base")
    driver.add("kind", stories260k, model_type="mistral")
    with pytest.raises(IncompatibleModels, match="model_type is 'mistral'") as caught:
        driver.run(model="kind", base_model="base")
    assert caught.value.field == "model"
    driver.add("fewer", stories260k, drop("model.norm.weight"))
    with pytest.raises(IncompatibleModels, match=r"no tensor model\.norm\.weight"):
        driver.run(model="fewer", base_model="base")
    with pytest.raises(InvalidSpec, match="nothing to extract"):
        driver.run(model="base", base_model="base")
    with pytest.raises(InvalidSpec, match="that `include` and `exclude` leave"):
        driver.run(model="base", base_model="base", include=["nowhere"])


def test_values_that_are_not_finite_are_named(driver: Driver, stories260k: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = torch.nan

    driver.add("tuned", stories260k, spoil)
    with pytest.raises(CorruptCheckpoint, match=r"layers\.2\.mlp\.up_proj\.weight of tuned"):
        driver.run(model="tuned", base_model="base")

    def spoil_whole(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][0] = torch.nan

    driver.add("other", stories260k, spoil_whole)
    with pytest.raises(CorruptCheckpoint, match=r"model\.norm\.weight of other"):
        driver.run("job-2", model="other", base_model="base")


@pytest.mark.parametrize("pattern", ["(a+)+$", "(", "a*b*c*d*e*", "(a|b){50}", "x" * 201, r"(a)\1", "(?=a)"])
def test_expressions_that_could_run_for_ever_are_refused(pattern: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        build_spec(ExtractLoraSpec, {"model": "a", "base_model": "b", "include": [pattern]})
    assert "include" in str(caught.value.problem())


def test_a_directory_with_an_adapter_can_be_imported(driver: Driver, stories260k: Path) -> None:
    driver.add("tuned", stories260k, noise(0.05, "mlp"))
    driver.run(model="tuned", base_model="base", rank=4)
    registry = Registry(driver.settings.models_dir)
    info = registry.import_checkpoint("copy", driver.path("adapter"))
    assert (info.operation, info.dtype) == ("import", "F32")
    assert info.architecture == "LoRA"
    assert info.parameters == registry.get("adapter").parameters
    assert {path.name for path in info.path.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "aidocks.json",
    }  # fmt: skip
    assert read_adapter(info.path).factors.keys() == read_adapter(driver.path("adapter")).factors.keys()
    spoiled = driver.path("copy") / "adapter_config.json"
    spoiled.write_text(json.dumps(json.loads(spoiled.read_text()) | {"peft_type": "IA3"}))
    with pytest.raises(IncompatibleModels, match="peft_type 'IA3'"):
        registry.import_checkpoint("other", driver.path("copy"))
    assert "other" not in registry.names()
