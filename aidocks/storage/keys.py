"""From a path below the data directory to the name of an object, and back; nothing else becomes a name."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote

from aidocks.errors import PathNotAllowed
from aidocks.models.names import shorten

#: What file systems allow for a part of a path, and what S3 allows for all of it (1024), less room for the prefix.
_MOST_PART_BYTES = 240
_MOST_KEY_BYTES = 800


def key_of(path: Path, home: Path) -> str:
    """Return the name under which a file of the data directory is known, relative to that directory.

    Characters that a store could take for something else (``?``, ``*``, ``%``, ``#`` and all but plain letters) are
    written as in a URL, so that each path has a name of its own, and each name one path.

    Args:
        path: Absolute, below ``home``. Nobody looks at the disk: links are the reader's matter.
        home: The data directory.

    Raises:
        PathNotAllowed: It lies outside, or leads there, or is too long for a name.
    """
    try:
        relative = path.relative_to(home)
    except ValueError:
        raise _refused(path, "lies outside the data directory") from None
    parts = relative.parts
    if not parts or ".." in parts or any("\0" in part for part in parts):
        raise _refused(path, "leads out of the data directory")
    quoted = [_quoted(part, path) for part in parts]
    key = "/".join(quoted)
    if len(key) > _MOST_KEY_BYTES or any(len(part) > _MOST_PART_BYTES for part in quoted):
        raise _refused(path, "is too long for a name in the shared storage")
    return key


def path_of(key: str, home: Path) -> Path:
    """Return the path that has a name.

    Raises:
        PathNotAllowed: It is the name of none: somebody else has written it.
    """
    parts = [unquote(part, errors="surrogateescape") for part in key.split("/")]
    if any(part in ("", ".", "..") or "/" in part or "\0" in part for part in parts):
        raise _refused(PurePosixPath(key), "is no name of a file")
    path = home.joinpath(*parts)
    if key_of(path, home) != key:
        raise _refused(PurePosixPath(key), "is no name of a file")
    return path


def refuse_links(path: Path, home: Path) -> None:
    """Refuse a path of which a part below the data directory is a link: it could lead anywhere.

    Raises:
        PathNotAllowed: Naming the path.
    """
    for place in (path, *path.parents):
        if place == home:
            return
        if place.is_symlink():
            raise _refused(path, "leads through a link")


def is_below(path: Path, directory: Path) -> bool:
    """Tell whether a path as it is written lies in a directory, at any depth, without ``..`` on the way."""
    return path.is_relative_to(directory) and path != directory and ".." not in path.parts


def _quoted(part: str, path: Path) -> str:
    # A dot at the beginning hides a file from listings of some stores.
    text = quote(os.fsencode(part), safe="-_.~+=@,")
    if part in (".", ".."):
        raise _refused(path, "leads out of the data directory")
    return f"%2E{text[1:]}" if text.startswith(".") else text


def _refused(path: Path | PurePosixPath, why: str) -> PathNotAllowed:
    return PathNotAllowed(f"{shorten(str(path))!r} {why}.", value=shorten(str(path)))
