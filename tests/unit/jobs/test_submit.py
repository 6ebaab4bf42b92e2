"""The one way from a spec to a job."""

from __future__ import annotations

from pathlib import Path

import pytest

from aidocks.errors import IdempotencyMismatch, InvalidSpec, NameTaken, NotFound
from aidocks.jobs.store import JobStore
from aidocks.jobs.submit import submit_job
from aidocks.settings import Settings
from tests.support.trivial_operation import TrivialSpec


def test_a_mapping_and_a_spec_are_the_same(
    settings: Settings, local_store: JobStore, trivial: str, traces: Path
) -> None:
    spec = TrivialSpec(traces=traces, output="x")
    job, created = submit_job(settings, local_store, trivial, spec, idempotency_key="k")
    assert created
    assert (job.output_name, job.place, job.spec["units"]) == ("x", "service", 4)
    body = {"traces": str(traces), "output": "x"}
    # The name is held by the job itself, which must not keep a repeated request from finding it.
    assert submit_job(settings, local_store, trivial, body, idempotency_key="k") == (job, False)
    with pytest.raises(IdempotencyMismatch):
        submit_job(settings, local_store, trivial, body | {"units": 5}, idempotency_key="k")


def test_refusals_leave_no_job(settings: Settings, local_store: JobStore, trivial: str, traces: Path) -> None:
    with pytest.raises(InvalidSpec, match="units"):
        submit_job(settings, local_store, trivial, {"traces": str(traces), "units": "many"})
    with pytest.raises(InvalidSpec, match="refused"):
        submit_job(settings, local_store, trivial, {"traces": str(traces), "refused": True})
    with pytest.raises(NotFound, match="nothing"):
        submit_job(settings, local_store, "nothing", {})
    assert local_store.list() == []


def test_a_name_of_the_registry_is_taken(
    settings: Settings, local_store: JobStore, trivial: str, traces: Path, stories260k: Path
) -> None:
    from aidocks.models.registry import Registry

    Registry(settings.models_dir).import_checkpoint("x", stories260k)
    with pytest.raises(NameTaken, match="registry") as caught:
        submit_job(settings, local_store, trivial, {"traces": str(traces), "output": "x"})
    assert (caught.value.field, caught.value.value) == ("output", "x")
    assert local_store.list() == []
