"""Names and paths that try to leave the directories they may be in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aidocks.errors import AIDocksError, NotFound, PathNotAllowed, UnknownModel
from aidocks.models.registry import Registry
from aidocks.models.resolve import ModelResolver

TRAVERSALS = [
    "..", "../", "../..", "../secret", "../../etc/passwd", "a/../../secret", "a/..", "./..", "./../secret",
    "~/../secret",
    "..%2fsecret", "%2e%2e/secret", "%2e%2e%2fsecret", "%252e%252e%252fsecret", "%c0%ae%c0%ae/secret",
    "..%00/", "a%2fb",
    "..\\secret", "..\\..\\secret", "a\\b", "\\\\host\\share", "C:\\secret", "C:/secret", "..;/secret/..",
    "file:///etc/passwd", "file://localhost/etc/passwd", "file:/etc/passwd", "FILE:/etc/passwd",
    "http://127.0.0.1/model", "https://example.invalid/m", "s3://bucket/m", "hf://org/name",
    "data:text/plain,x",
    "name\0", "name\0.safetensors", "/etc/passwd\0", "\0", "a\nb", "a\r\nb", "\x1b[31m", "name?x=1",
    "name#x", "a\x7f",
    "\udcff", "/\udcff",
    "a" * 10_240, "/" + "a" * 10_240, "a/" * 5000, "/" + "ä" * 200,
]  # fmt: skip
ABSOLUTE = [
    "/", "/etc", "/etc/passwd", "//etc/passwd", "/proc/self/environ", "/proc/self/root/etc", "/dev/zero",
    "~", "~/x", "~root", "~root/x", "~nobody-of-that-name/x", ".",
]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, tiny_llama: Callable[..., Path]) -> Path:
    """An allowed root and a registry, with a secret beside both."""
    tiny_llama(tmp_path / "root" / "tiny")
    tiny_llama(tmp_path / "secret")
    (tmp_path / "root-of-others").mkdir()
    Registry(tmp_path / "models").import_checkpoint("tiny", tmp_path / "root" / "tiny")
    return tmp_path


def resolver(place: Path) -> ModelResolver:
    return ModelResolver(place / "models", [place / "root"])


def test_references_that_try_to_escape(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place / "models")
    for reference in TRAVERSALS:
        for ask in (resolver(place).resolve, resolver(place).needs_download):
            with pytest.raises(PathNotAllowed) as caught:
                ask(reference, field="base_model_name")
            assert caught.value.field == "base_model_name", reference
            assert len(str(caught.value)) < 1000


def test_paths_outside_the_roots(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.chdir(place)
    outside = [
        *ABSOLUTE,
        "./secret",
        "./root-of-others",
        "~/secret",
        str(place / "secret"),
        str(place),
        f"{place}/root2",
    ]
    for reference in outside:
        with pytest.raises(PathNotAllowed):
            resolver(place).resolve(reference)


def test_nothing_is_told_about_what_exists_outside(place: Path) -> None:
    messages = set()
    for name in ("secret", "absent"):
        with pytest.raises(PathNotAllowed) as caught:
            resolver(place).resolve(str(place / name))
        messages.add(str(caught.value).replace(name, "X"))
    assert len(messages) == 1


def test_links_out_of_the_root(place: Path) -> None:
    root = place / "root"
    (root / "out").symlink_to(place / "secret")
    (root / "relative").symlink_to("../secret")
    (root / "up").symlink_to("..")
    (root / "loop").symlink_to("loop")
    (root / "chain").symlink_to("out")
    for name in ("out", "relative", "up/secret", "chain", "out/config.json"):
        with pytest.raises(PathNotAllowed):
            resolver(place).resolve(f"{root}/{name}")
    with pytest.raises(AIDocksError):
        resolver(place).resolve(f"{root}/loop")


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "extra.json"])
def test_links_out_of_the_root_inside_a_model(place: Path, name: str) -> None:
    """Their targets would be copied into the registry and served from there."""
    link = place / "root" / "tiny" / name
    link.unlink(missing_ok=True)
    link.symlink_to(place / "secret" / "config.json")
    with pytest.raises(PathNotAllowed, match=name):
        resolver(place).resolve(f"{place}/root/tiny")


def test_files_of_a_model_that_try_to_escape(place: Path) -> None:
    registry = Registry(place / "models")
    for path in [*TRAVERSALS, "/etc/passwd", "//etc/passwd", "~/x", f"{place}/secret/config.json"]:
        with pytest.raises((PathNotAllowed, NotFound)):
            registry.file("tiny", path)
    for path in [
        "..",
        "../tiny/config.json",
        "%2e%2e/x",
        "config.json\0",
        "/etc/passwd",
        "file:///etc/passwd",
    ]:
        with pytest.raises(PathNotAllowed):
            registry.file("tiny", path)


def test_links_out_of_a_model_are_not_followed(place: Path) -> None:
    model = place / "models" / "tiny"
    (model / "leak.json").symlink_to(place / "secret" / "config.json")
    (model / "leak").symlink_to(place / "secret")
    (model / "up").symlink_to("..")
    for path in ("leak.json", "leak/config.json", "up/tiny/../tiny/config.json"):
        with pytest.raises(PathNotAllowed):
            Registry(place / "models").file("tiny", path)


def test_names_that_try_to_escape(place: Path) -> None:
    registry = Registry(place / "models")
    for name in [
        *TRAVERSALS,
        *ABSOLUTE,
        ".trash",
        ".staging",
        "tiny/",
        "tiny/.",
        "./tiny",
        " tiny",
        "tiny ",
        "tiny\n",
    ]:
        assert not registry.exists(name)
        for ask in (registry.get, registry.manifest, registry.path, registry.delete):
            with pytest.raises(UnknownModel) as caught:
                ask(name)
            assert len(str(caught.value)) < 1000
        with pytest.raises(UnknownModel):
            registry.file(name, "config.json")
        with pytest.raises(PathNotAllowed):
            registry.import_checkpoint(name, place / "root" / "tiny")
    assert registry.names() == ["tiny"]
    assert (place / "secret" / "config.json").is_file()


path_like = st.text(alphabet=st.sampled_from("./\\~%20eEfF:a\0 @-"), max_size=24) | st.text(max_size=24)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=path_like)
def test_nothing_ever_leads_outside(place: Path, text: str) -> None:
    inside = [(place / "root").resolve(), (place / "models").resolve()]
    for candidate in (text, f"{place}/root/{text}", f"./{text}"):
        try:
            found = resolver(place).resolve(candidate).path
        except (PathNotAllowed, UnknownModel):
            continue
        assert any(found.resolve().is_relative_to(root) for root in inside)
    try:
        file = Registry(place / "models").file("tiny", text)
    except (PathNotAllowed, NotFound):
        return
    assert file.is_relative_to((place / "models" / "tiny").resolve())
