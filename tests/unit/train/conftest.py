"""Very small models that find texts, and trainings of them, for all tests of the training loop."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.support.small_retriever_training import rankings, small_training, train_here
from tests.support.tiny_retrievers import make_decoder, make_embedder, make_encoder, make_reranker


@pytest.fixture
def own_environment() -> Iterator[None]:
    """Let a test, in which the loop sets what libraries read, leave the environment as it was."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def quick_collection() -> Iterator[None]:
    """Every training has Python look for garbage, which takes longer than the training where libraries count, too."""
    for name in ("embedding", "reranking"):  # nothing more is imported by them afterwards
        import_module(f"train.retrieval.{name}")
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        "embedder": make_embedder(root / "embedder"),
        "encoder": make_encoder(root / "encoder"),
        "reranker": make_reranker(root / "reranker"),
        "decoder": make_decoder(root / "decoder"),
    }


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, bases: dict[str, Path]) -> dict[str, Any]:
    """A training of each kind; the reranker is made of a plain encoder, so its head is made of nothing."""
    root = tmp_path_factory.mktemp("undisturbed")
    given: dict[str, Any] = {"held_out": rankings(50)[40:], "save_total_limit": 3}
    return {
        "embedding": train_here(small_training(root / "embedding", bases["embedder"], **given)),
        "reranker": train_here(small_training(root / "reranker", bases["encoder"], "reranker", **given)),
    }
