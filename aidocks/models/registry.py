"""The registry: one directory per model, with a manifest. Publication is a rename: all or nothing."""

from __future__ import annotations

import errno
import os
import shutil
import time
import uuid
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from aidocks.checkpoints.files import UNFINISHED, hash_file, locked, sync_directory, sync_file, write_text
from aidocks.checkpoints.hashes import FileHashes
from aidocks.errors import CorruptCheckpoint, NameTaken, NotFound, PathNotAllowed, UnknownModel
from aidocks.models.card import CARD_FILE, card, read_license
from aidocks.models.manifest import IMPORT, MANIFEST_FILE, Manifest, ManifestFile, ModelInfo, Parent
from aidocks.models.names import close_names, is_model_name, refuse_tricks, shorten
from aidocks.storage import shared

if TYPE_CHECKING:
    from aidocks.storage.models import SharedModels

__all__ = ["MANIFEST_FILE", "Manifest", "ManifestFile", "ModelInfo", "Parent", "Registry"]

_TRASH = ".trash"
_STAGING = ".staging"
_STALE_S = 24 * 3600.0


class Registry:
    """The models of this installation: what is in its directory or, where storage is shared, what the storage has.

    Args:
        models_dir: One sub-directory per model; made when something is published.
        cache_dir: Where hashes of weight files are kept. Default: ``cache`` beside ``models_dir``.
    """

    def __init__(self, models_dir: Path, cache_dir: Path | None = None) -> None:
        self._models_dir = models_dir.absolute()
        self._cache_dir = cache_dir or self._models_dir.parent / "cache"
        self._shared: SharedModels | None = None
        here = shared(self._models_dir)
        if here is not None:
            from aidocks.storage.models import SharedModels

            self._shared = SharedModels(here, self._models_dir)

    def names(self) -> list[str]:
        """Return the names of all models, sorted; those that another node just published, a moment later."""
        if self._shared is not None:
            return self._shared.names()
        try:
            found = [entry.name for entry in os.scandir(self._models_dir) if is_model_name(entry.name)]
        except FileNotFoundError:
            return []
        return sorted(name for name in found if os.path.isfile(self._models_dir / name / MANIFEST_FILE))

    def list(self) -> list[ModelInfo]:
        """Return all models by name, without those whose manifest cannot be read (``get`` tells why)."""
        found = []
        for name in self.names():
            with suppress(CorruptCheckpoint, NotFound):
                found.append(self.get(name))
        return found

    def get(self, name: str) -> ModelInfo:
        """Return one model's row.

        Raises:
            UnknownModel: Listing similar names.
            CorruptCheckpoint: The directory is there, but its manifest is not or cannot be read.
        """
        manifest = self.manifest(name)
        return ModelInfo(
            name=name,
            path=self._models_dir / name,
            bytes=manifest.bytes,
            created_at=manifest.created_at,
            operation=manifest.operation,
            architecture=manifest.architecture,
            dtype=manifest.dtype,
            parameters=manifest.parameters,
        )

    def manifest(self, name: str) -> Manifest:
        """Return what is known of a model. Raises as :meth:`get` does."""
        path = self.path(name) / MANIFEST_FILE
        try:
            return Manifest.model_validate_json(self._document(path, name))
        except (OSError, ValidationError) as error:
            flaw = "is missing" if isinstance(error, FileNotFoundError) else "cannot be read"
            raise CorruptCheckpoint(
                f"The manifest {MANIFEST_FILE} of the model {name!r} {flaw}.",
                value=name,
                hint=f"Remove the model (aidocks models delete {name}), and make or import it again.",
            ) from error

    def path(self, name: str) -> Path:
        """Return a model's directory. Where storage is shared, its files need not be there: see :meth:`bring`.

        Raises:
            UnknownModel: Listing similar names.
        """
        if not is_model_name(name) or not self._has(name):
            raise UnknownModel(
                f"The registry holds no model called {shorten(name)!r}.",
                value=shorten(name),
                hint=close_names(name, self.names()),
            )
        return self._models_dir / name

    def bring(self, name: str) -> Path:
        """Return a model's directory with all its files in it.

        Raises:
            UnknownModel: Listing similar names.
            CorruptCheckpoint, InsufficientDisk, ServiceUnreachable: They cannot be brought from the storage.
        """
        path = self.path(name)
        return path if self._shared is None else self._shared.bring(name)

    def exists(self, name: str) -> bool:
        """Tell whether the name is occupied (also by a model whose manifest is damaged)."""
        if self._shared is not None:
            return self._shared.exists(name)
        return is_model_name(name) and os.path.lexists(self._models_dir / name)

    def file(self, name: str, relative: str) -> Path:
        """Return one file inside a model's directory, by its path relative to it.

        Raises:
            UnknownModel: There is no such model.
            PathNotAllowed: The path leads, or tries to lead, outside.
            NotFound: The model has no such file.
        """
        root = self.path(name)
        refuse_tricks(relative)
        if relative.startswith(("/", "~")):
            raise PathNotAllowed(
                f"{relative!r} is not relative to the model's directory.",
                value=relative,
                hint="Leave out the '/'.",
            )
        if self._shared is not None:
            self._shared.bring_file(name, relative)
        found = Path(os.path.realpath(root / relative))
        if not found.is_relative_to(os.path.realpath(root)):
            raise PathNotAllowed(f"{relative!r} leads outside the model's directory.", value=relative)
        hidden = any(part.startswith(".") for part in relative.split("/"))
        if hidden or UNFINISHED in relative or not found.is_file():
            raise NotFound(f"The model {name!r} has no file {relative!r}.", value=relative)
        return found

    def publish(self, staged: Path, manifest: Manifest) -> Path:
        """Make a staged directory the model ``manifest.name``: all of it at once, or nothing.

        The model card is written, the manifest completed (every file with size and hash) and written, all of
        it synced, and the directory renamed. Called again by the same job, after a crash for instance, it
        returns the model that is there.

        Args:
            staged: Directory with the finished files; afterwards it is gone.
            manifest: What is known of the model. ``files`` may leave out any file, which is hashed then.

        Returns:
            The model's directory.

        Raises:
            NameTaken: The name belongs to a model that another job made.
        """
        name = manifest.name
        if not is_model_name(name):
            raise PathNotAllowed(f"{shorten(name)!r} cannot name a model.", value=shorten(name))
        target = self._models_dir / name
        if self._is_made_by(name, manifest.job_id):
            return target
        if self.exists(name):
            raise _taken(name)
        self._models_dir.mkdir(parents=True, exist_ok=True)
        try:
            with locked(staged):
                if self._is_made_by(name, manifest.job_id):
                    return target
                if self._shared is not None:
                    return self._share(staged, manifest, self._shared)
                finished = self._finish(staged, manifest)
                self._rename(staged, target)
        except OSError as error:
            if self._is_made_by(name, manifest.job_id):
                return target  # another attempt at the same job was faster
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise _taken(name) from error
            raise
        FileHashes(self._cache_dir).remember({target / file.path: file.sha256 for file in finished.files})
        return target

    def import_checkpoint(
        self,
        name: str,
        source: Path,
        *,
        copy: bool = True,
        parents: tuple[Parent, ...] = (),
        code: bool = False,
    ) -> ModelInfo:
        """Take a checkpoint directory into the registry: its weights, configuration and tokenizer. Or an adapter's.

        Args:
            name: Registry name that it gets.
            source: The directory.
            copy: Copy the files. Otherwise they are linked where the file system can do so (hard links: the
                source must not be changed in place afterwards), and copied where it cannot.
            parents: Where the model comes from. Default: the directory itself.
            code: Whether Python code of the model's own comes along: an admin allows it for this name
                (`Settings.remote_code_models`). Otherwise it is left behind.

        Raises:
            NameTaken: The registry holds a model of that name.
            UnknownModel, UnsafeCheckpoint, CorruptCheckpoint: The source is not a sound checkpoint.
        """
        from aidocks.models.importing import import_manifest

        if not is_model_name(name):
            raise PathNotAllowed(f"{shorten(name)!r} cannot name a model.", value=shorten(name))
        if self.exists(name):
            raise _taken(name)
        staged = self._models_dir / _STAGING / uuid.uuid4().hex
        try:
            manifest = import_manifest(name, source, staged, copy=copy, parents=parents, code=code)
            self.publish(staged, manifest)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        return self.get(name)

    def delete(self, name: str) -> None:
        """Remove a model: out of sight at once, then from the disk.

        Raises:
            UnknownModel: There is no such model.
        """
        path = self.path(name)
        if self._shared is not None:
            self._shared.delete(name)
            return
        trash = self._models_dir / _TRASH / uuid.uuid4().hex
        trash.parent.mkdir(exist_ok=True)
        try:
            os.rename(path, trash)
        except FileNotFoundError:
            return  # somebody else was faster
        sync_directory(self._models_dir)
        remove_tree(trash)

    def sweep_trash(self) -> None:
        """Remove what deletions and imports that were killed have left behind."""
        if self._shared is not None:
            self._shared.sweep()
        for leftover in _entries(self._models_dir / _TRASH):
            remove_tree(leftover)
        for leftover in _entries(self._models_dir / _STAGING):
            with suppress(FileNotFoundError):
                if time.time() - leftover.stat().st_mtime > _STALE_S:
                    remove_tree(leftover)

    def _has(self, name: str) -> bool:
        if self._shared is not None:
            return self._shared.manifest(name) is not None
        return (self._models_dir / name).is_dir()

    def _document(self, path: Path, name: str) -> bytes:
        """Return a manifest as it is stored."""
        document = path.read_bytes() if self._shared is None else self._shared.manifest(name)
        if document is None:
            raise FileNotFoundError(path)
        return document

    def _share(self, staged: Path, manifest: Manifest, models: SharedModels) -> Path:
        """Publish a staged directory for all nodes, whatever of it other nodes have written. Raises as ``publish``."""
        name = manifest.name
        models.require_room_for(name)
        away = models.known_files(staged, {file.path for file in manifest.files})
        finished = self._finish(staged, manifest, away)
        document = (staged / MANIFEST_FILE).read_bytes()
        if models.publish(staged, finished, document):
            models.adopt(staged, finished, document)
        elif not self._is_made_by(name, manifest.job_id):
            raise _taken(name)
        return self._models_dir / name

    def _is_made_by(self, name: str, job_id: str) -> bool:
        if self._shared is not None:
            self._shared.manifest(name, fresh=True)
        try:
            return self.manifest(name).job_id == job_id
        except (CorruptCheckpoint, UnknownModel):
            return False

    def _finish(self, staged: Path, manifest: Manifest, away: Collection[str] = ()) -> Manifest:
        """Write card and manifest into a staged directory, and sync all of it but for files that are ``away``."""
        for leftover in [path for path in staged.rglob(f"*{UNFINISHED}*") if path.is_file()]:
            leftover.unlink()
        for ours in (CARD_FILE, MANIFEST_FILE):
            (staged / ours).unlink(missing_ok=True)
        if manifest.operation != IMPORT:
            parents = tuple(self._with_license(parent) for parent in manifest.parents)
            manifest = manifest.model_copy(update={"parents": parents})
        manifest = _complete(staged, manifest, away)
        write_text(staged / CARD_FILE, card(manifest))
        complete = _complete(staged, manifest, away)
        for file in complete.files:
            if file.path not in away:
                sync_file(staged / file.path)
        for directory in [path for path in staged.rglob("*") if path.is_dir()]:
            sync_directory(directory)
        write_text(staged / MANIFEST_FILE, complete.model_dump_json(indent=2) + "\n")
        return complete

    def _with_license(self, parent: Parent) -> Parent:
        """Take the licence of a parent in the registry from its card."""
        if parent.license is not None or not is_model_name(parent.reference):
            return parent
        if self._shared is not None:
            self._shared.bring_file(parent.reference, CARD_FILE)
        return parent.model_copy(update={"license": read_license(self._models_dir / parent.reference)})

    def _rename(self, staged: Path, target: Path) -> None:
        try:
            os.rename(staged, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            # The workspace is on another disk: bring the files over first, then rename.
            near = self._models_dir / _STAGING / uuid.uuid4().hex
            try:
                shutil.copytree(staged, near)
                for path in near.rglob("*"):
                    sync_file(path)
                os.rename(near, target)
            finally:
                shutil.rmtree(near, ignore_errors=True)
            remove_tree(staged)
        sync_directory(self._models_dir)
        with suppress(OSError):
            sync_directory(staged.parent)


def _complete(staged: Path, manifest: Manifest, away: Collection[str] = ()) -> Manifest:
    """List every staged file in the manifest; what is listed already must be there as described, or ``away``."""
    described = {file.path: file for file in manifest.files if file.path not in (CARD_FILE, MANIFEST_FILE)}
    present = {path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file()}
    away = set(away) & set(described) - present
    lost = sorted(set(described) - present - away)
    assert not lost, f"described, but not staged: {', '.join(lost)}"
    files = []
    for relative in sorted(present | away):
        file = described.get(relative)
        if file is not None and relative in away:
            files.append(file)
            continue
        size = (staged / relative).stat().st_size
        if file is None:
            file = ManifestFile(path=relative, bytes=size, sha256=hash_file(staged / relative))
        assert file.bytes == size, f"{relative} has {size} bytes, not {file.bytes} as described"
        files.append(file)
    return manifest.model_copy(update={"files": tuple(files), "bytes": sum(file.bytes for file in files)})


def _taken(name: str) -> NameTaken:
    return NameTaken(
        f"The registry already holds a model called {name!r}.",
        value=name,
        hint=f"Choose another name, or remove it: aidocks models delete {name}.",
    )


def _entries(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def remove_tree(path: Path) -> None:
    """Delete a directory, or the link in its place; somebody else may be deleting it too."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)
