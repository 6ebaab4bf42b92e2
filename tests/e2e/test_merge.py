"""Merges at a real service with two workers: over HTTP, from Python, and from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml

from aidocks.client.http import Client
from aidocks.errors import InvalidSpec, NameTaken
from aidocks.specs.merge_result import MergeResult
from tests.support.merge_jobs import add_models, make_family, tensors, weights

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("merge-one", "merge-two")

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

SLERP: dict[str, Any] = {
    "merge_method": "slerp",
    "base_model": "merge-one",
    "models": [{"model": "merge-two"}],
    "parameters": {"t": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]},
}
# As such files are: comments, anchors, scientific notation, parameters that mean nothing to the method.
DOCUMENTS = """\
# a first merge
name: both
merge_method: linear
models:
  - model: merge-one
    parameters: &half
      weight: 5e-1
  - model: merge-two
    parameters: *half
---
models:
  - model: both
    parameters: {weight: 0.3, density: 0.5}
merge_method: dare_ties
base_model: merge-one
parameters:
  int8_mask: true
dtype: bfloat16
"""


@pytest.fixture(scope="module")
def models(service: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of two models that the service has."""
    directory = tmp_path_factory.mktemp("merge")
    make_family(directory, *MODELS)
    add_models(service.settings, *(directory / name for name in MODELS))
    return {name: tensors(directory / name) for name in MODELS}


def aidocks(*arguments: str, env: Mapping[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aidocks", *arguments]
    return subprocess.run(command, cwd=cwd, env=dict(env), capture_output=True, text=True, check=False)


def test_over_http(service: Any, models: dict[str, dict[str, torch.Tensor]]) -> None:
    body = SLERP | {
        "name": "merged-http",
        "max_shard_size": "60KB",
        "evaluate": True,
        "chunks": 2,
        "seqlen": 16,
    }
    with httpx.Client(base_url=service.url, timeout=60) as http:
        answer = http.post("/merge", json=body)
        assert answer.status_code == 202, answer.text
        job = answer.json()
        assert (job["operation"], job["output_name"]) == ("merge", "merged-http")
        with http.stream(
            "GET", f"/jobs/{job['id']}/events", headers={"accept": "text/event-stream"}
        ) as stream:
            kinds = [line[7:] for line in stream.iter_lines() if line.startswith("event: ")]
        assert kinds[:2] == ["queued", "started"]
        assert kinds[-1] == "succeeded"
        assert kinds.count("stage_started") == 4  # inputs, merge, evaluate, report
        job = http.get(f"/jobs/{job['id']}").json()
        assert job["status"] == "succeeded"
        result = MergeResult.model_validate(job["result"])
        assert result.steps[0].files > 2
        assert [model.model for model in result.perplexities] == ["base", "models[0]", "merge"]
        taken = http.post("/merge", json=body)
        assert (taken.status_code, taken.json()["errors"][0]["field"]) == (409, "name")
        wrong = http.post("/merge", json=body | {"name": "other", "merge_method": "slurp"})
        assert (wrong.status_code, wrong.json()["errors"][0]["field"]) == (422, "merge_method")
        assert "'slerp'" in wrong.json()["errors"][0]["hint"]
    with Client(service.url) as client:
        history = client.job(job["id"]).history()
    parallelism = next(event.data["parallelism"] for event in history if event.type == "started")
    ran = [
        event.data for event in history if event.type == "unit_finished" and event.data["stage"] == "merge"
    ]
    assert sum(unit["label"].endswith(".safetensors") for unit in ran) == result.steps[0].files
    assert 1 <= len({unit["worker"] for unit in ran}) <= parallelism
    made = tensors(Path(str(result.path)))
    one, two = (models[name] for name in MODELS)
    first, last = (f"model.layers.{n}.mlp.up_proj.weight" for n in (0, 3))
    assert torch.equal(made[first], one[first])
    assert torch.equal(made[last], two[last])


def test_from_python(service: Any, models: object, tmp_path: Path) -> None:
    with Client(service.url) as client:
        plan = client.merge(SLERP, dry_run=True).wait()
        assert isinstance(plan, MergeResult)
        assert plan.model is None
        handle = client.merge(SLERP, name="merged-python", dtype="bfloat16")
        result = handle.wait()
        assert isinstance(result, MergeResult)
        assert result.parts == plan.parts
        assert [event.type for event in handle.events()][-1] == "succeeded"
        copied = client.download("merged-python", tmp_path)
        assert weights(copied) == weights(Path(str(result.path)))
        with pytest.raises(NameTaken):
            client.merge(SLERP, name="merged-python")
        with pytest.raises(InvalidSpec) as caught:
            client.merge(SLERP, parameters={"t": 0.5, "wieght": 1})
        assert caught.value.field == "parameters.wieght"


def test_from_the_command_line(service: Any, models: object, home: Path, tmp_path: Path) -> None:
    """The same file at the service and without one: the same bytes, though random numbers are drawn."""
    (tmp_path / "config.yaml").write_text(DOCUMENTS)
    options = ("config.yaml", "--seed", "7", "--json")
    env = {key: value for key, value in service.env.items() if key != "AIDOCKS_URL"}
    there = aidocks("merge", *options, "--name", "merged-there", "--url", service.url, env=env, cwd=tmp_path)
    assert there.returncode == 0, there.stderr
    alone = env | {"AIDOCKS_HOME": str(home)}
    for name in MODELS:
        source = service.settings.models_dir / name
        imported = aidocks("models", "import", str(source), name, env=alone, cwd=source.parent)
        assert imported.returncode == 0, imported.stderr
    here = aidocks("merge", *options, "--name", "merged-here", "--local", env=alone, cwd=tmp_path)
    assert here.returncode == 0, here.stderr
    results = [MergeResult.model_validate(json.loads(ended.stdout)["result"]) for ended in (there, here)]
    assert [step.name for step in results[0].steps] == ["both", "merged-there"]
    assert results[0].dtype == "bfloat16"
    assert any("int8_mask" in note for note in results[0].notes)
    written, local = (Path(str(result.path)) for result in results)
    assert weights(written) == weights(local)
    kept = yaml.safe_load((written / "mergekit_config.yml").read_text())
    assert (kept["stages"][0]["name"], kept["seed"]) == ("both", 7)


def test_a_wrong_file_from_the_command_line(service: Any, models: object, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(DOCUMENTS.replace("density: 0.5", "density: 5"))
    ended = aidocks("merge", "config.yaml", "--url", service.url, env=service.env, cwd=tmp_path)
    assert ended.returncode == 3
    assert "models[0].parameters.density" in ended.stderr
    assert "Traceback" not in ended.stderr
