"""The whole OpenAPI document, asked with what it allows and with what it forbids: every answer is as it promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from aidocks.errors import AIDocksError

api_fuzzing = pytest.importorskip("tests.support.api_fuzzing", exc_type=ImportError)

CASES = 240


def test_every_answer_is_as_the_document_promises(home: Path) -> None:
    with api_fuzzing.furnished(home) as api:
        asked = api_fuzzing.ask(api, CASES)
        paths = api_fuzzing.whole_document(api)["paths"]
    listed = {f"{method.upper()} {path}" for path, item in paths.items() for method in item}
    assert "POST /v1/embeddings" in listed
    assert not asked.faults, "\n".join(f"{what}\n    {curl}" for what, curl in asked.faults.items())
    assert set(asked.operations) == listed
    assert asked.cases >= CASES // 3
    assert {200, 202, 404, 422} <= set(asked.statuses)


def test_a_lie_of_the_document_is_noticed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The net has no hole: an answer that the document does not know is a fault."""

    def refuses(*_: object, **__: object) -> None:
        raise _Teapot("no")

    with api_fuzzing.furnished(home) as api:
        document = api.openapi()
        document["paths"] = {"/jobs": document["paths"]["/jobs"]}
        del document["paths"]["/jobs"]["get"]["responses"]["default"]
        monkeypatch.setattr(api.state.context.store, "list", refuses)
        asked = api_fuzzing.ask(api, 4)
    assert any("418" in fault for fault in asked.faults)


class _Teapot(AIDocksError):
    http_status = 418
