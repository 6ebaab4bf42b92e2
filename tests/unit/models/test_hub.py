"""What the hub is asked for, and what every one of its refusals becomes. Its remote side is played here."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from aidocks.errors import AIDocksError, HubRefused, HubUnavailable, UnknownModel, UnsafeCheckpoint
from aidocks.models import hub
from aidocks.models.registry import Registry
from aidocks.plan import UnitContext

SECRET = "hf_secretsecretsecret"


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub.invalid/x"))


def raising(error: Exception) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call


@pytest.fixture
def downloads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama: Callable[..., Path]
) -> list[dict[str, Any]]:
    """Calls for a download, each answered with a small model."""
    calls: list[dict[str, Any]] = []
    source = tiny_llama(tmp_path / "remote")

    def snapshot_download(repo_id: str, **named: Any) -> str:
        calls.append({"repo_id": repo_id, **named})
        return str(shutil.copytree(source, tmp_path / "snapshots" / "c0ffee", dirs_exist_ok=True))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_fetching_asks_for_safe_files_only(downloads: list[dict[str, Any]], tmp_path: Path) -> None:
    path = hub.fetch("org/name@v1", SECRET)
    assert path == tmp_path / "snapshots" / "c0ffee"
    first, call = downloads
    assert (first["repo_id"], first["revision"], first["token"]) == ("org/name", "v1", SECRET)
    assert first["allow_patterns"] == ["config.json"]
    # The rest is of the commit that the first file was of.
    assert (call["repo_id"], call["revision"], call["token"]) == ("org/name", "c0ffee", SECRET)
    wanted = huggingface_hub.utils.filter_repo_objects(
        ["model.safetensors", "config.json", "tokenizer.model", "merges.txt", "chat_template.jinja",
         "README.md",
         "pytorch_model.bin", "modeling_x.py", "x.pt", "x.pkl", "x.gguf", "original/consolidated.safetensors",
         "consolidated.safetensors", "consolidated.00.pth", "tf_model.h5", ".gitattributes",
         "onnx/config.json"],
        allow_patterns=call["allow_patterns"],
        ignore_patterns=call["ignore_patterns"],
    )  # fmt: skip
    assert set(wanted) == {
        "README.md", "chat_template.jinja", "config.json", "merges.txt", "model.safetensors",
        "tokenizer.model",
    }  # fmt: skip


def test_without_a_token_none_is_sent(downloads: list[dict[str, Any]]) -> None:
    hub.fetch("org/name", None)
    assert downloads[0]["token"] is False


def test_the_unit_carries_no_token(
    downloads: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    unit = hub.FetchModel(reference="org/name")
    result = unit.run(UnitContext(workspace=tmp_path))
    assert downloads[0]["token"] == SECRET
    assert result.revision == "c0ffee"
    assert SECRET not in unit.model_dump_json() + result.model_dump_json() + unit.label + repr(unit)


def test_a_repository_without_safetensors(downloads: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "remote" / "model.safetensors").unlink()
    with pytest.raises(UnsafeCheckpoint, match="org/name has no weights in safetensors format"):
        hub.fetch("org/name", None)


REFUSALS = [
    (errors.GatedRepoError("x", response=response(403)), HubRefused, "is gated", "Accept it at"),
    (
        errors.RepositoryNotFoundError("x", response=response(401)),
        HubRefused,
        "does not exist, or",
        "set HF_TOKEN",
    ),
    (
        errors.RepositoryNotFoundError("x", response=response(404)),
        HubRefused,
        "does not exist, or",
        "Check the name",
    ),
    (errors.RevisionNotFoundError("x", response=response(404)), UnknownModel, "no such revision", "org/name"),
    (errors.HfHubHTTPError("x", response=response(401)), HubRefused, "401", "HF_TOKEN"),
    (errors.HfHubHTTPError("x", response=response(403)), HubRefused, "403", "access"),
    (errors.HfHubHTTPError("x", response=response(429)), HubUnavailable, "429", "Wait"),
    (errors.HfHubHTTPError("x", response=response(500)), HubUnavailable, "answered 500", "later"),
    (errors.LocalEntryNotFoundError("x"), HubUnavailable, "cannot be reached", "network"),
    (errors.OfflineModeIsEnabled("x"), HubRefused, "cannot be reached", "HF_HUB_OFFLINE"),
    (httpx.ConnectError("x"), HubUnavailable, "cannot be reached", "network"),
    (httpx.ReadTimeout("x"), HubUnavailable, "cannot be reached", "network"),
    (ConnectionResetError("x"), HubUnavailable, "cannot be reached", "network"),
]


@pytest.mark.parametrize(("error", "kind", "says", "hint"), REFUSALS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("direction", ["download", "upload"])
def test_refusals_say_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type, says: str, hint: str, direction: str
) -> None:
    def ask() -> object:
        if direction == "download":
            return hub.fetch("org/name", SECRET)
        return hub.publish(Path("unused"), "org/name", token=SECRET, private=True)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(error))
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", raising(error))
    with pytest.raises(AIDocksError) as caught:
        ask()
    assert type(caught.value) is kind
    assert says in caught.value.message
    assert "org/name" in caught.value.message
    assert hint in (caught.value.hint or "")
    assert SECRET not in str(caught.value)


def test_what_is_not_the_hub_s_fault_is_not_blamed_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(PermissionError("cache not writable")))
    with pytest.raises(PermissionError):
        hub.fetch("org/name", None)


def test_the_network_really_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubRefused, match="cannot be reached") as caught:
        hub.fetch("org/name", None)
    assert not caught.value.retryable, "it was switched off"


@pytest.mark.parametrize("source", ["environment", "stored"])
def test_a_token_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str) -> None:
    if source == "environment":
        monkeypatch.setenv("HF_TOKEN", SECRET)
    else:
        (tmp_path / "no-token").write_text(SECRET)
    assert hub.require_token() == SECRET


def test_publishing_without_a_token_is_refused_before_any_work() -> None:
    with pytest.raises(HubRefused, match="HF_TOKEN") as caught:
        hub.require_token()
    assert caught.value.field == "publish"


def test_publishing_uploads_the_model_and_its_card_but_not_its_manifest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    calls: dict[str, Any] = {}

    def create_repo(self: Any, repo_id: str, **named: Any) -> str:
        calls["create"] = {"repo_id": repo_id, "token": self.token, **named}
        return f"https://hub.invalid/{repo_id}"

    def upload_folder(self: Any, **named: Any) -> None:
        calls["upload"] = named

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    model = Registry(tmp_path / "models").import_checkpoint("tiny", tiny_llama(tmp_path / "source"))
    unit = hub.PublishToHub(directory=model.path, repo_id="trainer/tiny")
    result = unit.run(UnitContext(workspace=tmp_path))
    assert result == hub.PublishedModel(repo_id="trainer/tiny", url="https://hub.invalid/trainer/tiny")
    assert calls["create"] == {
        "repo_id": "trainer/tiny", "token": SECRET, "repo_type": "model", "private": True, "exist_ok": True,
    }  # fmt: skip
    assert Path(calls["upload"]["folder_path"]) == model.path
    present = [path.name for path in model.path.iterdir()]
    sent = set(
        huggingface_hub.utils.filter_repo_objects(present, ignore_patterns=calls["upload"]["ignore_patterns"])
    )
    assert sent == set(present) - {"aidocks.json"}
    assert SECRET not in unit.model_dump_json() + result.model_dump_json()


@pytest.mark.parametrize("repo_id", ["name", "a/b/c", "../x", "org/x--y", "org/..", ""])
def test_what_is_no_repository_is_not_uploaded_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, repo_id: str
) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", raising(AssertionError("was asked")))
    with pytest.raises(UnknownModel):
        hub.publish(tmp_path, repo_id, token=SECRET, private=True)
