"""`aidocks status` and `aidocks logs`, against services and files of every kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

HEALTH = {"status": "ok", "version": "0.1.0", "supervisor": "running"}
OVERVIEW = {
    **HEALTH,
    "up_since": "2026-01-01T00:00:00Z",
    "jobs": {
        "running": 2,
        "queued": 3,
        "oldest_queued_s": 75.0,
        "succeeded_today": 4,
        "failed_today": 1,
        "cancelled_today": 0,
    },
    "workers": {"busy": 1, "idle": 1, "most": 2},
    "nodes": [
        {"name": "one", "cpus": 4.0, "gpus": 0.0, "memory_bytes": 24_000_000_000},
        {"name": "two", "cpus": 8.0, "gpus": 2.0, "memory_bytes": 64_000_000_000},
    ],
    "disk": {"free_bytes": 64_000_000_000, "total_bytes": 100_000_000_000},
    "from_a_newer_service": True,
}


@pytest.fixture
def serving(scripted: Any, answer: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Answer `GET /health`, and `GET /status` as it is told."""
    monkeypatch.setenv("AIDOCKS_URL", scripted.url)

    def script(status: Any) -> None:
        scripted.script = lambda request: answer(HEALTH) if request.path == "/health" else status

    return script


def test_status_shows_what_people_ask_for(aidocks: Any, serving: Any, answer: Any) -> None:
    serving(answer(OVERVIEW))
    done = aidocks("status")
    assert done.code == 0
    facts = {line.split("  ")[0].strip(): line for line in done.out.splitlines() if line.strip()}
    assert "ok, supervisor running" in facts["health"]
    assert "2 running, 3 queued (the oldest for 1m15s); in 24 hours 4 succeeded, 1 failed" in facts["jobs"]
    assert "busy 1, idle 1, most 2" in facts["workers"]
    assert "64 GB free of 100 GB" in facts["disk"]
    assert [line.split()[0] for line in done.out.splitlines()[-2:]] == ["one", "two"]
    whole = json.loads(aidocks("status", "--json").out)
    assert whole["overview"]["jobs"] == OVERVIEW["jobs"]
    assert whole["healthy"] is True


def test_parts_that_do_not_answer_are_said_to_be_unknown(aidocks: Any, serving: Any, answer: Any) -> None:
    serving(answer(OVERVIEW | {"jobs": None, "workers": None, "nodes": None, "disk": None}))
    done = aidocks("status")
    assert done.code == 0
    assert "the supervisor does not answer" in done.out
    assert "the job store does not answer" in done.out


@pytest.mark.parametrize(
    ("status", "code", "told"), [(404, "not_found", "supervisor"), (401, "unauthenticated", "Send a key")]
)
def test_status_of_an_older_service_and_without_a_key(
    aidocks: Any, serving: Any, answer: Any, status: int, code: str, told: str
) -> None:
    serving(answer({"code": code, "detail": "Send a key.", "status": status}, status))
    done = aidocks("status")
    assert done.code == 0
    assert told in done.out


def _log(home: Path, name: str, *records: Any) -> None:
    path = home / "logs" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines))


def test_logs_are_printed_for_people_or_as_they_are(aidocks: Any, home: Path) -> None:
    line = {
        "time": "2026-01-01T12:00:00.000+00:00",
        "level": "error",
        "logger": "aidocks.x",
        "message": "it broke",
    }
    _log(
        home,
        "supervisor.log",
        "plain words",
        line | {"job": "job-1", "unit": "layer 3", "traceback": "Trace\n  back"},
    )
    done = aidocks("logs", "supervisor.log")
    plain, first, *trace = done.out.splitlines()
    assert plain == "plain words"
    assert first.endswith("ERROR   aidocks.x [job-1]: it broke  unit=layer 3")
    assert trace == ["Trace", "  back"]
    raw = aidocks("logs", "supervisor.log", "--json", "-n", "1").out
    assert json.loads(raw)["message"] == "it broke"
    assert aidocks("logs", "supervisor.log", "-n", "0").out == ""
    assert aidocks("logs").code == 4


def test_all_that_is_said_of_one_job_in_order_of_time(aidocks: Any, home: Path) -> None:
    def line(second: int, message: str, job: str) -> dict[str, str]:
        return {"time": f"2026-01-01T12:00:{second:02}.000+00:00", "message": message, "job": job}

    _log(home, "supervisor.log", line(1, "first", "job-1"), line(4, "last", "job-1"), line(2, "no", "job-2"))
    _log(home, "worker-1.log", line(3, "third", "job-1"), "a line of job-1 that is cut o")
    _log(home, "http.log", {"time": "2026-01-01T12:00:02.000+00:00", "message": "second: GET /jobs/job-1"})
    done = aidocks("logs", "--job", "job-1")
    order = [
        word
        for line in done.out.splitlines()
        for word in ("first", "second", "third", "last")
        if word in line
    ]
    assert order == ["first", "second", "third", "last"]
    assert len(done.out.splitlines()) == 4
    one = aidocks("logs", "worker-1.log", "--job", "job-1", "--json").out
    assert json.loads(one)["message"] == "third"
    assert aidocks("logs", "--job", "job-9").code == 4


@pytest.mark.parametrize(
    "line", ["", "[1, 2]", "{", '{"time": 5}', '{"message": "x", "time": "soon"}', "null", "\x00"]
)
def test_no_line_of_a_log_is_too_odd(aidocks: Any, home: Path, line: str) -> None:
    _log(home, "http.log", line)
    assert aidocks("logs", "http.log").code == 0
