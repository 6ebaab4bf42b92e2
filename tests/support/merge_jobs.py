"""Drives ``/merge`` in process, on simulated workers, with small real models that differ in everything."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from aidocks.jobs.submit import plan_context
from aidocks.merge.operation import Merge
from aidocks.models.registry import Registry
from aidocks.plan import Unit, UnitContext
from aidocks.settings import Settings
from aidocks.specs.merge import MergeSpec
from aidocks.specs.merge_result import MergeResult
from aidocks.specs.read import build_spec, parse_yaml
from tests.conftest import make_tiny_llama

if TYPE_CHECKING:
    import torch

#: Of the models that tests make: four layers, 47 thousand parameters.
SHAPE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
PREFIX = "base_model.model."
#: What an adapter of :func:`add_adapter` changes.
ADAPTED = ("model.layers.0.self_attn.q_proj", "model.layers.3.mlp.down_proj")


class Killed(BaseException):
    """The process that drives the plan is gone."""


class Driver:
    """Runs plans on simulated workers; everything that crosses a process boundary goes through JSON.

    Args:
        settings: Of the installation.
        workers: That take turns; each has threads of its own.
        threads: Of every worker.
        job_id: Of the one job that it runs, as often as it is asked to.

    Attributes:
        units: Those that ran, in order.
        said: Messages.
    """

    def __init__(
        self, settings: Settings, workers: int = 1, threads: int = 1, job_id: str = "job-00000000000-c0ffee00"
    ) -> None:
        self.said: list[str] = []
        self.units: list[Unit[Any]] = []
        self.stages: list[str] = []
        self.context = plan_context(settings, job_id, parallelism=workers, say=self.said.append)
        self._journal: dict[str, BaseModel] = {}
        self._workers = [UnitContext(self.context.workspace, threads=threads) for _ in range(workers)]

    def run(self, text: str, /, *, kill_after: int | None = None, **fields: Any) -> MergeResult:
        """Return the result of a request in YAML; ``kill_after`` so many units everything ends."""
        spec = request(text, **fields)
        if not self.units:
            Merge().preflight(spec, self.context)
        self.context.workspace.mkdir(parents=True, exist_ok=True)
        plan = Merge().plan(spec, self.context)
        results: list[BaseModel] | None = None
        try:
            while True:
                stage = next(plan) if results is None else plan.send(results)
                self.stages.append(stage.name)
                # Backwards and spread over the workers: no unit may rely on another having run where it runs.
                for number, unit in reversed(list(enumerate(stage.units))):
                    if kill_after is not None and len(self.units) >= kill_after:
                        raise Killed
                    self._run(unit, self._workers[number % len(self._workers)])
                results = [self._journal[unit.unit_id] for unit in stage.units]
        except StopIteration as stop:
            result: MergeResult = stop.value
            return MergeResult.model_validate_json(result.model_dump_json())

    def _run(self, unit: Unit[Any], worker: UnitContext) -> None:
        if unit.unit_id in self._journal:
            return
        carried = type(unit).model_validate_json(unit.model_dump_json())
        assert carried.unit_id == unit.unit_id
        result = carried.run(worker)
        assert all(file.path.is_file() for file in carried.outputs(result))
        self.units.append(unit)
        self._journal[unit.unit_id] = unit.result_type.model_validate_json(result.model_dump_json())


def request(text: str, /, **fields: Any) -> MergeSpec:
    """Return the request of a YAML text, with further fields."""
    return build_spec(MergeSpec, parse_yaml(text) | fields)


def make_family(directory: Path, *names: str, **shape: Any) -> None:
    """Save a small Llama of every name below a directory, no tensor of which equals another's."""
    for seed, name in enumerate(names):
        model = make_tiny_llama(directory / name, seed=seed, **(SHAPE | shape))
        change(model, _noise(seed))


def _noise(seed: int) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """Return what makes norms unequal, which transformers begins at one: a mix-up would not show."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return lambda _, tensor: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)


def change(model: Path, of: Callable[[str, torch.Tensor], torch.Tensor | None], **config: Any) -> Path:
    """Change a model where it lies: every tensor becomes what ``of`` makes of it, or goes; and its configuration."""
    from safetensors.torch import load_file, save_file

    file = model / "model.safetensors"
    found = {name: of(name, tensor) for name, tensor in sorted(load_file(file).items())}
    kept = {name: tensor.contiguous() for name, tensor in found.items() if tensor is not None}
    save_file(kept, file, {"format": "pt"})
    document = json.loads((model / "config.json").read_text()) | config
    (model / "config.json").write_text(json.dumps(document))
    return model


def copy_model(model: Path, target: Path) -> Path:
    """Return a copy of a model."""
    return Path(shutil.copytree(model, target))


def add_adapter(directory: Path, seed: int = 0, modules: tuple[str, ...] = ADAPTED) -> Path:
    """Save a LoRA adapter, as PEFT does, that fits the small models."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "org/base"}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for module in modules:
        columns = SHAPE["intermediate_size"] if "down_proj" in module else SHAPE["hidden_size"]
        a, b = torch.randn(4, columns, generator=generator), torch.randn(32, 4, generator=generator)
        tensors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": 0.1 * b}
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint."""
    from safetensors.torch import load_file

    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}


def digests(directory: Path) -> dict[str, str]:
    """Return hashes of all files whose bytes must not depend on how the job was run."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in ("aidocks.json", "README.md")
    }


def weights(directory: Path) -> Mapping[str, str]:
    """Return hashes of the weight files alone."""
    return {name: found for name, found in digests(directory).items() if name.endswith(".safetensors")}


def left_behind(home: Path, *known: str) -> list[str]:
    """Return what is in registry and workspaces, hidden files included, beside models that were there before."""
    found = []
    for place in (home / "models", home / "workspaces"):
        for path in place.rglob("*") if place.is_dir() else ():
            parts = path.relative_to(place).parts
            # The registry's lock and the empty place that imports pass through say nothing of a model.
            if parts[0] not in known and path.name != ".staging" and ".lock" not in (path.suffix, path.name):
                found.append(str(path.relative_to(home)))
    return found


def add_models(settings: Settings, *sources: Path) -> None:
    """Import models into the registry, under the names of their directories."""
    for source in sources:
        Registry(settings.models_dir).import_checkpoint(source.name, source)
