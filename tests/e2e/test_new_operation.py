"""The promise of CONTRIBUTING.md: a spec, an operation file and one line give an operation all its doors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SPEC = '''
"""The spec of the counting operation."""
from pydantic import ConfigDict, Field
from aidocks.specs.base import ModelRef, OperationResult, Spec

class CountSpec(Spec):
    """Count the parameters of a model."""
    model_config = ConfigDict(json_schema_extra={"examples": [{"source": "tiny-base"}]})
    source: ModelRef

class CountResult(OperationResult):
    """How many there are."""
    parameters: int = Field(description="Parameters of the model.")
'''

OPERATION = '''
"""Count the parameters of a model, tensor by tensor."""
from pathlib import Path
from pydantic import BaseModel
from aidocks.checkpoints.reader import Checkpoint
from aidocks.plan import Operation, Plan, PlanContext, Stage, Unit, UnitContext
from aidocks.specs.count import CountResult, CountSpec

class TensorCount(BaseModel):
    count: int

class CountTensor(Unit[TensorCount]):
    result_type = TensorCount
    checkpoint: Path
    tensor: str

    @property
    def label(self) -> str:
        return self.tensor

    def run(self, context: UnitContext) -> TensorCount:
        return TensorCount(count=Checkpoint(self.checkpoint).entries[self.tensor].numel)

class Count(Operation[CountSpec, CountResult]):
    spec_type = CountSpec
    result_type = CountResult

    def inputs(self, spec: CountSpec) -> dict[str, str]:
        return {"source": spec.source}

    def plan(self, spec: CountSpec, context: PlanContext) -> Plan[CountResult]:
        source = context.resolver.resolve(spec.source, field="source").path
        tensors = Checkpoint(source).entries
        counts = yield Stage("count", tuple(CountTensor(checkpoint=source, tensor=name) for name in tensors))
        return CountResult(parameters=sum(c.count for c in counts))
'''

LINE = 'Registration("count", "aidocks.specs.count:CountSpec", "aidocks.count.operation:Count", "Count parameters."),'

DOORS = """
import json
from aidocks import Client, remote
from aidocks.settings import Settings
from serve.app import create_api
api = create_api(Settings())
print(json.dumps({
    "endpoint": sorted(api.openapi()["paths"]["/count"]),
    "documented": "Count the parameters" in json.dumps(api.openapi()["paths"]["/count"]["post"])
                  or "Count parameters." in json.dumps(api.openapi()["paths"]["/count"]["post"]),
    "client": callable(Client("http://127.0.0.1:9").count),
    "remote": hasattr(remote.count, "remote"),
}))
"""


@pytest.fixture(scope="module")
def branch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the trivial operation added, exactly as CONTRIBUTING.md says."""
    root = tmp_path_factory.mktemp("branch")
    for package in ("aidocks", "cluster", "serve", "train"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "aidocks" / "specs" / "count.py").write_text(SPEC)
    (root / "aidocks" / "count").mkdir()
    (root / "aidocks" / "count" / "__init__.py").write_text('"""Counting."""\n')
    (root / "aidocks" / "count" / "operation.py").write_text(OPERATION)
    table = root / "aidocks" / "operations.py"
    table.write_text(table.read_text().replace("OPERATIONS = (\n", f"OPERATIONS = (\n    {LINE}\n"))
    return root


def run_on(branch: Path, home: Path, *arguments: str) -> str:
    environment = os.environ | {"AIDOCKS_HOME": str(home), "PYTHONPATH": str(branch)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=branch, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_new_operation_has_every_door(branch: Path, home: Path) -> None:
    doors = json.loads(run_on(branch, home, "-c", DOORS))
    assert doors == {"endpoint": ["post"], "documented": True, "client": True, "remote": True}
    assert "count" in run_on(branch, home, "-m", "aidocks", "--help")
    assert "--source" in run_on(branch, home, "-m", "aidocks", "count", "--help")


def test_a_new_operation_runs_from_the_command_line(
    branch: Path, home: Path, tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors import safe_open

    model = tiny_llama(tmp_path / "model")
    with safe_open(model / "model.safetensors", "pt") as weights:
        expected = sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118
    run_on(branch, home, "-m", "aidocks", "models", "import", str(model), "tiny-base")
    output = run_on(branch, home, "-m", "aidocks", "count", "--local", "--json", "--source", "tiny-base")
    assert f'"parameters": {expected}' in output
