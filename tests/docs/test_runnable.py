"""The blocks of the documentation that are marked ``test``, run in order against a real service."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aidocks.models.registry import Registry
from tests.support.documentation import blocks_of_all_pages, command_on_path
from tests.support.tiny_retrievers import make_embedder, make_reranker

RUN = [block for block in blocks_of_all_pages() if "test" in block.marks]


@pytest.fixture(scope="module")
def models(service: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Small models under the names of those that the pages speak of."""
    directory = tmp_path_factory.mktemp("models")
    registry = Registry(service.settings.models_dir)
    for name, make in {"all-minilm-l6-v2": make_embedder, "bge-reranker-base": make_reranker}.items():
        registry.import_checkpoint(name, make(directory / name))


@pytest.mark.e2e
@pytest.mark.usefixtures("models")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", sorted({block.page for block in RUN}))
def test_what_the_page_shows_works(page: str, service: Any, tmp_path: Path) -> None:
    environment = command_on_path(service.env, tmp_path)
    for block in RUN:
        if block.page != page:
            continue
        # The documentation speaks of a real model; here the smallest one stands in for it.
        text = block.text.replace("smollm2-135m-instruct", "tiny-base")
        command = {"bash": ["bash", "-euo", "pipefail", "-c", text], "python": [sys.executable, "-c", text]}
        ended = subprocess.run(
            command[block.language],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ended.returncode == 0, f"{block.name}\n{ended.stdout}\n{ended.stderr}"
