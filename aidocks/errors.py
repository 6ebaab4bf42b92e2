"""Everything that AIDocks refuses or reports, as one closed family of exceptions.

Each class also inherits the built-in exception that it specialises, has a stable ``code`` (listed in
``docs/errors.md``), the HTTP status and the process exit code that it becomes, and says whether trying again can
help. Instances cross process boundaries (Ray workers, the job store), so they must stay picklable: to add one,
subclass :class:`AIDocksError`, set the class attributes, and pass everything through ``__init__`` unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar


class AIDocksError(Exception):
    """Root of the family.

    Args:
        message: What was wrong, in one sentence, naming what was given.
        field: Path of the offending spec field, such as ``experts[1].source_model``.
        value: The value that was given. Never a secret.
        hint: What to do instead.
    """

    code: ClassVar[str] = "internal"
    title: ClassVar[str] = "Internal error"
    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False
    #: Seconds after which a retryable one is worth another try.
    retry_after_s: ClassVar[int] = 1

    def __init__(
        self, message: str, *, field: str | None = None, value: Any = None, hint: str | None = None
    ) -> None:
        # What was given may be as long as a file; whoever reads this needs its beginning.
        message = message if len(message) <= 4000 else f"{message[:4000]} …"
        super().__init__(message)
        self.message = message
        self.field = field
        self.value = value
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        named = {"field": self.field, "value": self.value, "hint": self.hint}
        return _rebuild, (type(self), self.message, named)

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message

    def problem(self, instance: str | None = None) -> dict[str, Any]:
        """Return this error as RFC 9457 problem details (the one error shape of every door)."""
        details: dict[str, Any] = {
            "type": f"urn:aidocks:error:{self.code}",
            "title": self.title,
            "status": self.http_status,
            "code": self.code,
            "detail": self.message,
        }
        if self.hint:
            details["hint"] = self.hint
        if instance:
            details["instance"] = instance
        if self.field:
            details["errors"] = [
                {"field": self.field, "value": self.value, "message": self.message, "hint": self.hint}
            ]
        return details


def _rebuild(kind: type[AIDocksError], message: str, named: Mapping[str, Any]) -> AIDocksError:
    return kind(message, **named)


class InvalidSpec(AIDocksError, ValueError):
    """A request that can never succeed as it stands.

    Args:
        message: What was wrong, in one sentence.
        errors: Every wrong field as ``{field, value, message, hint}``, when more than one was found.
    """

    code = "invalid_spec"
    title = "The request is not valid"
    http_status = 422
    exit_code = 3

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        value: Any = None,
        hint: str | None = None,
        errors: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__(message, field=field, value=value, hint=hint)
        self.errors = tuple(dict(error) for error in errors)

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, (kind, message, named) = super().__reduce__()
        return rebuild, (kind, message, named | {"errors": self.errors})

    def problem(self, instance: str | None = None) -> dict[str, Any]:
        details = super().problem(instance)
        return details | {"errors": list(self.errors)} if self.errors else details


class BodyTooLarge(InvalidSpec):
    """A request body above the limit; specs are small, weights never travel through HTTP."""

    code = "body_too_large"
    title = "The request body is too large"
    http_status = 413


class UnsupportedMediaType(InvalidSpec):
    """A request body that is not JSON."""

    code = "unsupported_media_type"
    title = "The media type is not supported"
    http_status = 415


class MethodNotAllowed(AIDocksError):
    """A path that exists, asked with a method that it does not have."""

    code = "method_not_allowed"
    title = "The method is not allowed here"
    http_status = 405


class HostNotAllowed(AIDocksError):
    """A Host header that is not this service's (somebody may have pointed another name at it)."""

    code = "host_not_allowed"
    title = "The service does not answer to this host name"
    http_status = 421
    exit_code = 6


class RangeNotSatisfiable(AIDocksError):
    """A byte range that lies outside the file."""

    code = "range_not_satisfiable"
    title = "The range lies outside the file"
    http_status = 416


class PathNotAllowed(InvalidSpec):
    """A path outside the allowed roots, or one that tries to escape them."""

    code = "path_not_allowed"
    title = "The path is outside the allowed roots"
    http_status = 403


class UnsafeCheckpoint(InvalidSpec):
    """A checkpoint that could run code when loaded (pickle weights, remote code)."""

    code = "unsafe_checkpoint"
    title = "The checkpoint is not safe to load"


class CorruptCheckpoint(InvalidSpec):
    """A checkpoint whose files contradict each other or the safetensors format."""

    code = "corrupt_checkpoint"
    title = "The checkpoint is damaged"


class IncompatibleModels(InvalidSpec):
    """Models that cannot be combined: another architecture, shape or vocabulary."""

    code = "incompatible_models"
    title = "The models do not fit together"


class ValueTooLarge(IncompatibleModels):
    """A value that was computed has none in the type that it is to be stored in."""

    code = "value_too_large"
    title = "A value is too large for its type"


