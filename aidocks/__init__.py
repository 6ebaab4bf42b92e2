"""AIDocks: the dry dock for open-weight language models.

>>> from aidocks import Client
>>> result = Client().laser(base_model_name="smollm2-135m-instruct", laser_model_name="my-laser").wait()

Importing this package imports nothing else; each name below is imported when it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from aidocks._version import __version__

if TYPE_CHECKING:
    from aidocks.client.async_http import AsyncClient
    from aidocks.client.http import Client
    from aidocks.client.job import AsyncJobHandle, JobHandle
    from aidocks.errors import AIDocksError
    from aidocks.laser.factored import load_factored
    from aidocks.specs.extract_lora import ExtractLoraResult, ExtractLoraSpec
    from aidocks.specs.laser import LaserSpec
    from aidocks.specs.laser_result import LaserResult
    from aidocks.specs.laser_scan import LaserScanResult, LaserScanSpec
    from aidocks.specs.merge import MergeSpec
    from aidocks.specs.merge_evolve import MergeEvolveSpec
    from aidocks.specs.merge_evolve_result import MergeEvolveResult
    from aidocks.specs.merge_result import MergeResult
    from aidocks.specs.moe import ExpertSpec, MoESpec
    from aidocks.specs.moe_result import MoEResult
    from aidocks.specs.train_emb import EmbeddingTrainSpec
    from aidocks.specs.train_llm import LLMTrainSpec
    from aidocks.specs.train_llm_result import LLMTrainResult
    from aidocks.specs.train_rerank import RerankerTrainSpec
    from aidocks.specs.train_retrieval_result import RetrieverTrainResult

__all__ = [
    "AIDocksError",
    "AsyncClient",
    "AsyncJobHandle",
    "Client",
    "EmbeddingTrainSpec",
    "ExpertSpec",
    "ExtractLoraResult",
    "ExtractLoraSpec",
    "JobHandle",
    "LLMTrainResult",
    "LLMTrainSpec",
    "LaserResult",
    "LaserScanResult",
    "LaserScanSpec",
    "LaserSpec",
    "MergeEvolveResult",
    "MergeEvolveSpec",
    "MergeResult",
    "MergeSpec",
    "MoEResult",
    "MoESpec",
    "RerankerTrainSpec",
    "RetrieverTrainResult",
    "__version__",
    "load_factored",
]

_MODULES = {
    "AIDocksError": "aidocks.errors",
    "AsyncClient": "aidocks.client.async_http",
    "AsyncJobHandle": "aidocks.client.job",
    "Client": "aidocks.client.http",
    "EmbeddingTrainSpec": "aidocks.specs.train_emb",
    "ExpertSpec": "aidocks.specs.moe",
    "ExtractLoraResult": "aidocks.specs.extract_lora",
    "ExtractLoraSpec": "aidocks.specs.extract_lora",
    "JobHandle": "aidocks.client.job",
    "LLMTrainResult": "aidocks.specs.train_llm_result",
    "LLMTrainSpec": "aidocks.specs.train_llm",
    "LaserResult": "aidocks.specs.laser_result",
    "LaserScanResult": "aidocks.specs.laser_scan",
    "LaserScanSpec": "aidocks.specs.laser_scan",
    "LaserSpec": "aidocks.specs.laser",
    "MergeEvolveResult": "aidocks.specs.merge_evolve_result",
    "MergeEvolveSpec": "aidocks.specs.merge_evolve",
    "MergeResult": "aidocks.specs.merge_result",
    "MergeSpec": "aidocks.specs.merge",
    "MoEResult": "aidocks.specs.moe_result",
    "MoESpec": "aidocks.specs.moe",
    "RerankerTrainSpec": "aidocks.specs.train_rerank",
    "RetrieverTrainResult": "aidocks.specs.train_retrieval_result",
    "load_factored": "aidocks.laser.factored",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'aidocks' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
