"""Every file of examples/ does what it says, against a real service."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aidocks.specs.laser import LaserSpec
from aidocks.specs.moe import MoESpec
from aidocks.specs.read import build_spec, read_spec_file
from aidocks.specs.train_llm import LLMTrainSpec
from tests.support.documentation import ROOT, command_on_path
from tests.support.tiny_retrievers import make_embedder, make_encoder, questions

EXAMPLES = ROOT / "examples"
RUNNABLE = sorted(
    path.name
    for path in EXAMPLES.iterdir()
    if path.suffix in (".py", ".sh") and path.name != "retrieval.py"  # which takes other models, and data
)
#: What each leaves in the registry, as endings of the name that it is given.
MADE = {"cli.sh": ("-laser", "-moe"), "client_async.py": ("-marchenko_pastur", "-laserrmt")}


@pytest.mark.e2e
@pytest.mark.timeout(300)
@pytest.mark.parametrize("example", RUNNABLE)
def test_example(example: str, service: Any, tmp_path: Path) -> None:
    from aidocks.client.http import Client

    name = f"example-{example.replace('.', '-').replace('_', '-')}"
    program = [sys.executable] if example.endswith(".py") else ["bash"]
    ended = subprocess.run(
        [*program, str(EXAMPLES / example), "tiny-base", name],
        cwd=tmp_path,
        env=command_on_path(service.env, tmp_path),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    with Client(service.url) as client:
        made = {info.name for info in client.models()}
    assert {f"{name}{ending}" for ending in MADE.get(example, ("",))} <= made


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_the_closed_loop_of_retrieval(service: Any, tmp_path: Path) -> None:
    """Negatives, two trainings, an index of a folder, and the table that compares."""
    from aidocks.client.http import Client
    from aidocks.models.registry import Registry

    registry = Registry(service.settings.models_dir)
    for name, make in {"tiny-finder": make_embedder, "tiny-encoder": make_encoder}.items():
        registry.import_checkpoint(name, make(tmp_path / name))
    rows = [{"query": row["query"], "positive": row["pos"][0]} for row in questions(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = tmp_path / "documents" / "of places"
    documents.mkdir(parents=True)
    for number in range(0, 60, 20):
        texts = [text for row in rows[number : number + 20] for text in (row["positive"], "Nothing is here.")]
        (documents / f"{number}.md").write_text("\n\n".join(["# Places", *texts]))
    command = [
        sys.executable,
        str(EXAMPLES / "retrieval.py"),
        "tiny-finder",
        "tiny-encoder",
        "--name",
        "loop",
    ]
    data = ["--data", "rows.jsonl", "--documents", "documents", "--max-steps", "6"]
    ended = subprocess.run(
        [*command, *data], cwd=tmp_path, env=service.env, capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    assert "to ask, 61 passages to search" in ended.stdout
    table = ended.stdout.partition("MRR@10")[2]
    lines = [" ".join(line.split()) for line in table.splitlines()]
    for name in ("tiny-finder", "loop-embedder", "loop-embedder + loop-reranker"):
        assert any(re.fullmatch(rf"{re.escape(name)} \d\.\d{{3}} \d+%", line) for line in lines), table
    assert "tiny-finder + tiny-encoder - it gives no scores yet" in lines
    with Client(service.url) as client:
        assert {"loop-embedder", "loop-reranker"} <= {info.name for info in client.models()}


@pytest.mark.parametrize(
    ("file", "spec_type"),
    [("laser.yaml", LaserSpec), ("moe.yaml", MoESpec), ("train.yaml", LLMTrainSpec)],
)
def test_example_specs_are_valid(file: str, spec_type: Any) -> None:
    build_spec(spec_type, read_spec_file(EXAMPLES / file))
