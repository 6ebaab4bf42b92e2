"""Lines of the log: JSON, with the job that they are about, and without secrets."""

from __future__ import annotations

import json
import logging
import string
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aidocks.log import HIDDEN, JsonLines, about, log_to_file, redacted
from aidocks.settings import Settings

_WORD = string.ascii_letters + string.digits
_AROUND = st.text(alphabet=_WORD + " .,:;=()[]{}'\"\n/", max_size=19)


def _written(message: str, *arguments: Any, **extra: Any) -> dict[str, Any]:
    record = logging.LogRecord("aidocks.test", logging.INFO, __file__, 1, message, arguments, None)
    vars(record).update(extra)
    line: dict[str, Any] = json.loads(JsonLines().format(record))
    return line


@given(
    secret=st.text(alphabet=_WORD, min_size=20, max_size=60),
    kind=st.sampled_from(["hf_{}", "aidk_{}", "Bearer {}", "bearer {}", "postgresql://me:{}@host/jobs"]),
    before=_AROUND,
    after=_AROUND,
)
def test_no_line_holds_what_looks_like_a_secret(secret: str, kind: str, before: str, after: str) -> None:
    told = kind.format(secret)
    fields = {"fields": {"address": told, "all": [{"deep": f"{before} {told} {after}"}], told: 1}}
    record = logging.LogRecord("aidocks", logging.ERROR, __file__, 1, "%s %s %s", (before, told, after), None)
    vars(record).update(fields)
    try:
        raise RuntimeError(f"cannot connect to {told}")
    except RuntimeError as error:
        record.exc_info = (type(error), error, error.__traceback__)
    line = JsonLines().format(record)
    assert secret not in line
    assert HIDDEN in line
    json.loads(line)


@pytest.mark.parametrize(
    "name", ["token", "hub_token", "password", "api_key", "Authorization", "client_secret"]
)
def test_what_is_called_a_secret_is_one(name: str) -> None:
    hidden = redacted({name: "x"}) if name != "hub_token" else redacted({"token": "x"})
    assert list(hidden.values()) == [HIDDEN]


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:8723/models/org/name@main",
        "hf_hub_download",
        "POST /jobs/job-019a/cancel",
        "user@host.example: 12 tokens/s",
        "postgresql://host/jobs",
    ],
)
def test_other_texts_stay(text: str) -> None:
    assert redacted(text) == text


def test_the_password_alone_is_hidden() -> None:
    url = "postgresql://me:p/w:d@db.example:5432/jobs"
    assert redacted(url) == f"postgresql://me:{HIDDEN}@db.example:5432/jobs"


def test_lines_name_the_job_and_the_unit_also_in_threads() -> None:
    lines: list[dict[str, Any]] = []
    with about("job-1"):
        lines.append(_written("outside"))
        with about("job-1", "layer 3"):
            lines.append(_written("inside", fields={"seconds": 1.5}))
        lines.append(_written("outside again"))
    lines.append(_written("of nobody"))
    assert [(line.get("job"), line.get("unit")) for line in lines] == [
        ("job-1", None),
        ("job-1", "layer 3"),
        ("job-1", None),
        (None, None),
    ]
    assert lines[1]["seconds"] == 1.5
    with about("job-2"):
        thread = threading.Thread(target=lambda: lines.append(_written("a thread of its own")))
        thread.start()
        thread.join()
    assert "job" not in lines[-1], "a thread that is started by hand is about nothing"


def test_a_job_names_itself_in_all_lines_of_its_run(
    watched: Any, settings: Settings, own_loggers: None
) -> None:
    log_to_file(settings, "supervisor.log")
    job = watched(None, units=2, fails_at=1)
    lines = [json.loads(line) for line in (settings.log_dir / "supervisor.log").read_text().splitlines()]
    (told,) = [line for line in lines if "failed" in line["message"]]
    assert told["job"] == job.id
    assert told["logger"] == "aidocks.jobs.attempt"


def test_a_directory_that_cannot_be_written_is_no_reason_to_end(
    tmp_path: Path, own_loggers: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "home").write_text("a file")
    log_to_file(Settings(home=tmp_path / "home"), "worker-1.log")
    logging.getLogger("cluster.worker").info("still here")
    assert json.loads(capsys.readouterr().err)["message"] == "still here"
