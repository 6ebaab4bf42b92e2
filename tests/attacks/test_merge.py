"""Merges that try to read or write elsewhere, to run code, or to keep the service busy."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aidocks.errors import AIDocksError, InvalidSpec, PathNotAllowed, UnsafeCheckpoint
from aidocks.jobs.model import Status
from aidocks.jobs.runner import run_locally
from aidocks.models.registry import Registry
from aidocks.settings import Settings
from tests.support.merge_jobs import add_adapter, left_behind, make_family, request

WEIGHT = {"weight": 0.5}
BODY: dict[str, Any] = {
    "merge_method": "linear",
    "models": [{"model": "tiny"}, {"model": "tiny+ADAPTER"}],
    "parameters": WEIGHT,
}


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def place(settings: Settings, tmp_path: Path) -> Settings:
    """An installation with the model `tiny`, an allowed root, and secrets beside it."""
    make_family(tmp_path / "root", "tiny", "other")
    add_adapter(tmp_path / "root" / "adapter")
    make_family(tmp_path, "secret")
    add_adapter(tmp_path / "secret-adapter")
    (tmp_path / "secret.txt").write_text("secret " * 1000)
    Registry(settings.models_dir).import_checkpoint("tiny", tmp_path / "root" / "tiny")
    return settings.model_copy(update={"allowed_roots": (tmp_path / "root",)})


def with_model(reference: str) -> tuple[str, dict[str, Any]]:
    return "models[1].model", {"models": [{"model": "tiny"}, {"model": reference}]}


def with_base(reference: str) -> tuple[str, dict[str, Any]]:
    return "base_model", {"base_model": reference}


def with_adapter(reference: str) -> tuple[str, dict[str, Any]]:
    return "models[1].model.lora", {"models": [{"model": "tiny"}, {"model": f"tiny+{reference}"}]}


def with_long_form(reference: str) -> tuple[str, dict[str, Any]]:
    long = {"model": {"path": "tiny"}, "lora": {"path": reference}}
    return "models[1].model.lora", {"models": [{"model": "tiny"}, {"model": long}]}


def with_tokenizer(reference: str) -> tuple[str, dict[str, Any]]:
    return "tokenizer_source", {"models": [{"model": "tiny"}], "tokenizer_source": reference}


def with_token(reference: str) -> tuple[str, dict[str, Any]]:
    policy = {
        "source": "union",
        "tokens": {"x": {"source": {"kind": "model_token", "model": reference, "token": "a"}}},
    }
    return "tokenizer.tokens.x.source.model", {"models": [{"model": "tiny"}], "tokenizer": policy}


def with_slice(reference: str) -> tuple[str, dict[str, Any]]:
    sources = [{"model": reference, "layer_range": [0, 2]}]
    return "slices[0].sources[0].model", {"models": None, "slices": [{"sources": sources}]}


def with_stage(reference: str) -> tuple[str, dict[str, Any]]:
    stage = {"name": "s", "merge_method": "linear", "parameters": WEIGHT, "models": [{"model": reference}]}
    return "stages[0].models[0].model", {"stages": [stage], "models": [{"model": "s"}]}


PLACES = [
    with_model,
    with_base,
    with_adapter,
    with_long_form,
    with_tokenizer,
    with_token,
    with_slice,
    with_stage,
]


@pytest.mark.parametrize("where", PLACES)
def test_no_reference_leads_outside(
    where: Callable[[str], tuple[str, dict[str, Any]]],
    place: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path / "root")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "root" / "out").symlink_to(tmp_path / "secret")
    tried = [
        "../secret",
        "./../secret",
        "..",
        str(tmp_path / "secret"),
        f"{tmp_path}/root/../secret",
        str(tmp_path / "secret-adapter"),
        "/etc",
        "~/secret",
        "./out",
        "%2e%2e/secret",
        "file:///etc/passwd",
        "tiny\n",
        "a" * 2000,
    ]
    for reference in tried:
        field, fields = where(reference)
        with pytest.raises(PathNotAllowed) as caught:
            run_locally("merge", request(json.dumps(BODY | fields)), place)
        assert caught.value.field == field, reference
        assert str(caught.value.value) in reference or len(reference) > 200
        assert caught.value.hint
        assert len(str(caught.value)) < 1000
    assert left_behind(place.home, "tiny") == []


@pytest.mark.parametrize("text", ["../secret.txt", "/etc/passwd", "~/secret.txt", "./../secret.txt"])
def test_no_text_is_read_outside(
    text: str, place: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "root")
    body = BODY | {"models": [{"model": "tiny"}], "text": ["prose", text]}
    with pytest.raises(AIDocksError) as caught:
        run_locally("merge", request(json.dumps(body)), place)
    assert caught.value.field == "text[1]"
    assert "secret secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "", "x" * 200, "a\0"])
def test_no_name_leads_elsewhere(name: str, place: Settings) -> None:
    for fields in (
        {"name": name},
        {"stages": [{"name": name, **BODY}], "models": [{"model": name or "s"}]},
    ):
        with pytest.raises(InvalidSpec) as caught:
            run_locally("merge", request(json.dumps(BODY | fields)), place)
        assert any("name" in str(error["field"]) for error in caught.value.problem()["errors"])
    assert left_behind(place.home, "tiny") == []


def test_pytorch_files_that_would_run_code(place: Settings, tmp_path: Path) -> None:
    import torch

    model, ran = tmp_path / "root" / "other", tmp_path / "ran"
    (model / "model.safetensors").unlink()
    body = json.dumps(BODY | {"models": [{"model": "tiny"}, {"model": str(model)}], "name": "stolen"})
    torch.save({"w": Payload(ran)}, model / "pytorch_model.bin")
    zipped = (model / "pytorch_model.bin").read_bytes()
    for content in (zipped, pickle.dumps(Payload(ran)), pickle.dumps({"w": Payload(ran)}, protocol=2)):
        (model / "pytorch_model.bin").write_bytes(content)
        job = run_locally("merge", request(body), place)
        assert job.status is Status.FAILED
        assert job.error is not None
        assert job.error["code"] == "unsafe_checkpoint"
        assert "pytorch_model.bin" in job.error["detail"]
        assert left_behind(place.home, "tiny") == []
        assert not ran.exists()


def test_adapters_are_never_unpickled(place: Settings, tmp_path: Path) -> None:
    adapter, ran = tmp_path / "root" / "adapter", tmp_path / "ran"
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Payload(ran)))
    body = json.dumps(BODY).replace("ADAPTER", str(adapter))
    with pytest.raises(UnsafeCheckpoint, match=r"adapter_model\.bin") as caught:
        run_locally("merge", request(body), place)
    assert caught.value.field == "models[1].model.lora"
    assert not ran.exists()
    assert left_behind(place.home, "tiny") == []


def test_links_inside_an_adapter_lead_nowhere_else(place: Settings, tmp_path: Path) -> None:
    adapter = tmp_path / "root" / "adapter"
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        kept = (adapter / name).read_bytes()
        (adapter / name).unlink()
        (adapter / name).symlink_to(tmp_path / "secret-adapter" / name)
        with pytest.raises(PathNotAllowed) as caught:
            run_locally("merge", request(json.dumps(BODY).replace("ADAPTER", str(adapter))), place)
        assert caught.value.field == "models[1].model.lora"
        (adapter / name).unlink()
        (adapter / name).write_bytes(kept)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 9 ** 9 ** 9 }}",
        "{% for a in range(10 ** 9) %}{% for b in range(10 ** 9) %}{% endfor %}{% endfor %}",
    ],
)
def test_a_chat_template_is_not_run(template: str, place: Settings) -> None:
    begin = time.perf_counter()
    body = BODY | {"models": [{"model": "tiny"}], "chat_template": template}
    job = run_locally("merge", request(json.dumps(body)), place)
    assert job.status is Status.SUCCEEDED
    assert time.perf_counter() - begin < 20


def test_requests_that_would_make_too_much(place: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of slices of the same layers: more than the disk holds, seen before anything is written."""
    usage = shutil.disk_usage(place.home)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000_000))
    piece = {"sources": [{"model": "tiny", "layer_range": [0, 4]}]}
    body = {"merge_method": "passthrough", "slices": [piece] * 500}
    begin = time.perf_counter()
    with pytest.raises(AIDocksError, match="are needed"):
        run_locally("merge", request(json.dumps(body)), place)
    assert time.perf_counter() - begin < 30
    assert left_behind(place.home, "tiny") == []
