"""``/train/emb`` and ``/train/rerank``: a model that finds texts, fine-tuned, and proof of what that was worth.

prepare the rows, look at the workers -> look for hard negatives, ask a teacher -> measure the base -> train -> load the
files again -> measure again -> publish.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from aidocks.models.names import derive_name
from aidocks.plan import PlanContext
from aidocks.retrieval.build import RetrievalBuild
from aidocks.retrieval.course import RetrievalCourse
from aidocks.retrieval.request import Found, RetrievalRequest, data_sources
from aidocks.specs.base import OperationResult, Spec
from aidocks.specs.train_emb import EmbeddingTrainSpec
from aidocks.specs.train_rerank import RerankerTrainSpec
from aidocks.specs.train_retrieval_result import RetrieverTrainResult
from aidocks.training.plan import TrainingOperation

SpecT = TypeVar("SpecT", EmbeddingTrainSpec, RerankerTrainSpec)


class _TrainRetriever(TrainingOperation[SpecT, RetrieverTrainResult, Found], Generic[SpecT]):
    """What both have in common. See the top of this module."""

    result_type: ClassVar[type[OperationResult]] = RetrieverTrainResult
    #: What the name of a result says was done to the base.
    suffix: ClassVar[str]

    def inputs(self, spec: SpecT) -> dict[str, str]:
        return spec.inputs()

    def name_of(self, spec: SpecT, job_id: str) -> str:
        return spec.name or derive_name(spec.base_model, self.suffix, job_id)

    def look_up(self, spec: SpecT, context: PlanContext) -> None:
        data_sources(spec, context)

    def open(self, spec: SpecT, context: PlanContext, converted: Mapping[str, Path]) -> RetrievalRequest:
        return RetrievalRequest(spec, context, converted)

    def course_of(self, request: RetrievalRequest, found: Found) -> RetrievalCourse:
        return RetrievalCourse(RetrievalBuild(request, found))


class TrainEmbedding(_TrainRetriever[EmbeddingTrainSpec]):
    """``/train/emb``. See the top of this module."""

    spec_type: ClassVar[type[Spec]] = EmbeddingTrainSpec
    operation: ClassVar[str] = "train-emb"
    suffix: ClassVar[str] = "emb"


class TrainReranker(_TrainRetriever[RerankerTrainSpec]):
    """``/train/rerank``. See the top of this module."""

    spec_type: ClassVar[type[Spec]] = RerankerTrainSpec
    operation: ClassVar[str] = "train-rerank"
    suffix: ClassVar[str] = "rerank"
