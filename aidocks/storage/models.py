"""The registry's models where nodes share no file system: manifests in a catalogue, files on demand.

The directory of a model on a node is a cache. What this node knows of it stands beside the models in ``.brought``:
of which manifest it is, and whether all its files are here. A directory of which nothing stands there is of a time
before the storage was shared, and is never touched.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from aidocks.checkpoints.files import UNFINISHED, write_bytes, write_text
from aidocks.errors import Conflict, CorruptCheckpoint, NotFound
from aidocks.models.manifest import MANIFEST_FILE, Manifest, ManifestFile
from aidocks.models.names import is_model_name
from aidocks.storage.files import Entry, SharedFiles
from aidocks.storage.keys import key_of
from aidocks.storage.sweep import sweep_now_and_then

#: One that was used within this time stays, however short the disk is: whoever asked for it reads it about now.
_STAYS_S = 600.0
#: Room that is left on the disk beside what is brought.
_BESIDE_BYTES = 256 << 20
_BROUGHT, _TRASH = ".brought", ".trash"


class _Brought(BaseModel):
    model_config = ConfigDict(frozen=True)

    manifest: str
    whole: bool


class SharedModels:
    """The models of an installation, as this node sees them.

    Args:
        here: What is shared.
        models_dir: Where they are on this node.
    """

    def __init__(self, here: SharedFiles, models_dir: Path) -> None:
        self._here = here
        self._dir = models_dir

    def names(self) -> list[str]:
        """Return all names, sorted; as they were a moment ago."""
        return self._here.models.names()

    def exists(self, name: str) -> bool:
        """Tell whether a model of this name is published, now."""
        return is_model_name(name) and self._here.models.read(name, fresh=True) is not None

    def manifest(self, name: str, *, fresh: bool = False) -> bytes | None:
        """Return a model's manifest; None where there is no such model."""
        return self._here.models.read(name, fresh=fresh)

    def sizes(self, name: str) -> dict[Path, int]:
        """Return the bytes of each file of a model, wherever it is; of none, where there is no such model."""
        content = self._here.models.read(name) if is_model_name(name) else None
        files = () if content is None else _read(content, name).files
        return {self._dir / name / file.path: file.bytes for file in files}

    def in_use(self, name: str) -> AbstractContextManager[bool]:
        """Keep a model on this node until the block ends, however short the disk is."""
        return self._here.hold(self._dir / name / "used", together=True)

    def bring(self, name: str) -> Path:
        """Return a model's directory, with all its files, which are brought where they are not here.

        Raises:
            NotFound: There is no such model.
            CorruptCheckpoint: Its manifest, or a file, is damaged or gone.
            Conflict: A model of that name, which is not shared, is in the way.
            InsufficientDisk: It does not fit on this node.
            ServiceUnreachable: The storage does not answer.
        """
        target = self._dir / name
        with self._here.hold(target):
            # As it is now: of two that wait here the later one must not bring an older one back.
            content = self._here.models.read(name, fresh=True)
            if content is None:
                raise NotFound(f"There is no model {name!r} in the shared storage.", value=name)
            known = self._claim(name, _digest(content))
            files = _read(content, name).files
            if not known.whole or not all(_has(target / file.path, file) for file in files):
                self._make_room(name, sum(file.bytes for file in files if not _has(target / file.path, file)))
                for left in target.rglob(f"*{UNFINISHED}*"):
                    left.unlink()  # of a process that was killed: whoever writes here holds the model
                for file in files:
                    self._bring_file(target, file)
                write_bytes(target / MANIFEST_FILE, content)
                self._note(name, _Brought(manifest=known.manifest, whole=True))
            os.utime(self._noted(name))
        return target

    def bring_file(self, name: str, relative: str) -> None:
        """Bring one file of a model, if the model has it. Raises as :meth:`bring` does."""
        with self._here.hold(self._dir / name):
            content = self._here.models.read(name, fresh=True)
            if content is None:
                return
            known = self._claim(name, _digest(content))
            if relative == MANIFEST_FILE and not known.whole:
                write_bytes(self._dir / name / MANIFEST_FILE, content)
            for file in _read(content, name).files:
                if file.path == relative:
                    self._bring_file(self._dir / name, file)

    def require_room_for(self, name: str) -> None:
        """Refuse a name whose directory on this node has a model that is not shared.

        Raises:
            Conflict: It has.
        """
        if os.path.lexists(self._dir / name) and self._known(name) is None:
            raise Conflict(
                f"{self._dir / name} has a model that was made before the storage was shared.",
                value=name,
                hint="Move it away and import it: aidocks models import.",
            )

    def publish(self, staged: Path, manifest: Manifest, document: bytes) -> bool:
        """Share a finished model, its files first, its manifest last; return whether the name was free.

        Args:
            staged: Directory of its files, as far as they are on this node; the others were kept by other nodes.
            manifest: With all files.
            document: The manifest, as it is stored.

        Raises:
            CorruptCheckpoint: A file is neither here nor in the storage, or has another content.
            ServiceUnreachable: The storage does not answer.
        """
        for file in manifest.files:
            if (staged / file.path).is_file():
                self._here.put(staged / file.path, file.sha256)
            elif not self._here.has(file.sha256, file.bytes):
                raise CorruptCheckpoint(
                    f"{file.path} of the model {manifest.name!r} is neither on this node nor in the shared storage.",
                    value=file.path,
                )
        return self._here.models.create(manifest.name, document)

    def adopt(self, staged: Path, manifest: Manifest, document: bytes) -> None:
        """Make the staged directory of a model that was just published this node's copy of it."""
        target = self._dir / manifest.name
        with self._here.hold(target):
            whole = all(_has(staged / file.path, file) for file in manifest.files)
            if os.path.lexists(target):
                known = self._known(manifest.name)
                if known is None or known.manifest == _digest(document):
                    return  # somebody has asked for it already, and is bringing it
                self._drop(manifest.name)
            self._dir.mkdir(parents=True, exist_ok=True)
            # Said before it is so: until all is here, it is brought.
            self._note(manifest.name, _Brought(manifest=_digest(document), whole=False))
            try:
                os.rename(staged, target)
            except OSError:
                return  # on another disk: it is brought when it is asked for
            if whole:
                self._note(manifest.name, _Brought(manifest=_digest(document), whole=True))

    def delete(self, name: str) -> None:
        """Remove a model: out of sight of all nodes at once, then from this one."""
        self._here.models.remove(name)
        with self._here.hold(self._dir / name):
            if self._known(name) is not None:
                self._drop(name)

    def sweep(self) -> None:
        """Remove, now and then, what nobody needs any more, in the storage and on this node."""
        sweep_now_and_then(self._here, contents=True)

    def known_files(self, staged: Path, described: set[str]) -> set[str]:
        """Bring what other nodes have written into a staged directory, but for what is described already.

        Returns:
            Relative paths of the files that are described and not on this node.
        """
        entries = self._here.entries(staged)
        missing = {path: entry for path, entry in entries.items() if not path.exists()}
        away = {path for path in missing if path.relative_to(staged).as_posix() in described}
        self._here.bring({path: entry for path, entry in missing.items() if path not in away})
        return {path.relative_to(staged).as_posix() for path in away}

    def _claim(self, name: str, digest: str) -> _Brought:
        """Return what is known of this node's copy, after a copy of another model of that name is gone."""
        known = self._known(name)
        if known is not None and known.manifest == digest:
            return known
        if known is not None:
            self._drop(name)
        self.require_room_for(name)
        claimed = _Brought(manifest=digest, whole=False)
        self._note(name, claimed)
        return claimed

    def _bring_file(self, target: Path, file: ManifestFile) -> None:
        path = target / file.path
        key_of(path, target)  # as in the manifest, which a store could have changed
        if not _has(path, file):
            self._here.fetch(Entry(bytes=file.bytes, sha256=file.sha256), path)

    def _make_room(self, name: str, wanted: int) -> None:
        """Remove models that nobody uses, the one used longest ago first, until what is wanted would fit."""
        self._dir.mkdir(parents=True, exist_ok=True)
        for other in self._by_last_use():
            if shutil.disk_usage(self._dir).free >= wanted + _BESIDE_BYTES:
                return
            if other == name:
                continue
            with self._here.hold(self._dir / other / "used", wait=False) as unused:
                if not unused:
                    continue
                with self._here.hold(self._dir / other, wait=False) as free:
                    if free:
                        self._drop(other)

    def _by_last_use(self) -> Iterator[str]:
        found = []
        with suppress(FileNotFoundError):
            for entry in os.scandir(self._dir / _BROUGHT):
                if UNFINISHED not in entry.name and time.time() - entry.stat().st_mtime > _STAYS_S:
                    found.append((entry.stat().st_mtime, entry.name.removesuffix(".json")))
        yield from (name for _, name in sorted(found) if is_model_name(name))

    def _drop(self, name: str) -> None:
        """Remove this node's copy; what is known of it goes last, as without that nobody would touch it."""
        trash = self._dir / _TRASH / uuid.uuid4().hex
        trash.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            os.rename(self._dir / name, trash)
        self._noted(name).unlink(missing_ok=True)
        shutil.rmtree(trash, ignore_errors=True)

    def _known(self, name: str) -> _Brought | None:
        try:
            return _Brought.model_validate_json(self._noted(name).read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def _note(self, name: str, known: _Brought) -> None:
        write_text(self._noted(name), known.model_dump_json())

    def _noted(self, name: str) -> Path:
        return self._dir / _BROUGHT / f"{name}.json"


def _digest(document: bytes) -> str:
    return hashlib.sha256(document).hexdigest()


def _has(path: Path, file: ManifestFile) -> bool:
    try:
        return path.stat().st_size == file.bytes
    except OSError:
        return False


def _read(document: bytes, name: str) -> Manifest:
    try:
        return Manifest.model_validate_json(document)
    except ValidationError as error:
        raise CorruptCheckpoint(f"The manifest of the model {name!r} cannot be read.", value=name) from error
