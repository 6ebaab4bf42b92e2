"""Files of the data directory that nodes without a common file system share: contents by hash, names as entries.

::

    objects/ab/abcd…        a content, under its SHA-256; written once, never changed
    files/<path>            an entry: which content a file of a workspace, or of a scan, has
    trees/<path>            the same for a directory that appears as a whole: a checkpoint
    models/<name>.json      the manifest of a model; datasets/<name>.json the description of a data set

What is named by an entry was uploaded before, so whoever finds a name finds the content. The same content is moved
once: a model that is published has the files that its job's workers have kept already.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, RootModel, ValidationError

from aidocks.checkpoints.files import UNFINISHED, hash_file, unfinished
from aidocks.errors import CorruptCheckpoint
from aidocks.storage.catalogue import Catalogue
from aidocks.storage.keys import key_of, path_of, refuse_links
from aidocks.storage.objects import Listed, ObjectStore

#: Contents that nothing names are removed when they are older; one that is half as old is written anew before it is
#: named again, so that the two never meet (see `aidocks.storage.sweep`).
UNNAMED_S = 24 * 3600.0
_OLD_S = UNNAMED_S / 2
#: A file up to this size is read once, and hashed as it is sent.
_SMALL_BYTES = 8 << 20
_AT_ONCE = 8
#: Entries that a process remembers.
_MOST_KNOWN = 50_000
_FILES, _TREES = "files", "trees"


class Entry(BaseModel):
    """Which content a file has, and when it was last changed where it was written."""

    model_config = ConfigDict(frozen=True)

    bytes: int
    sha256: str
    changed_ns: int = 0


class _Tree(RootModel[dict[str, Entry]]):
    """Relative path -> entry of all files of a directory."""


class SharedFiles:
    """What the data directory of this node shares with the others. Safe for threads.

    Args:
        home: The data directory, which has the same path on every node.
        store: Where what is shared lies.
    """

    def __init__(self, home: Path, store: ObjectStore) -> None:
        self.home = home
        self.store = store
        self.locks = home / ".storage" / "locks"
        self.models = Catalogue(store, "models")
        self.datasets = Catalogue(store, "datasets")
        self._known: dict[str, tuple[str, Entry]] = {}

    # Contents.

    def has(self, sha256: str, size: int) -> bool:
        """Tell whether a content is there."""
        return self._age_of(sha256, size) is not None

    def put(self, path: Path, sha256: str, since: os.stat_result | None = None) -> None:
        """Upload a content from a file, unless it is there.

        Args:
            path: The file.
            sha256: Of its content.
            since: Its state when that was computed, or before. Default: as it is now.

        Raises:
            CorruptCheckpoint: The file has another content.
            ServiceUnreachable: The storage does not answer.
        """
        since = since or path.stat()
        age_s = self._age_of(sha256, since.st_size)
        if age_s is None:
            self.store.put(object_key(sha256), path, sha256, since)
        elif age_s > _OLD_S:
            self.store.touch(object_key(sha256), path, sha256, since)

    def fetch(self, entry: Entry, target: Path) -> None:
        """Download a content to a file, which appears whole and checked, or not at all.

        Raises:
            CorruptCheckpoint: It is not there, or damaged.
            InsufficientDisk: It does not fit.
            ServiceUnreachable: The storage does not answer.
        """
        refuse_links(target, self.home)
        key = object_key(entry.sha256)
        self.store.get(key, target, entry.bytes, entry.sha256, str(target.relative_to(self.home)))
        if entry.changed_ns:
            os.utime(target, ns=(entry.changed_ns, entry.changed_ns))

    # Files.

    def entry(self, path: Path) -> Entry | None:
        """Return what is known of a file; None where nothing is."""
        content = self.store.read(f"{_FILES}/{key_of(path, self.home)}")
        return None if content is None else _read_entry(content, path)

    def entries(self, directory: Path) -> dict[Path, Entry]:
        """Return all files below a directory that are shared; of those that did not change, from memory."""
        begin = f"{_FILES}/{key_of(directory, self.home)}"
        listed = self.store.list(begin)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            found = list(pool.map(self._entry_of, listed))
        return {
            path_of(row.key.removeprefix(f"{_FILES}/"), self.home): entry
            for row, entry in zip(listed, found, strict=True)
            if entry is not None
        }

    def keep(self, paths: Iterable[Path], known: Mapping[Path, str] | None = None) -> None:
        """Share files as they are now. One that is changed meanwhile is left to whoever changes it.

        Args:
            paths: Below the data directory.
            known: Their hashes, where whoever wrote them knows.

        Raises:
            CorruptCheckpoint: A file does not have the content that was written.
            ServiceUnreachable: The storage does not answer.
        """
        hashes = known or {}
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(lambda path: self._keep(path, hashes.get(path)), list(paths)))

    def bring(self, wanted: Mapping[Path, Entry]) -> None:
        """Make files of this node what they are in the storage, but for those that were changed here since.

        Raises:
            CorruptCheckpoint, InsufficientDisk, ServiceUnreachable: As :meth:`fetch`.
        """
        missing = {path: entry for path, entry in wanted.items() if _differs(path, entry)}
        if not missing:
            return
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(lambda row: self.fetch(row[1], row[0]), missing.items()))

    def is_shared(self, directory: Path) -> bool:
        """Tell whether anything of a directory is."""
        key = key_of(directory, self.home)
        return any(self.store.list(f"{kind}/{key}") for kind in (_FILES, _TREES))

    def forget(self, directory: Path) -> None:
        """Remove what is shared of a directory; the files of this node stay."""
        key = key_of(directory, self.home)
        for kind in (_FILES, _TREES):
            self.store.remove_all(f"{kind}/{key}")

    # Directories that appear as a whole.

    def keep_tree(self, directory: Path) -> None:
        """Share a directory as it is: all of it at once, or nothing.

        Raises:
            FileNotFoundError: It was removed meanwhile.
            CorruptCheckpoint, ServiceUnreachable: As :meth:`keep`.
        """
        refuse_links(directory, self.home)
        tree, whole = {}, directory.stat().st_ino
        for path in files_below(directory):
            before = path.stat()
            entry = Entry(bytes=before.st_size, sha256=hash_file(path))
            self.put(path, entry.sha256, before)
            tree[path.relative_to(directory).as_posix()] = entry
        # Whoever removes one takes its name away first: had that happened, part of it could be missing.
        if directory.stat().st_ino != whole:
            raise FileNotFoundError(directory)
        self.store.write(self._tree_key(directory), _Tree(tree).model_dump_json().encode())

    def trees(self, parent: Path) -> list[Path]:
        """Return the directories in ``parent`` that are shared as a whole, sorted."""
        begin = self._tree_key(parent)
        return [path_of(row.key.removeprefix(f"{_TREES}/"), self.home) for row in self.store.list(begin)]

    def forget_tree(self, directory: Path) -> None:
        """Remove a directory that is shared as a whole; that of this node stays."""
        self.store.remove(self._tree_key(directory))

    def bring_tree(self, directory: Path) -> bool:
        """Bring a directory that is not here, all of it at once; return whether it is here now.

        Raises:
            CorruptCheckpoint, InsufficientDisk, ServiceUnreachable: As :meth:`fetch`.
        """
        with self.hold(directory):
            if directory.is_dir():
                return True
            content = self.store.read(self._tree_key(directory))
            if content is None:
                return False
            aside = unfinished(directory)
            try:
                for relative, entry in _read_tree(content, directory).items():
                    key_of(directory / relative, directory)
                    self.fetch(entry, aside / relative)
                aside.rename(directory)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
            return True

    # Of this node.

    @contextmanager
    def hold(self, path: Path, *, together: bool = False, wait: bool = True) -> Iterator[bool]:
        """Hold a path against other processes of this node that ask for it, until the end of the block.

        Args:
            path: Whatever it is; it need not exist.
            together: Others may hold it together with this one, but nobody alone.
            wait: Until it is free; otherwise the block is told False when it is not.
        """
        name = hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
        descriptor = _lock(self.locks / name, fcntl.LOCK_SH if together else fcntl.LOCK_EX, wait=wait)
        try:
            yield descriptor is not None
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def remove_locks(self, older_than_s: float) -> None:
        """Remove the files of locks that nobody holds."""
        with suppress(FileNotFoundError):
            for found in os.scandir(self.locks):
                if time.time() - found.stat().st_mtime > older_than_s:
                    descriptor = _lock(Path(found.path), fcntl.LOCK_EX, wait=False)
                    if descriptor is not None:
                        Path(found.path).unlink(missing_ok=True)
                        os.close(descriptor)

    def _keep(self, path: Path, sha256: str | None) -> None:
        refuse_links(path, self.home)
        key = f"{_FILES}/{key_of(path, self.home)}"
        try:
            before = path.stat()
            # Large ones of a unit beside this one: whoever is first hashes and uploads them, for both.
            with self.hold(path) if before.st_size > _SMALL_BYTES else nullcontext():
                if before.st_size > _SMALL_BYTES and self._is_kept(path, before):
                    return
                digest = self._upload(path, before, sha256)
        except FileNotFoundError:
            return  # removed again
        entry = Entry(bytes=before.st_size, sha256=digest, changed_ns=before.st_mtime_ns)
        # Others of this node may keep the same file: the entry of an older state must not come last.
        with self.hold(self.home.joinpath(*path.relative_to(self.home).parts[:2], ".names")):
            if path.exists() and _is_same(path.stat(), entry):
                self.store.write(key, entry.model_dump_json().encode())

    def _is_kept(self, path: Path, status: os.stat_result) -> bool:
        entry = self.entry(path)
        return entry is not None and _is_same(status, entry)

    def _upload(self, path: Path, before: os.stat_result, sha256: str | None) -> str:
        if before.st_size > _SMALL_BYTES or sha256 is not None:
            digest = sha256 or hash_file(path)
            try:
                self.put(path, digest, before)
            except CorruptCheckpoint:
                if sha256 is not None:
                    raise
            return digest
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        age_s = self._age_of(digest, len(content))
        if age_s is None or age_s > _OLD_S:
            self.store.write(object_key(digest), content)
        return digest

    def _age_of(self, sha256: str, size: int) -> float | None:
        """Return how long ago a content was written, in seconds; None where it is not there."""
        found = self.store.look(object_key(sha256))
        return None if found is None or found.size != size else time.time() - found.changed_s

    def _entry_of(self, listed: Listed) -> Entry | None:
        known = self._known.get(listed.key)
        if known is not None and known[0] == listed.version:
            return known[1]
        content = self.store.read(listed.key)
        if content is None:
            return None  # removed since it was listed
        entry = _read_entry(content, listed.key)
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known[listed.key] = (listed.version, entry)
        return entry

    def _tree_key(self, directory: Path) -> str:
        return f"{_TREES}/{key_of(directory, self.home)}"


def object_key(sha256: str) -> str:
    """Return the name of a content.

    Raises:
        CorruptCheckpoint: That is no hash; somebody else has written it.
    """
    if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
        raise CorruptCheckpoint(f"{sha256[:80]!r} is no SHA-256.", value=sha256[:80])
    return f"objects/{sha256[:2]}/{sha256}"


def files_below(directory: Path, leave: Callable[[Path], bool] = lambda _: False) -> list[Path]:
    """Return the finished files below a directory, sorted; of links, none.

    Args:
        directory: May not exist.
        leave: Whether a file is left out.
    """
    found = []
    for parent, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if UNFINISHED not in name]
        for name in names:
            path = Path(parent, name)
            if UNFINISHED in name or name.endswith(".lock") or path.is_symlink() or leave(path):
                continue
            found.append(path)
    return sorted(found)


def _lock(path: Path, kind: int, *, wait: bool) -> int | None:
    """Return a file that is open and locked, which ends with it; None where another has it and is not waited for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # removed while we waited: others lock a new one


def _differs(path: Path, entry: Entry) -> bool:
    """Tell whether a file of this node is to be replaced: it is not there, or older than what was shared."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return True
    return not _is_same(status, entry) and status.st_mtime_ns <= entry.changed_ns


def _is_same(status: os.stat_result, entry: Entry) -> bool:
    return status.st_size == entry.bytes and status.st_mtime_ns == entry.changed_ns


def _read_entry(content: bytes, what: object) -> Entry:
    try:
        return Entry.model_validate_json(content)
    except ValidationError as error:
        raise CorruptCheckpoint(f"What the shared storage says of {what} cannot be read.") from error


def _read_tree(content: bytes, directory: Path) -> dict[str, Entry]:
    try:
        return _Tree.model_validate_json(content).root
    except ValidationError as error:
        raise CorruptCheckpoint(f"What the shared storage says of {directory} cannot be read.") from error
