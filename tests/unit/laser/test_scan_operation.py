"""/laser/scan from spec to files, in this process, on small real models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import save_file

from aidocks.errors import CorruptCheckpoint, InvalidSpec, UnknownModel
from aidocks.jobs.submit import plan_context
from aidocks.laser import scan
from aidocks.laser.marchenko_pastur import fit_bulk
from aidocks.laser.scan_operation import LaserScan
from aidocks.models.registry import Registry
from aidocks.plan import UnitContext
from aidocks.settings import Settings
from aidocks.specs.laser_scan import LaserScanResult, LaserScanSpec

Run = Callable[..., LaserScanResult]


class Driver:
    """Runs plans; everything that crosses a process boundary goes through JSON."""

    def __init__(self, settings: Settings, workers: int = 1) -> None:
        self.context = plan_context(settings, "job-1", parallelism=workers)
        self.context.workspace.mkdir(parents=True, exist_ok=True)
        self.stages: list[str] = []
        self._workers = [UnitContext(self.context.workspace) for _ in range(workers)]

    def run(self, **fields: Any) -> LaserScanResult:
        spec = LaserScanSpec(**fields)
        LaserScan().preflight(spec, self.context)
        plan = LaserScan().plan(spec, self.context)
        results: list[Any] | None = None
        try:
            while True:
                stage = next(plan) if results is None else plan.send(results)
                self.stages.append(stage.name)
                made = {}
                for number, unit in reversed(list(enumerate(stage.units))):
                    carried = type(unit).model_validate_json(unit.model_dump_json())
                    assert carried.unit_id == unit.unit_id
                    result = carried.run(self._workers[number % len(self._workers)])
                    made[number] = unit.result_type.model_validate_json(result.model_dump_json())
                results = [made[number] for number in range(len(stage.units))]
        except StopIteration as stop:
            found: LaserScanResult = stop.value
            return LaserScanResult.model_validate_json(found.model_dump_json())


@pytest.fixture
def stories(settings: Settings, stories260k: Path) -> str:
    Registry(settings.models_dir).import_checkpoint("stories", stories260k)
    return "stories"


def add(settings: Settings, name: str, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> str:
    source = settings.home / f"source-{name}"
    source.mkdir()
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(config))
    Registry(settings.models_dir).import_checkpoint(name, source)
    return name


def test_a_whole_scan(settings: Settings, stories: str) -> None:
    driver = Driver(settings)
    result = driver.run(model=stories, keep=[0.5], top_fractions=[0.5, 0.25])
    assert driver.stages == ["hash", "device", "scan", "pictures", "report"]
    config = json.loads((Registry(settings.models_dir).path(stories) / "config.json").read_text())
    layers = config["num_hidden_layers"]
    assert result.matrices_scanned == len(result.matrices) == 7 * layers + 1
    assert [row.layer for row in result.matrices] == [i for i in range(layers) for _ in range(7)] + [None]
    assert result.matrices[-1].address == "model.embed_tokens.weight"
    rules = {outcome.rule: outcome for outcome in result.matrices[0].rules}
    assert {"laserrmt", "screenot", "fraction 0.5", "energy 0.5"} <= set(rules)
    assert rules["energy 0.5"].energy >= 0.5

    assert result.path is not None
    directory = Path(result.path)
    assert directory.is_relative_to(settings.cache_dir)
    assert set(result.files) == {path.name for path in directory.iterdir()}
    filed = LaserScanResult.model_validate_json((directory / "scan.json").read_bytes())
    compact = [row.model_copy(update={"singular_values": ()}) for row in filed.matrices]
    assert filed.model_copy(update={"matrices": tuple(compact)}) == result
    with safe_open(directory / "spectra.safetensors", "np") as values:
        assert set(values.keys()) == {row.address for row in result.matrices}
        for row in filed.matrices:
            all_of_it = values.get_tensor(row.address)
            assert (all_of_it.dtype, all_of_it.shape) == (np.float64, (min(row.shape),))
            assert len(row.singular_values) == min(64, min(row.shape))
            ends = row.singular_values[0], row.singular_values[-1]
            assert ends == pytest.approx((all_of_it[0], all_of_it[-1]), rel=1e-5)
            assert row.outliers == (all_of_it > row.edge).sum()
            fit = fit_bulk(all_of_it, row.shape)
            assert (fit.sigma, fit.edge, fit.distance) == (row.sigma, row.edge, row.bulk_distance)
    kinds = (
        "mlp.down_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "no-layer",
        *(f"self_attn.{x}_proj" for x in "kqvo"),
    )
    assert {f"spectra-{kind}.png" for kind in kinds} < set(result.files)
    for name in (name for name in result.files if name.endswith(".png")):
        assert (directory / name).read_bytes().startswith(b"\x89PNG")
    assert [(found.score, found.top_fraction) for found in result.lists] == [
        ("noise_ratio", 0.5), ("original", 0.5), ("noise_ratio", 0.25), ("original", 0.25),
    ]  # fmt: skip
    for listed in result.lists:
        patterns = yaml.safe_load((directory / listed.file).read_text())["unfrozen_parameters"]
        assert len(patterns) == 1 + len(listed.addresses) == 1 + 7 * int(listed.top_fraction * layers)
    assert (directory / "unfrozen.yaml").read_text() == result.unfrozen_yaml
    assert (directory / result.lists[0].file).read_text() == result.unfrozen_yaml
    assert len(json.loads((directory / "layers.json").read_text())) == 4
    assert len(json.loads((directory / "snr_results.json").read_text())) == 7 * layers


def test_a_second_request_reads_no_tensor(
    settings: Settings, stories: str, stories260k: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Driver(settings).run(model=stories)

    def refuse(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(scan, "compute_values", refuse)
    again = Driver(settings)
    assert again.run(model=stories) == first
    assert again.stages == ["hash"]
    # Another name for the same bytes.
    Registry(settings.models_dir).import_checkpoint("copy", stories260k)
    assert Driver(settings).run(model="copy") == first
    # Another request of the same bytes: decisions are made again, of the values that were kept.
    other = Driver(settings)
    assert other.run(model=stories, keep=[0.3]).path != first.path
    assert other.stages == ["hash", "device", "scan", "pictures", "report"]
    # A file that was lost is written again.
    assert first.path is not None
    (Path(first.path) / "spectra.png").unlink()
    assert Driver(settings).run(model=stories) == first
    assert (Path(first.path) / "spectra.png").is_file()


def test_workers_change_nothing(settings: Settings, stories: str, tmp_path: Path) -> None:
    one = Driver(settings).run(model=stories)
    other = Settings(home=tmp_path / "other")
    Registry(other.models_dir).import_checkpoint("stories", Registry(settings.models_dir).path("stories"))
    four = Driver(other, workers=4).run(model="stories")
    assert four.model_dump(exclude={"path"}) == one.model_dump(exclude={"path"})


def test_rows_limit_the_answer_and_not_the_files(settings: Settings, stories: str) -> None:
    whole = Driver(settings).run(model=stories)
    short = Driver(settings).run(model=stories, rows=3)
    assert short.path == whole.path
    assert short.matrices == whole.matrices[:3]
    assert short.matrices_scanned == whole.matrices_scanned


def test_layers_and_kinds_choose(settings: Settings, stories: str) -> None:
    result = Driver(settings).run(model=stories, layers="1-2", kinds="q_proj,up_proj", embeddings=False)
    assert [(row.layer, row.kind) for row in result.matrices] == [
        (1, "up_proj"), (1, "q_proj"), (2, "up_proj"), (2, "q_proj"),
    ]  # fmt: skip
    assert all(not listed.also for listed in result.lists)


def test_weights_that_are_stored_twice_are_scanned_once(settings: Settings) -> None:
    embedding = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    tensors = {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": embedding.clone(),
        "model.other.weight": embedding + 1,
        "model.layers.0.up.weight": torch.eye(8),
    }
    result = Driver(settings).run(model=add(settings, "tied", tensors, {"model_type": "llama"}))
    assert [(row.address, row.tied) for row in result.matrices] == [
        ("model.layers.0.up.weight", ()),
        ("model.embed_tokens.weight", ("lm_head.weight",)),
        ("model.other.weight", ()),
    ]
    assert set(result.lists[0].also) == {"model.embed_tokens.weight", "lm_head.weight", "model.other.weight"}


def test_experts_of_one_tensor(settings: Settings) -> None:
    generator = torch.Generator().manual_seed(0)
    experts = torch.randn(4, 12, 8, generator=generator)
    experts[2] += 9  # the strongest signal
    name = "model.layers.0.mlp.experts.gate_up_proj"
    result = Driver(settings).run(model=add(settings, "moe", {name: experts}, {}), top_fractions=[0.25])
    assert [row.address for row in result.matrices] == [f"{name}[{expert}]" for expert in range(4)]
    assert {row.shape for row in result.matrices} == {(12, 8)}
    assert f"- ^{name}$[2:3]" in result.unfrozen_yaml


@pytest.mark.parametrize("model", ["bert-tiny-splade-mlm", "gpt2-shakespeare-char"])
def test_other_architectures(settings: Settings, shared_data: Path, model: str) -> None:
    Registry(settings.models_dir).import_checkpoint("other", shared_data / "models" / model)
    result = Driver(settings).run(model="other", kinds=None)
    assert result.matrices_scanned > 8
    assert {row.layer for row in result.matrices} >= {None, 0, 1}


@pytest.mark.parametrize(
    ("fields", "field", "hint"),
    [
        ({"layers": [99]}, "layers", "Its layers: 0-"),
        ({"kinds": ["q_prj"]}, "kinds", "q_proj"),
        ({"layers": [0], "kinds": ["embed_tokens"]}, "kinds", "Kinds in layers 0: down_proj"),
    ],
)
def test_what_a_model_does_not_have_is_refused(
    settings: Settings, stories: str, fields: dict[str, Any], field: str, hint: str | None
) -> None:
    with pytest.raises(InvalidSpec) as caught:
        Driver(settings).run(model=stories, **fields)
    assert caught.value.field == field
    assert hint is None or hint in str(caught.value.hint)


def test_models_that_cannot_be_scanned(settings: Settings) -> None:
    flat = add(settings, "flat", {"norm.weight": torch.ones(8)}, {})
    with pytest.raises(InvalidSpec, match="no two-dimensional weights") as caught:
        Driver(settings).run(model=flat)
    assert caught.value.field == "model"
    with pytest.raises(UnknownModel) as unknown:
        Driver(settings).run(model="nowhere")
    assert unknown.value.field == "model"
    broken = add(settings, "broken", {"a.weight": torch.full((4, 4), torch.nan)}, {})
    with pytest.raises(CorruptCheckpoint, match=r"a\.weight"):
        Driver(settings).run(model=broken)
    assert not list(settings.cache_dir.glob("scans/*"))


@pytest.mark.parametrize(
    ("field", "value"),
    [("keep", [0]), ("keep", [1.5]), ("top_fractions", [-1]), ("rows", -1), ("layers", []), ("keep", ["x"])],
)
def test_impossible_requests(field: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=field):
        LaserScanSpec(model="m", **{field: value})


def test_shares_are_read_as_people_write_them() -> None:
    spec = LaserScanSpec(model="m", keep="0.5, 0.5,0.9", top_fractions=0.25)  # type: ignore[arg-type]
    assert spec.keep == (0.5, 0.9)
    assert spec.top_fractions == (0.25,)
