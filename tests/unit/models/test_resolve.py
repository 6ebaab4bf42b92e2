"""References lead to the registry, to allowed paths and to the hub's cache, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from aidocks.errors import CorruptCheckpoint, PathNotAllowed, UnknownModel
from aidocks.models.registry import Registry
from aidocks.models.resolve import ModelResolver, allowed_path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def root(tmp_path: Path, tiny_llama: Callable[..., Path]) -> Path:
    """An allowed root that holds one model."""
    tiny_llama(tmp_path / "root" / "team" / "tiny")
    return tmp_path / "root"


@pytest.fixture
def resolver(tmp_path: Path, root: Path) -> ModelResolver:
    Registry(tmp_path / "models").import_checkpoint("tiny-base", root / "team" / "tiny")
    return ModelResolver(tmp_path / "models", [root])


@pytest.fixture
def hub_cache(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub library's cache, with one complete model and one of which only the configuration is there."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    for name, files in (("whole", None), ("partial", {"config.json"})):
        repository = cache / f"models--org--{name}"
        snapshot = repository / "snapshots" / COMMIT
        (repository / "refs").mkdir(parents=True)
        (repository / "blobs").mkdir()
        snapshot.mkdir(parents=True)
        (repository / "refs" / "main").write_text(COMMIT)
        for source in (root / "team" / "tiny").iterdir():
            if files is None or source.name in files:
                blob = repository / "blobs" / source.name
                blob.write_bytes(source.read_bytes())
                (snapshot / source.name).symlink_to(blob)
    return cache


def test_a_registry_name(resolver: ModelResolver, tmp_path: Path) -> None:
    found = resolver.resolve("tiny-base")
    assert (found.reference, found.kind, found.path) == (
        "tiny-base",
        "registry",
        tmp_path / "models" / "tiny-base",
    )
    assert not resolver.needs_download("tiny-base")
    assert type(found).model_validate_json(found.model_dump_json()) == found


def test_an_unknown_name_lists_similar_ones(resolver: ModelResolver) -> None:
    with pytest.raises(UnknownModel, match="Did you mean tiny-base") as caught:
        resolver.resolve("tiny-bass", field="experts[1].source_model")
    assert (caught.value.field, caught.value.value) == ("experts[1].source_model", "tiny-bass")
    assert not resolver.needs_download("tiny-bass")


def test_a_damaged_registry_model_is_explained(resolver: ModelResolver, tmp_path: Path) -> None:
    (tmp_path / "models" / "tiny-base" / "aidocks.json").write_text("{")
    with pytest.raises(CorruptCheckpoint, match="tiny-base"):
        resolver.resolve("tiny-base")


def test_paths_below_an_allowed_root(
    resolver: ModelResolver, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = (root / "team" / "tiny").resolve()
    monkeypatch.chdir(root)
    monkeypatch.setenv("HOME", str(root))
    for text in (str(expected), f"{expected}/", f"{root}//team/./tiny", "./team/tiny", "~/team/tiny"):
        found = resolver.resolve(text)
        assert (found.kind, found.path) == ("path", expected), text
        assert not resolver.needs_download(text)


def test_links_that_stay_inside_are_followed(resolver: ModelResolver, root: Path) -> None:
    (root / "latest").symlink_to("team/tiny")
    assert resolver.resolve(str(root / "latest")).path == (root / "team" / "tiny").resolve()


def test_a_root_may_itself_be_a_link(tmp_path: Path, root: Path) -> None:
    (tmp_path / "linked-root").symlink_to(root)
    resolver = ModelResolver(tmp_path / "models", [tmp_path / "linked-root"])
    assert resolver.resolve(f"{tmp_path}/linked-root/team/tiny").path == (root / "team" / "tiny").resolve()
    assert resolver.resolve(f"{root}/team/tiny").kind == "path"


def test_an_allowed_path_with_nothing_there(resolver: ModelResolver, root: Path) -> None:
    with pytest.raises(UnknownModel, match="nothing at"):
        resolver.resolve(str(root / "none"), field="base_model_name")


def test_without_roots_no_path_is_allowed_and_the_hint_says_how_to_change_that(
    tmp_path: Path, root: Path
) -> None:
    with pytest.raises(PathNotAllowed, match="AIDOCKS_ALLOWED_ROOTS") as caught:
        ModelResolver(tmp_path / "models", ()).resolve(f"{root}/team/tiny", field="base_model_name")
    assert caught.value.field == "base_model_name"
    assert "none are configured" in caught.value.message


def test_files_can_be_allowed_too(root: Path) -> None:
    text = root / "team" / "tiny" / "config.json"
    assert allowed_path(str(text), [root]) == text.resolve()


@pytest.mark.parametrize("reference", ["org/whole", "org/whole@main", f"org/whole@{COMMIT}"])
def test_hub_models_in_the_local_cache(resolver: ModelResolver, hub_cache: Path, reference: str) -> None:
    found = resolver.resolve(reference)
    assert (found.kind, found.revision) == ("hub", COMMIT)
    assert found.path == hub_cache / "models--org--whole" / "snapshots" / COMMIT
    assert not resolver.needs_download(reference)


@pytest.mark.parametrize("reference", ["org/partial", "org/absent", "org/whole@v2"])
def test_hub_models_that_are_not_here(resolver: ModelResolver, hub_cache: Path, reference: str) -> None:
    assert resolver.needs_download(reference)
    with pytest.raises(UnknownModel, match="not on this machine"):
        resolver.resolve(reference)


@pytest.mark.parametrize(
    "reference",
    ["", " ", "a b", "a/b/c", "org/", "org/name@", "@main", "org/-name", "org/name.", "org/a--b", "-x",
     ".hidden/x", "org/na me", "org/name@-rf", "ünï/cöde", "a" * 97],
)  # fmt: skip
def test_what_is_no_reference(resolver: ModelResolver, reference: str) -> None:
    for ask in (resolver.resolve, resolver.needs_download):
        with pytest.raises(UnknownModel) as caught:
            ask(reference, field="base_model_name")
        assert caught.value.field == "base_model_name"
        assert "org/name" in (caught.value.hint or "")
