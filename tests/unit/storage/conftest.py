"""Nodes that share no file system, in one process: data directories of their own, and one storage."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from aidocks import storage
from aidocks.settings import Settings
from aidocks.storage.files import SharedFiles
from aidocks.storage.objects import ObjectStore, open_store


class Node:
    """A node whose data directory is seen by nobody else, under the path that all nodes have for it.

    Args:
        home: That path: a link, which leads to the node's own directory while the node is at work.
        own: The node's own directory.
        url: Of the storage.
    """

    def __init__(self, home: Path, own: Path, url: str) -> None:
        self.home = home
        self._own = own
        self._url = url
        own.mkdir()

    @contextmanager
    def at_work(self) -> Iterator[Settings]:
        """Be the node that this process is on."""
        aside = self.home.with_name("aside")
        aside.symlink_to(self._own)
        os.replace(aside, self.home)
        storage._opened.clear()  # as another process: it remembers nothing
        yield Settings(home=self.home, storage_url=self._url)

    @contextmanager
    def sharing(self) -> Iterator[SharedFiles]:
        """Be that node, and share files."""
        with self.at_work() as settings:
            here = storage.open_shared(settings)
            assert here is not None
            yield here


MakeNode = Callable[[str], Node]


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return (
        f"memory://{tmp_path.name}-{os.getpid()}" if request.param == "memory" else f"file://{tmp_path}/store"
    )


@pytest.fixture
def node(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> MakeNode:
    """Make a node: ``node("a")``. The one used last is at work until another one is."""
    home = tmp_path / "home"
    monkeypatch.setenv("AIDOCKS_HOME", str(home))
    monkeypatch.setenv("AIDOCKS_STORAGE_URL", url)
    return lambda name: Node(home, tmp_path / name, url)


@pytest.fixture
def store(url: str) -> ObjectStore:
    return open_store(url)
