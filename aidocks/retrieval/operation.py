"""``/train/emb`` and ``/train/rerank``: a model that finds texts, fine-tuned, and proof of what that was worth.

prepare the rows, look at the workers -> look for hard negatives, ask a teacher -> measure the base -> train -> load the
files again -> measure again -> publish.
"""

from __future__ import annotations

from typing import ClassVar, Generic, TypeVar

from aidocks.checkpoints.writer import parse_size
from aidocks.models.converting import are_at_hand, bring
from aidocks.models.hub import require_token
from aidocks.models.names import derive_name
from aidocks.models.publication import find_published, publish, upload
from aidocks.models.unchanged import require_unchanged
from aidocks.plan import Operation, Plan, PlanContext
from aidocks.retrieval.build import RetrievalBuild
from aidocks.retrieval.course import RetrievalCourse
from aidocks.retrieval.request import RetrievalRequest, data_sources
from aidocks.specs.base import OperationResult, Spec
from aidocks.specs.train_emb import EmbeddingTrainSpec
from aidocks.specs.train_rerank import RerankerTrainSpec
from aidocks.specs.train_retrieval_result import RetrieverTrainResult

SpecT = TypeVar("SpecT", EmbeddingTrainSpec, RerankerTrainSpec)


class _TrainRetriever(Operation[SpecT, RetrieverTrainResult], Generic[SpecT]):
    """What both have in common. See the top of this module."""

    result_type: ClassVar[type[OperationResult]] = RetrieverTrainResult
    #: Registered name of the operation.
    operation: ClassVar[str]
    #: What the name of a result says was done to the base.
    suffix: ClassVar[str]

    def output_name(self, spec: SpecT, job_id: str) -> str | None:
        return None if spec.dry_run else self._name(spec, job_id)

    def inputs(self, spec: SpecT) -> dict[str, str]:
        return spec.inputs()

    def preflight(self, spec: SpecT, context: PlanContext) -> None:
        parse_size(spec.max_shard_size)
        if spec.publish:
            require_token()
        data_sources(spec, context)
        if not are_at_hand(spec.inputs(), context):
            return
        request = RetrievalRequest(spec, context)
        request.check_data()
        request.require_space()

    def plan(self, spec: SpecT, context: PlanContext) -> Plan[RetrieverTrainResult]:
        name = self._name(spec, context.job_id)
        result = None if spec.dry_run else find_published(name, RetrieverTrainResult, context)
        if result is None:
            converted, _ = yield from bring(spec.inputs(), context)
            request = RetrievalRequest(spec, context, converted)
            yield from require_unchanged(request.directories())
            found = yield from request.look()
            course = RetrievalCourse(RetrievalBuild(request, found))
            course.tell()
            if spec.dry_run:
                return course.planned()
            request.require_space()
            result = yield from course.run(name)
            result = publish(course.finished(result), self.operation, spec, result, context)
        return (yield from upload(result, spec))

    def _name(self, spec: SpecT, job_id: str) -> str:
        return spec.name or derive_name(spec.base_model, self.suffix, job_id)


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
