"""From problem details (RFC 9457) back to the exception that they describe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from aidocks.errors import AIDocksError, InvalidSpec, ServiceUnreachable

if TYPE_CHECKING:
    import httpx


def error_from_problem(problem: Mapping[str, Any]) -> AIDocksError:
    """Return the exception whose ``code`` the problem carries, with its field, value and hint."""
    kind = _classes().get(str(problem.get("code")), AIDocksError)
    message = str(problem.get("detail") or problem.get("title") or "The service reports an error.")
    hint = problem.get("hint")
    errors = [error for error in problem.get("errors") or () if isinstance(error, Mapping)]
    first = errors[0] if errors else {}
    known: dict[str, Any] = {"field": first.get("field"), "value": first.get("value"), "hint": hint}
    if issubclass(kind, InvalidSpec) and len(errors) > 1:
        return kind(message, errors=errors, **known)
    return kind(message, **known)


def error_from_response(response: httpx.Response) -> AIDocksError:
    """Return the exception that an unsuccessful response stands for. Its body must have been read."""
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if isinstance(problem, dict) and "code" in problem:
        return error_from_problem(problem)
    # Not our error shape: a proxy, a service that is still starting, or something that is not AIDocks.
    url = response.request.url
    if response.status_code >= 500:
        return ServiceUnreachable(
            f"The service at {url.scheme}://{url.netloc.decode()} answers {response.status_code}.",
            hint="It may be starting: see `aidocks status`.",
        )
    return AIDocksError(
        f"{response.request.method} {url} answers {response.status_code} without saying why.",
        hint="Is that an AIDocks service of this version?",
    )


@cache
def _classes() -> dict[str, type[AIDocksError]]:
    return {kind.code: kind for kind in _family(AIDocksError)}


def _family(kind: type[AIDocksError]) -> Iterator[type[AIDocksError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _family(child)
