"""Names of objects: one for each path below the data directory, none for anything else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aidocks.errors import PathNotAllowed
from aidocks.storage.keys import is_below, key_of, path_of, refuse_links

HOME = Path("/srv/aidocks")
# Whatever Linux lets a file be called.
PARTS = st.binary(min_size=1, max_size=40).map(
    lambda raw: raw.replace(b"/", b"_").replace(b"\0", b"_").decode(errors="surrogateescape")
)
SAFE = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.~+=@,%/")


@given(st.lists(PARTS.filter(lambda part: part not in (".", "..")), min_size=1, max_size=4))
def test_every_path_has_a_name_of_plain_letters_and_back(parts: list[str]) -> None:
    path = HOME.joinpath(*parts)
    key = key_of(path, HOME)
    assert set(key) <= SAFE
    assert not key.startswith("/")
    assert ".." not in key.split("/")
    assert path_of(key, HOME) == path


@given(st.lists(PARTS, min_size=1, max_size=4), st.lists(PARTS, min_size=1, max_size=4))
def test_two_paths_never_share_a_name(one: list[str], other: list[str]) -> None:
    paths = [HOME.joinpath(*one), HOME.joinpath(*other)]
    keys = []
    for path in paths:
        try:
            keys.append(key_of(path, HOME))
        except PathNotAllowed:
            return
    assert (keys[0] == keys[1]) == (paths[0] == paths[1])


@pytest.mark.parametrize(
    "text",
    [
        "/etc/passwd",
        "/srv/aidocks/../other",
        "/srv/aidocks",
        "/srv/aidocks-more/x",
        "/srv/aidocks/a/../../b",
        "x",
    ],
)
def test_paths_outside_have_no_name(text: str) -> None:
    with pytest.raises(PathNotAllowed):
        key_of(Path(text), HOME)
    assert not is_below(Path(text), HOME)


@given(st.text(alphabet="ab./%2EefF\0\\", max_size=12))
def test_no_name_leads_out(key: str) -> None:
    try:
        path = path_of(key, HOME)
    except PathNotAllowed:
        return
    assert is_below(path, HOME)
    assert key_of(path, HOME) == key


@pytest.mark.parametrize(
    "key", ["", "..", "a/..", "%2E%2E/x", "a//b", "/a", "a%2Fb", "%00", "a/.", "?", "%41"]
)
def test_names_that_somebody_else_wrote_are_refused(key: str) -> None:
    with pytest.raises(PathNotAllowed):
        path_of(key, HOME)


def test_names_that_no_store_would_take_are_refused() -> None:
    with pytest.raises(PathNotAllowed, match="too long"):
        key_of(HOME / ("ü" * 100), HOME)
    with pytest.raises(PathNotAllowed, match="too long"):
        key_of(HOME.joinpath(*["x" * 200] * 5), HOME)


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "models").symlink_to(tmp_path)
    with pytest.raises(PathNotAllowed, match="link"):
        refuse_links(tmp_path / "home" / "models" / "x", tmp_path / "home")
