"""The command line against a scripted service: what is sent, what is printed where, and exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from aidocks.cli.app import EPILOG
from aidocks.errors import AIDocksError, InvalidSpec, NameTaken, UnknownModel
from aidocks.jobs.model import Status
from aidocks.jobs.store import JobStore
from aidocks.jobs.submit import submit_job
from aidocks.settings import Settings
from tests.support.training_jobs import Executor

MEASURED = {
    "before": 30.123456, "before_standard_error": 0.5, "after": 29.5, "after_standard_error": 0.25,
    "delta": -0.01, "delta_standard_error": 0.002, "z": -5.0, "tokens": 4096, "items": 32,
    "metric": "perplexity", "data": "prose",
}  # fmt: skip
RESULT = {
    "model": "b", "path": "/models/b", "seconds": 75.0,
    "search": MEASURED | {"part": "search"}, "held_out": MEASURED | {"part": "held_out"},
    "candidates_tried": 15, "matrices_scanned": 20, "parameters": 134515008, "parameters_before": 134515008,
    "pictures": ["report/a.png"],
    "accepted": [{
        "name": "model.layers.3.mlp.up_proj.weight", "layer": 3, "kind": "up", "rank": 9, "full_rank": 96,
        "truncation": "activation_aware", "rule": "laserrmt", "delta": -0.01, "standard_error": 0.002, "z": -5.0,
    }],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _service(scripted: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIDOCKS_URL", scripted.url)


@pytest.fixture
def finished(scripted: Any, job: Any, answer: Any, event_frame: Any) -> Any:
    """A service whose every job has succeeded."""
    frames = [
        event_frame(1, "queued"),
        event_frame(2, "started", attempt=1, parallelism=1),
        event_frame(3, "message", text="a [bold] message"),
        event_frame(4, "stage_started", stage="scan", stage_number=1, total=2, already_done=1),
        event_frame(5, "progress", stage="scan", stage_number=1, done=1, total=2, fraction=0.5,
                    unit="up_proj", units_per_s=2.0, eta_s=0.5, elapsed_s=0.5),
        event_frame(6, "succeeded", **RESULT),
    ]  # fmt: skip

    def script(request: Any) -> Any:
        if request.method == "POST":
            return answer(job("queued"), 202)
        if "events" in request.path:
            return answer(stream=frames)
        return answer(job("succeeded", result=RESULT))

    scripted.script = script
    return scripted


def test_a_job_is_submitted_watched_and_shown(aidocks: Any, finished: Any) -> None:
    done = aidocks(
        "laser", "--base-model-name", "a", "--laser-model-name", "b", "--layers", "1-3,7", "--kinds", "k,v"
    )
    assert done.code == 0
    assert finished.requests[0].body == {
        "base_model_name": "a", "laser_model_name": "b", "layers": [1, 2, 3, 7], "kinds": ["k", "v"],
    }  # fmt: skip
    lines = done.err.splitlines()
    assert "a [bold] message" in lines
    assert "scan: 2 units, 1 done before" in lines
    assert "scan 1/2 (50.0%) | up_proj | 2/s | eta 0.50 s" in lines
    for text in (
        "/models/b",
        "30.12 ± 0.50",
        "29.50 ± 0.25",
        "134,515,008",
        "1m15s",
        "model.layers.3.mlp.up_proj",
    ):
        assert text in done.out


def test_json_is_one_document_and_nothing_else(aidocks: Any, finished: Any) -> None:
    done = aidocks("laser", "--base-model-name", "a", "--laser-model-name", "b", "--json")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)["result"]["model"] == "b"


def test_detach_prints_the_id_alone(aidocks: Any, finished: Any) -> None:
    done = aidocks(
        "laser", "--base-model-name", "a", "--laser-model-name", "b", "--detach", "--idempotency-key", "k"
    )
    assert (done.code, done.out, done.err) == (0, "job-1\n", "")
    assert len(finished.requests) == 1
    assert finished.requests[0].headers["Idempotency-Key"] == "k"


def test_terms_of_a_submission(aidocks: Any, finished: Any) -> None:
    names = ("laser", "--base-model-name", "a", "--laser-model-name", "b")
    assert aidocks(*names, "--detach", "--priority", "-3", "--timeout", "1h30m").code == 0
    assert finished.requests[-1].path == "/laser?priority=-3&timeout_s=5400.0"
    assert aidocks("jobs", "resume", "job-1", "--detach", "--priority", "2", "--timeout", "90").code == 0
    assert finished.requests[-1].path == "/jobs/job-1/resume?priority=2&timeout_s=90.0"
    sent = len(finished.requests)
    for given in ("soon", "0s", "-1", "30m2h", "400d", "h", "1.5.2h", ""):
        refused = aidocks(*names, "--timeout", given)
        assert (refused.code, "length of time" in refused.err) == (2, True), given
    refused = aidocks(*names, "--local", "--priority", "0")
    assert (refused.code, "need a service" in refused.err) == (2, True)
    assert len(finished.requests) == sent


@pytest.mark.parametrize("form", ["yaml", "json", "stdin"])
def test_flags_win_over_the_spec_file(aidocks: Any, finished: Any, tmp_path: Path, form: str) -> None:
    spec = {"base_model_name": "a", "laser_model_name": "b", "chunks": 8}
    file = tmp_path / f"spec.{form}"
    file.write_text(json.dumps(spec) if form == "json" else "".join(f"{k}: {v}\n" for k, v in spec.items()))
    name = "-" if form == "stdin" else str(file)
    done = aidocks("laser", name, "--chunks", "16", "--detach", stdin=file.read_text())
    assert done.code == 0
    assert finished.requests[0].body == spec | {"chunks": 16}


def test_nested_fields_are_json(aidocks: Any, finished: Any) -> None:
    experts = [{"source_model": name, "positive_prompts": [f"{name}, y"]} for name in ("a", "b")]
    done = aidocks(
        "byo-moe", "--base-model", "a", "--experts", json.dumps(experts), "--no-evaluate", "--detach"
    )
    assert done.code == 0
    assert finished.requests[0].body == {"base_model": "a", "experts": experts, "evaluate": False}


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("laser",), 3, "base_model_name"),
        (("laser", "--chunks", "0", "--base-model-name", "a", "--laser-model-name", "b"), 3, "chunks"),
        (("laser", "--chunks", "many"), 2, "--chunks"),
        (
            ("laser", "--base-model-name", "a", "--laser-model-name", "b", "--rule", "other"),
            3,
            "marchenko_pastur",
        ),
        (("laser", "--selection", "other"), 2, "gradient"),
        (("laser", "missing.yaml"), 4, "missing.yaml"),
        (("lasre",), 2, "laser"),
        (("laser", "--local", "--detach"), 2, "--local"),
        (("byo-moe", "--base-model", "a", "--experts", "[{"), 3, "experts"),
    ],
)
def test_wrong_requests_never_reach_the_service(
    aidocks: Any, scripted: Any, arguments: tuple[str, ...], code: int, says: str
) -> None:
    done = aidocks(*arguments)
    assert done.code == code
    assert says in done.err
    assert done.out == ""
    assert scripted.requests == []


def test_an_error_says_what_where_and_what_to_do(aidocks: Any, scripted: Any, answer: Any) -> None:
    error = UnknownModel(
        "There is no model 'smol'.", field="base_model_name", value="smol", hint="Did you mean 'smollm2'?"
    )
    scripted.script = lambda _: answer(error.problem(), error.http_status)
    request = ("laser", "--base-model-name", "smol", "--laser-model-name", "b")
    done = aidocks(*request)
    assert done.code == error.exit_code == 4
    assert done.err.splitlines() == [
        "error: There is no model 'smol'. (base_model_name = \"smol\")",
        "  Did you mean 'smollm2'?",
    ]
    problem = json.loads(aidocks(*request, "--json").err)
    assert problem == error.problem()


def test_all_wrong_fields_are_listed(aidocks: Any, scripted: Any, answer: Any) -> None:
    error = InvalidSpec("2 fields are wrong.", errors=[
        {"field": "a", "value": 1, "message": "Too small.", "hint": "At least 2."},
        {"field": "b[0].c", "value": None, "message": "Is missing.", "hint": None},
    ])  # fmt: skip
    scripted.script = lambda _: answer(error.problem(), error.http_status)
    done = aidocks("laser", "--base-model-name", "a", "--laser-model-name", "b")
    assert done.code == 3
    assert done.err.splitlines() == [
        "error: 2 fields are wrong.",
        "  a: Too small. (a = 1) At least 2.",
        "  b[0].c: Is missing.",
    ]


@pytest.mark.parametrize("local", [False, True])
def test_one_wrong_field_is_told_once(aidocks: Any, scripted: Any, answer: Any, local: bool) -> None:
    error = InvalidSpec(
        "rewards: `grpo` needs them.", field="rewards", hint="Give one.", errors=[
            {"field": "rewards", "value": None, "message": "`grpo` needs them.", "hint": "Give one."}
        ],
    )  # fmt: skip
    scripted.script = lambda _: answer(error.problem(), error.http_status)
    if local:
        done = aidocks("train-llm", "--base-model", "a", "--dataset", "b", "--method", "grpo", "--local")
        assert done.err.count("rewards: ") == 1
    else:
        done = aidocks("laser", "--base-model-name", "a", "--laser-model-name", "b")
        assert done.err.splitlines() == ["error: rewards: `grpo` needs them.", "  Give one."]
    assert done.code == 3


def test_several_wrong_fields_are_told_once(aidocks: Any, scripted: Any) -> None:
    done = aidocks(
        "laser", "--base-model-name", "a", "--laser-model-name", "b", "--chunks", "0", "--seqlen", "0"
    )
    assert done.err.splitlines()[0] == "error: 2 fields are not valid."
    assert (done.err.count("chunks: "), done.err.count("seqlen: ")) == (1, 1)


def test_what_is_not_known_is_not_called_null(aidocks: Any, scripted: Any, answer: Any) -> None:
    error = InvalidSpec("The file cannot be used.", field="file")
    scripted.script = lambda _: answer(error.problem(), error.http_status)
    assert aidocks("jobs", "list").err.splitlines() == ["error: The file cannot be used. (file)"]


def test_no_service(aidocks: Any, scripted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted.close()
    done = aidocks("jobs", "list")
    assert done.code == 6
    assert scripted.url in done.err
    assert "aidocks up" in done.err


@pytest.mark.parametrize(("status", "code"), [("failed", 7), ("cancelled", 9)])
def test_the_end_of_a_job_decides_the_exit_code(
    aidocks: Any, scripted: Any, job: Any, answer: Any, event_frame: Any, status: str, code: int
) -> None:
    problem = (
        NameTaken("The name is taken.", field="name", value="b").problem() if status == "failed" else None
    )
    scripted.script = lambda request: (
        answer(stream=[event_frame(1, status)])
        if "events" in request.path
        else answer(job(status, error=problem))
    )
    done = aidocks("jobs", "watch", "job-1")
    assert done.code == code
    assert "job-1" in done.err
    assert status != "failed" or "The name is taken." in done.err
    cause = json.loads(aidocks("jobs", "watch", "job-1", "--json").err).get("cause")
    assert cause == problem


def test_ctrl_c_leaves_the_job_alone_and_says_so(
    aidocks: Any, scripted: Any, job: Any, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Iterator[Any]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr("aidocks.client.job.JobHandle.events", interrupted)
    scripted.script = lambda _: answer(job("queued"), 202)
    done = aidocks("laser", "--base-model-name", "a", "--laser-model-name", "b")
    assert done.code == 130
    assert "goes on" in done.err
    assert "aidocks jobs watch job-1" in done.err
    assert "aidocks jobs cancel job-1" in done.err
    assert len(scripted.requests) == 1


def test_jobs_are_listed_and_shown(aidocks: Any, scripted: Any, job: Any, answer: Any) -> None:
    progress = {"stage": "scan", "stage_number": 1, "done": 1, "total": 4, "fraction": 0.25}
    running = job("running", output_name="b", started_at="2026-01-01T00:00:01Z", progress=progress)
    scripted.script = lambda request: answer(
        {"jobs": [running], "has_more": False} if request.path.startswith("/jobs?") else running
    )
    listed = aidocks("jobs", "list", "--status", "running", "--limit", "5")
    assert scripted.requests[0].path == "/jobs?status=running&limit=5"
    assert all(text in listed.out for text in ("job-1", "running", "scan 25%", "b"))
    assert json.loads(aidocks("jobs", "list", "--json").out)[0]["id"] == "job-1"
    assert "scan" in aidocks("jobs", "show", "job-1").out


def test_events_are_printed_one_a_line(aidocks: Any, finished: Any, answer: Any) -> None:
    page = {
        "job_id": "job-1",
        "sequence": 1,
        "time": "2026-01-01T00:00:00Z",
        "type": "message",
        "data": {"text": "hi"},
    }
    following = finished.script
    finished.script = lambda request: (
        answer({"events": [page] if "after=0" in request.path else [], "has_more": False})
        if "after=" in request.path
        else following(request)
    )
    assert aidocks("jobs", "events", "job-1").out.rstrip().endswith("message          hi")
    lines = aidocks("jobs", "events", "job-1", "--follow", "--json").out.splitlines()
    assert [json.loads(line)["sequence"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_the_registry_can_be_used_without_a_service(
    aidocks: Any, scripted: Any, tiny_llama: Any, tmp_path: Path, home: Path
) -> None:
    source = tiny_llama(tmp_path / "source")
    assert aidocks("models", "import", str(source), "tiny").code == 0
    assert "tiny" in aidocks("models", "list", "--local").out
    assert json.loads(aidocks("models", "show", "tiny", "--local", "--json").out)["name"] == "tiny"
    assert "model.safetensors" in aidocks("models", "files", "tiny", "--local").out
    path = Path(aidocks("models", "path", "tiny").out.strip())
    assert path.is_relative_to(home)
    assert (path / "config.json").is_file()
    assert aidocks("models", "import", str(source), "tiny").code == 5
    assert aidocks("models", "import", str(tmp_path / "nothing"), "other").code == 4
    answered = aidocks("ask", "tiny", "Hello", "--max-new-tokens", "3", "--json")
    assert json.loads(answered.out)["tokens"] <= 3
    assert aidocks("models", "delete", "tiny", "--local").code == 0
    assert aidocks("models", "path", "tiny").code == 4
    assert scripted.requests == []


def test_an_adapter_is_not_asked(aidocks: Any, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").touch()
    about = {"base_model_name_or_path": "tiny", "peft_type": "LORA"}
    (adapter / "adapter_config.json").write_text(json.dumps(about))
    refused = aidocks("ask", str(adapter), "Hello")
    assert refused.code == 4
    assert f"{adapter} is an adapter of tiny" in refused.err
    assert (
        f"""aidocks merge --merge-method passthrough --models '[{{"model": "tiny+{adapter}"}}]'"""
        in refused.err
    )
    assert "`merge_adapter`" in refused.err
    (adapter / "adapter_config.json").write_text(json.dumps(about | {"peft_type": "PREFIX_TUNING"}))
    refused = aidocks("ask", str(adapter), "Hello")
    assert "PEFT" in refused.err
    assert "aidocks merge" not in refused.err


def test_a_data_set_is_named_by_the_second_word(aidocks: Any, tmp_path: Path, home: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n')
    for arguments, name in (((), "rows"), (("mine",), "mine"), (("--name", "other"), "other")):
        done = aidocks("datasets", "upload", str(file), *arguments, "--local")
        assert (done.code, done.out.split()[0]) == (0, name)
    assert aidocks("datasets", "upload", str(file), "a", "--name", "b", "--local").code == 2
    file.write_text("")
    empty = aidocks("datasets", "upload", str(file), "empty", "--local")
    assert empty.err.splitlines()[0] == 'error: The file is empty. (file = "rows.jsonl")'


def test_jobs_can_be_looked_at_and_resumed_without_a_service(
    aidocks: Any, scripted: Any, tiny_llama: Any, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert aidocks("jobs", "list", "--local").err == "There are no such jobs.\n"
    settings = Settings()
    aidocks("models", "import", str(tiny_llama(tmp_path / "source")), "tiny")
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(20)]
    with closing(JobStore(settings.store_url)) as store:
        spec = {"base_model": "tiny", "dataset": rows}
        job, _ = submit_job(settings, store, "train-llm", spec, place="local")
        executor = Executor(store, settings)
        executor.start(job.id)
        executor.checkpoint(job.id, 5)
        listed = json.loads(aidocks("jobs", "list", "--local", "--status", "running", "--json").out)
        assert [one["id"] for one in listed] == [job.id]
        assert aidocks("jobs", "resume", job.id, "--local").code == 5
        executor.end(job.id, Status.CANCELLED)
    assert "cancelled" in aidocks("jobs", "show", job.id, "--local").out
    assert aidocks("jobs", "show", "job-1", "--local").code == 4
    assert aidocks("jobs", "list", "--local", "--status", "lost").code == 2
    assert aidocks("jobs", "resume", job.id, "--local", "--detach").code == 2
    begun: list[Any] = []
    monkeypatch.setattr("aidocks.cli.run.run_here", lambda *given: begun.append(given))
    assert aidocks("jobs", "resume", job.id, "--local").code == 0
    ((operation, asked, timeout_s),) = begun
    assert timeout_s is None
    assert (operation, asked.resume_from_checkpoint, asked.name) == ("train-llm", job.id, job.output_name)
    assert scripted.requests == []


def test_status_of_a_service_that_is_not_there(aidocks: Any, scripted: Any) -> None:
    scripted.close()
    done = aidocks("status", "--json")
    assert done.code == 6
    assert json.loads(done.out)["healthy"] is False
    assert aidocks("env").code == 6
    assert aidocks("logs").code == 4
    assert aidocks("down").code == 0


def test_doctor_looks_at_the_installation(aidocks: Any, scripted: Any, answer: Any) -> None:
    scripted.script = lambda _: answer({"status": "ok"})
    done = aidocks("doctor")
    assert done.code == 0
    assert f"answers at {scripted.url}" in done.out


def test_an_unexpected_error_is_one_line_unless_asked(aidocks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("aidocks.client.http.Client.jobs", broken)
    done = aidocks("jobs", "list")
    assert done.code == 1
    assert "RuntimeError: boom" in done.err
    assert "Traceback" not in done.err
    assert "Traceback" in aidocks("--debug", "jobs", "list").err


def test_help_lists_every_exit_code(aidocks: Any) -> None:
    def family(kind: type[AIDocksError]) -> Iterator[type[AIDocksError]]:
        yield kind
        for child in kind.__subclasses__():
            yield from family(child)

    told = {int(code) for code in re.findall(r"\b(\d+) ", EPILOG)}
    assert {kind.exit_code for kind in family(AIDocksError)} | {0, 2, 130} == told
    assert "130 Ctrl-C" in re.sub(r"\s+", " ", aidocks("--help").out)


HEAVY = ("torch", "ray", "sqlalchemy", "httpx", "matplotlib", "transformers", "numpy", "pydantic_settings")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['aidocks', '--help']\n"
        "from aidocks.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stderr.strip() == "[]"


def test_python_m_aidocks_is_aidocks() -> None:
    environment = os.environ | {"COLUMNS": "100"}
    command = [sys.executable, "-m", "aidocks", "--version"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert re.fullmatch(r"aidocks \d+\.\d+\.\d+\n", ended.stdout)
