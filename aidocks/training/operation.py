"""``/train/llm``: a language model fine-tuned on a data set.

prepare the rows, look at the workers -> measure the base -> train -> merge, and prove it -> measure again -> publish.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from aidocks.models.names import derive_name
from aidocks.plan import PlanContext
from aidocks.specs.base import OperationResult, Spec
from aidocks.specs.train_llm import LLMTrainSpec
from aidocks.specs.train_llm_result import LLMTrainResult
from aidocks.training.build import TrainingBuild
from aidocks.training.course import Course
from aidocks.training.plan import TrainingOperation
from aidocks.training.references import data_sources
from aidocks.training.request import Found, Request


class TrainLLM(TrainingOperation[LLMTrainSpec, LLMTrainResult, Found]):
    """See the top of this module."""

    spec_type: ClassVar[type[Spec]] = LLMTrainSpec
    result_type: ClassVar[type[OperationResult]] = LLMTrainResult
    operation: ClassVar[str] = "train-llm"

    def inputs(self, spec: LLMTrainSpec) -> dict[str, str]:
        return spec.inputs()

    def name_of(self, spec: LLMTrainSpec, job_id: str) -> str:
        return spec.name or derive_name(spec.base_model, spec.method, job_id)

    def look_up(self, spec: LLMTrainSpec, context: PlanContext) -> None:
        data_sources(spec, context)

    def open(self, spec: LLMTrainSpec, context: PlanContext, converted: Mapping[str, Path]) -> Request:
        return Request(spec, context, converted)

    def course_of(self, request: Request, found: Found) -> Course:
        return Course(TrainingBuild(request, found))
