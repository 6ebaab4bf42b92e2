"""What the operations that train have in common: the way from a request to a published model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar, cast

from aidocks.checkpoints.writer import parse_size
from aidocks.models.converting import are_at_hand, bring
from aidocks.models.hub import require_token
from aidocks.models.publication import Staged, find_published, publish, upload
from aidocks.models.unchanged import require_unchanged
from aidocks.plan import Operation, Plan, PlanContext, Stage
from aidocks.specs.base import ModelResult
from aidocks.specs.train_fields import TrainSpec

SpecT = TypeVar("SpecT", bound=TrainSpec)
ResultT = TypeVar("ResultT", bound=ModelResult)
FoundT = TypeVar("FoundT")
FoundT_co = TypeVar("FoundT_co", covariant=True)


class Request(Protocol[FoundT_co]):
    """A request whose references are resolved. Opening it has checked what headers and configurations can tell."""

    def check_data(self) -> None:
        """Look at the rows before any work. Raises InvalidSpec, naming line and column."""

    def require_space(self) -> None:
        """Raise InsufficientDisk when result and checkpoints would not fit."""

    def directories(self) -> Sequence[Path]:
        """Return the directories of all models that it reads."""
        ...

    def look(self) -> Generator[Stage, list[Any], FoundT_co]:
        """Yield the stages that prepare the data, look at the workers, and hash the models."""
        ...


class Course(Protocol[ResultT]):
    """The stages of a training after everything is decided."""

    def tell(self) -> None:
        """Say what was found in the data, what it will need, and what else one should know."""

    def planned(self) -> ResultT:
        """Return what is known before anything is trained."""
        ...

    def run(self, name: str) -> Plan[ResultT]:
        """Yield the stages; return the result, called ``name``, of what is then staged."""
        ...

    def finished(self, result: ResultT) -> Staged:
        """Describe what is staged once :meth:`run` has returned ``result``."""
        ...


class TrainingOperation(Operation[SpecT, ResultT], Generic[SpecT, ResultT, FoundT]):
    """Base of the operations that train."""

    #: Registered name of the operation.
    operation: ClassVar[str]

    @abstractmethod
    def name_of(self, spec: SpecT, job_id: str) -> str:
        """Return the registry name of the result."""

    @abstractmethod
    def look_up(self, spec: SpecT, context: PlanContext) -> None:
        """Raise when a data set that the request names is not there."""

    @abstractmethod
    def open(self, spec: SpecT, context: PlanContext, converted: Mapping[str, Path]) -> Request[FoundT]:
        """Return the request with its references resolved.

        Args:
            spec: The request.
            context: Of the plan. Models of the hub are at hand.
            converted: Reference -> directory of models that were stored as PyTorch files.
        """

    @abstractmethod
    def course_of(self, request: Any, found: FoundT) -> Course[ResultT]:
        """Return the stages of a request, as :meth:`open` made it, and what was found of it."""

    def output_name(self, spec: SpecT, job_id: str) -> str | None:
        return None if spec.dry_run else self.name_of(spec, job_id)

    def preflight(self, spec: SpecT, context: PlanContext) -> None:
        parse_size(spec.max_shard_size)
        if spec.publish:
            require_token()
        self.look_up(spec, context)
        if not are_at_hand(self.inputs(spec), context):
            return
        request = self.open(spec, context, {})
        request.check_data()
        request.require_space()

    def plan(self, spec: SpecT, context: PlanContext) -> Plan[ResultT]:
        name = self.name_of(spec, context.job_id)
        result: ResultT | None = None
        if not spec.dry_run:
            result = find_published(name, cast("type[ResultT]", self.result_type), context)
        if result is None:
            converted, _ = yield from bring(self.inputs(spec), context)
            request = self.open(spec, context, converted)
            yield from require_unchanged(request.directories())
            course = self.course_of(request, (yield from request.look()))
            course.tell()
            if spec.dry_run:
                return course.planned()
            request.require_space()
            result = yield from course.run(name)
            result = publish(course.finished(result), self.operation, spec, result, context)
        return (yield from upload(result, spec))