class NotFound(AIDocksError, LookupError):
    """Something that was asked for by name does not exist."""

    code = "not_found"
    title = "Not found"
    http_status = 404
    exit_code = 4


class UnknownModel(NotFound):
    """A model reference that resolves to nothing."""

    code = "unknown_model"
    title = "There is no such model"


class UnknownJob(NotFound):
    """A job id that the store does not hold."""

    code = "unknown_job"
    title = "There is no such job"


class Conflict(AIDocksError):
    """The request contradicts what already exists."""

    code = "conflict"
    title = "Conflict"
    http_status = 409
    exit_code = 5


class NameTaken(Conflict):
    """The registry, or a job under way, already holds this model name."""

    code = "name_taken"
    title = "The name is taken"


class IdempotencyMismatch(Conflict):
    """An idempotency key that was used before with another body."""

    code = "idempotency_mismatch"
    title = "The idempotency key belongs to another request"


class IllegalTransition(Conflict):
    """A job cannot go from its present status to the one asked for."""

    code = "illegal_transition"
    title = "The job's status does not allow this"


class ModelInUse(Conflict):
    """A model that a job under way still reads cannot be deleted."""

    code = "model_in_use"
    title = "The model is in use"


class LeaseLost(Conflict):
    """The writer no longer owns the job: a newer supervisor has taken over."""

    code = "lease_lost"
    title = "Another supervisor owns the job"


class InsufficientDisk(AIDocksError, OSError):
    """The file system does not hold what the operation would write."""

    code = "insufficient_disk"
    title = "Not enough disk space"
    http_status = 507
    exit_code = 8
    retryable = True


class ServiceUnreachable(AIDocksError, ConnectionError):
    """No AIDocks service answers at the address."""

    code = "service_unreachable"
    title = "The service does not answer"
    http_status = 503
    exit_code = 6
    retryable = True


class TooBusy(AIDocksError, RuntimeError):
    """More waits to be computed than the service takes; a later request finds room."""

    code = "too_busy"
    title = "The service has too much to do"
    http_status = 429
    exit_code = 6
    retryable = True


class RateLimited(TooBusy):
    """A key that asked more often than it may."""

    code = "rate_limited"
    title = "Too many requests"


class QuotaExceeded(TooBusy):
    """A key that already has as many unfinished jobs as it may have."""

    code = "quota_exceeded"
    title = "The key has too many unfinished jobs"
    retry_after_s = 30


class QueueFull(TooBusy):
    """As many jobs wait as this installation lets wait, whoever submitted them."""

    code = "queue_full"
    title = "The queue is full"
    http_status = 503
    retry_after_s = 30


class Unauthenticated(AIDocksError, PermissionError):
    """A request without an API key, or with one that is unknown, expired or revoked."""

    code = "unauthenticated"
    title = "An API key is needed"
    http_status = 401
    exit_code = 11


class NotPermitted(AIDocksError, PermissionError):
    """An API key whose scopes do not cover the request."""

    code = "not_permitted"
    title = "The API key does not allow this"
    http_status = 403
    exit_code = 11


class PortTaken(AIDocksError, OSError):
    """Another program listens on the port that the service would use."""

    code = "port_taken"
    title = "The port is taken"
    http_status = 503
    exit_code = 6


class StartupFailed(AIDocksError, RuntimeError):
    """The embedded service did not become healthy in time."""

    code = "startup_failed"
    title = "The service did not start"
    http_status = 503
    exit_code = 6


class WorkerLost(AIDocksError, RuntimeError):
    """A worker died while it ran a unit; the unit can run again elsewhere."""

    code = "worker_lost"
    title = "A worker died"
    retryable = True


class TimedOut(AIDocksError, TimeoutError):
    """A job that ran for longer than its submitter allowed."""

    code = "timed_out"
    title = "The job took too long"
    exit_code = 7


class JobFailed(AIDocksError, RuntimeError):
    """A job that was waited for ended in ``failed``."""

    code = "job_failed"
    title = "The job failed"
    exit_code = 7


class JobCancelled(AIDocksError, RuntimeError):
    """A job that was waited for ended in ``cancelled``."""

    code = "job_cancelled"
    title = "The job was cancelled"
    http_status = 409
    exit_code = 9


class MissingExtra(AIDocksError, ImportError):
    """A feature needs an optional part of AIDocks that is not installed."""

    code = "missing_extra"
    title = "An optional part is not installed"
    http_status = 501
    exit_code = 10


class HubRefused(AIDocksError, RuntimeError):
    """The model hub refused (token, gated licence, name); it will until somebody changes that."""

    code = "hub_refused"
    title = "The model hub refused"
    http_status = 502
    exit_code = 6


class HubUnavailable(HubRefused):
    """The model hub cannot be reached, has too much to do, or failed; that passes."""

    code = "hub_unavailable"
    title = "The model hub does not answer"
    retryable = True
    retry_after_s = 30
