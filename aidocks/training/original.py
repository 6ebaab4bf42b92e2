"""``/train``: the original project's request, done as the one that it stands for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from aidocks.errors import AIDocksError
from aidocks.plan import Operation, Plan, PlanContext
from aidocks.retrieval.operation import TrainEmbedding, TrainReranker
from aidocks.specs.base import ModelResult, OperationResult, Spec
from aidocks.specs.train import OriginalTrainSpec, field_here
from aidocks.specs.train_emb import EmbeddingTrainSpec
from aidocks.specs.train_llm import LLMTrainSpec
from aidocks.specs.train_llm_result import LLMTrainResult
from aidocks.specs.train_rerank import RerankerTrainSpec
from aidocks.specs.train_retrieval_result import RetrieverTrainResult
from aidocks.training.operation import TrainLLM

_OPERATIONS: dict[type[Spec], type[Operation[Any, Any]]] = {
    LLMTrainSpec: TrainLLM,
    EmbeddingTrainSpec: TrainEmbedding,
    RerankerTrainSpec: TrainReranker,
}


class OriginalTrain(Operation[OriginalTrainSpec, ModelResult]):
    """See the top of this module."""

    spec_type: ClassVar[type[Spec]] = OriginalTrainSpec
    result_type: ClassVar[type[OperationResult]] = LLMTrainResult
    output_field: ClassVar[str] = "peft_model_name"

    def read_result(self, result: Mapping[str, Any]) -> OperationResult:
        # What finds texts has a kind, and language models have none.
        kind = RetrieverTrainResult if "kind" in result else LLMTrainResult
        return kind.model_validate(result, extra="ignore")

    def output_name(self, spec: OriginalTrainSpec, job_id: str) -> str | None:
        return _meant(spec).output_name(spec.request(), job_id)

    def inputs(self, spec: OriginalTrainSpec) -> dict[str, str]:
        return {field_here(field): model for field, model in _meant(spec).inputs(spec.request()).items()}

    def preflight(self, spec: OriginalTrainSpec, context: PlanContext) -> None:
        with _in_original_words():
            _meant(spec).preflight(spec.request(), context)

    def plan(self, spec: OriginalTrainSpec, context: PlanContext) -> Plan[ModelResult]:
        with _in_original_words():
            result: ModelResult = yield from _meant(spec).plan(spec.request(), context)
            return result


def _meant(spec: OriginalTrainSpec) -> Operation[Any, Any]:
    return _OPERATIONS[type(spec.request())]()


@contextmanager
def _in_original_words() -> Iterator[None]:
    """Let errors name fields as the original request does."""
    try:
        yield
    except AIDocksError as error:
        error.field = field_here(error.field) if error.field else None
        raise
