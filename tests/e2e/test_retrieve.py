"""/embed and /rerank on the real service: computed in a process of its own, which may die."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from aidocks.client.async_http import AsyncClient
from aidocks.client.http import Client
from aidocks.models.registry import Registry
from tests.support.tiny_retrievers import make_embedder, make_reranker

pytestmark = pytest.mark.e2e

TEXTS = [f"where is the {thing}?" for thing in ("river", "king", "queen", "bridge")]


@pytest.fixture(scope="module")
def models(service: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("retrievers")
    made = {"served-embedder": make_embedder(root / "e"), "served-reranker": make_reranker(root / "r")}
    for name, path in made.items():
        Registry(service.settings.models_dir).import_checkpoint(name, path)
    return made


@pytest.fixture(scope="module")
def vectors(models: dict[str, Path]) -> Any:
    from sentence_transformers import SentenceTransformer

    path = str(models["served-embedder"])
    return SentenceTransformer(path, device="cpu", local_files_only=True).encode(TEXTS)


def processes(service: Any, deployment: str) -> list[psutil.Process]:
    """Return the processes of a deployment of this service."""
    found = []
    for process in psutil.process_iter():
        try:
            mine = process.environ().get("AIDOCKS_HOME") == str(service.settings.home)
            if mine and f"ServeReplica:api:{deployment}" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_64_at_once(service: Any, vectors: Any) -> None:
    async def many() -> list[Any]:
        async with AsyncClient(service.url, retry_s=60) as client:
            return await asyncio.gather(*(client.embed("served-embedder", TEXTS[n % 4]) for n in range(64)))

    for n, answer in enumerate(asyncio.run(many())):
        np.testing.assert_allclose(answer.embeddings, vectors[n % 4 : n % 4 + 1], atol=1e-5)
    assert len(processes(service, "retrieval")) == 1
    for process in processes(service, "http"):
        assert not [opened for opened in process.memory_maps() if "libtorch" in opened.path]


def test_a_process_that_dies_is_replaced(service: Any, vectors: Any) -> None:
    with Client(service.url, retry_s=120) as client:
        client.embed("served-embedder", TEXTS)
        (process,) = processes(service, "retrieval")
        os.kill(process.pid, signal.SIGKILL)
        answer = client.embed("served-embedder", TEXTS)
        np.testing.assert_allclose(answer.embeddings, vectors, atol=1e-5)
        assert client.health()["status"] == "ok"


def test_the_command_line(service: Any, models: dict[str, Path]) -> None:
    words = ["rerank", "served-reranker", "the king", *TEXTS, "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "aidocks", *words], env=service.env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert sorted(one["index"] for one in json.loads(done.stdout)["results"]) == [0, 1, 2, 3]
