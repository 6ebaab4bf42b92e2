"""``aidocks byo-moe`` as people type it: with a file that was written for mergekit-moe, and with gates that learn."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aidocks.checkpoints.reader import Checkpoint
from aidocks.models.registry import Registry

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

# As such files are: comments, quotes, paths relative to where the command is given.
MERGEKIT = """\
base_model: ./models/base
gate_mode: hidden  # one of "hidden", "cheap_embed", or "random"
dtype: bfloat16  # output dtype (float32, float16, or bfloat16)
experts_per_token: 1
experts:
  - source_model: ./models/one
    positive_prompts:
      - "Write a story about a king"
      - "Once upon a time"
    ## (optional)
    negative_prompts:
      - "What is the sum of"
  - source_model: ./models/two
    noise_scale: 0.0
    positive_prompts:
    - "What is the sum of"
    - "def f(x):"
"""


@pytest.fixture
def models(tmp_path: Path, tiny_llama: Any) -> Path:
    for seed, name in enumerate(("base", "one", "two")):
        tiny_llama(tmp_path / "models" / name, seed=seed, num_hidden_layers=2)
    return tmp_path / "models"


def aidocks(*arguments: str, cwd: Path, home: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "AIDOCKS_HOME": str(home),
        "AIDOCKS_ALLOWED_ROOTS": str(cwd),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "aidocks", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_a_mergekit_file_as_it_is(models: Path, home: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_text(MERGEKIT)
    options = ("--name", "merged", "--chunks", "2", "--seqlen", "16", "--local", "--json")
    ended = aidocks("byo-moe", "config.yml", *options, cwd=tmp_path, home=home)
    assert ended.returncode == 0, ended.stderr
    job = json.loads(ended.stdout)
    assert job["result"]["gate_mode"] == "hidden"
    assert job["result"]["experts_per_token"] == 1
    merged = Checkpoint(Registry(home / "models").path("merged"))
    assert merged.config["num_local_experts"] == 2
    assert {entry.dtype for entry in merged.entries.values()} == {"BF16"}
    for number, name in enumerate(("one", "two")):
        source = Checkpoint(models / name).tensor("model.layers.1.mlp.down_proj.weight")
        found = merged.tensor(f"model.layers.1.block_sparse_moe.experts.{number}.w2.weight")
        assert found.equal(source.to(found.dtype))


def test_a_fitted_router_from_the_command_line(models: Path, home: Path, tmp_path: Path) -> None:
    words = {"one": ["licence", "copyright", "patent"], "two": ["seven", "eleven", "ninety"]}
    for name, vocabulary in words.items():
        generator = random.Random(name)
        records = [" ".join(generator.choices([*vocabulary, str(i)], k=14)) for i in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": r}) + "\n" for r in records))
    spec = {
        "base_model": str(models / "base"),
        "gate_mode": "fitted",
        "fit_tokens": 256,
        "chunks": 4,
        "seqlen": 16,
        "name": "fitted",
        "experts": [
            {"source_model": str(models / name), "dataset": str(tmp_path / f"{name}.jsonl")} for name in words
        ],
    }
    (tmp_path / "moe.json").write_text(json.dumps(spec))
    ended = aidocks("byo-moe", "moe.json", "--local", "--json", cwd=tmp_path, home=home)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)["result"]
    assert result["gate_scale"] >= 1
    assert [line["model"] for line in result["perplexities"]] == [
        "base",
        "experts[0]",
        "experts[1]",
        "average",
        "moe",
    ]
    for line in result["perplexities"]:
        assert [part["domain"] for part in line["domains"]] == ["experts[0]", "experts[1]", "text"]
    model = Registry(home / "models").path("fitted")
    assert all((model / picture).is_file() for picture in result["pictures"])
    assert "## Routing" in (model / "README.md").read_text()
    assert list((home / "workspaces").iterdir()) == []


def test_one_expert_is_none(models: Path, home: Path, tmp_path: Path) -> None:
    experts = [{"source_model": str(models / "one"), "positive_prompts": ["x"]}]
    (tmp_path / "moe.json").write_text(json.dumps({"base_model": str(models / "base"), "experts": experts}))
    ended = aidocks("byo-moe", "moe.json", "--local", cwd=tmp_path, home=home)
    assert ended.returncode == 3
    assert "experts" in ended.stderr
    assert "2 to 256" in ended.stderr
    assert not (home / "models").exists() or list((home / "models").iterdir()) == []
