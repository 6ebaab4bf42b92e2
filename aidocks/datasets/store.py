"""Stored data sets: one directory each, with the file and what is known of it. A rename publishes: all or nothing."""

from __future__ import annotations

import difflib
import errno
import json
import os
import re
import secrets
import shutil
import time
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from aidocks.checkpoints.files import locked, sync_directory, write_text
from aidocks.checkpoints.space import format_bytes
from aidocks.datasets.stored import DATASET_FILE, StoredDataset, data_bytes, entries, last_written
from aidocks.datasets.upload import StagedUpload, checked_filename, data_file
from aidocks.errors import BodyTooLarge, InsufficientDisk, InvalidSpec, NameTaken, NotFound
from aidocks.models.names import is_model_name, shorten
from aidocks.storage import shared

if TYPE_CHECKING:
    from aidocks.settings import Settings

__all__ = ["DATASET_FILE", "FILE_ID", "RESERVED_ID", "DatasetStore", "StoredDataset", "Upload"]

FILE_ID = re.compile(r"file-[0-9a-f]{24}")
_STAGING, _TRASH = ".staging", ".trash"
#: An upload that has written nothing for so long is nobody's any more.
_STALE_S = 3600.0
#: How often an upload looks whether the others have left room for it.
_LOOK_BYTES = 64 << 20
#: `file-` and so many zeros begin the ids of files that are made when they are asked for (see serve/routes/openai).
RESERVED_ID = "file-00000"


class DatasetStore:
    """The data sets of this installation.

    Args:
        datasets_dir: One sub-directory per data set; made when one is added.
        max_upload_bytes: Largest file; None for any.
        max_datasets_bytes: Most that all files may have together; None for any.
    """

    def __init__(
        self,
        datasets_dir: Path,
        max_upload_bytes: int | None = None,
        max_datasets_bytes: int | None = None,
    ) -> None:
        self._dir = datasets_dir.absolute()
        self._shared = shared(self._dir)
        self._max_upload = max_upload_bytes
        self._max_total = max_datasets_bytes

    @classmethod
    def of(cls, settings: Settings) -> DatasetStore:
        """Return the store of an installation, with its limits."""
        return cls(settings.datasets_dir, settings.max_upload_bytes, settings.max_datasets_bytes)

    @property
    def staging(self) -> Path:
        """Directory of the files on their way, in a sub-directory each that has the id as its name."""
        return self._dir / _STAGING

    def names(self) -> list[str]:
        """Return the names of all data sets, sorted."""
        if self._shared is not None:
            return self._shared.datasets.names()
        try:
            found = [entry.name for entry in os.scandir(self._dir) if is_model_name(entry.name)]
        except FileNotFoundError:
            return []
        return sorted(name for name in found if (self._dir / name / DATASET_FILE).is_file())

    def all(self) -> list[StoredDataset]:
        """Return all data sets, newest first, without those whose description cannot be read."""
        found = [dataset for name in self.names() if (dataset := self._read(name)) is not None]
        return sorted(found, key=lambda dataset: (dataset.created_at, dataset.id), reverse=True)

    def get(self, reference: str) -> StoredDataset:
        """Return one data set by name or id.

        Raises:
            NotFound: Listing similar names.
        """
        found = self.resolve(reference)
        if found is None:
            raise NotFound(
                f"There is no data set called {shorten(reference)!r}.",
                value=shorten(reference),
                hint=self._instead_of(reference),
            )
        return found

    def resolve(self, reference: str) -> StoredDataset | None:
        """Return the data set that a reference names, by name or by ``file-`` id; None when it names none."""
        if not is_model_name(reference):
            return None
        found = self._read(reference)
        if found is None and FILE_ID.fullmatch(reference):
            return next((dataset for dataset in self.all() if dataset.id == reference), None)
        return found

    def fetch(self, reference: str) -> StoredDataset:
        """Return one data set by name or id, after its file is on this node.

        Raises:
            NotFound: Listing similar names.
            CorruptCheckpoint, InsufficientDisk, ServiceUnreachable: It cannot be brought from the shared storage.
        """
        return self.bring(self.get(reference))

    def bring(self, dataset: StoredDataset) -> StoredDataset:
        """Bring a data set's file to this node, where storage is shared. Raises as :meth:`fetch` does."""
        if self._shared is not None:
            from aidocks.storage.datasets import bring_dataset

            bring_dataset(self._shared, dataset.name)
        return dataset

    def begin(self, filename: str, name: str | None = None, announced: int | None = None) -> Upload:
        """Begin to store a file; the caller writes it, and publishes or discards it.

        Args:
            filename: Its name where it comes from. Its ending says what it is; it never becomes a path.
            name: Name that the data set gets. Default: its id.
            announced: Bytes that are to come, when that is known.

        Raises:
            InvalidSpec: A name that cannot be one, or an ending of no known format.
            NameTaken: There is a data set of this name.
            BodyTooLarge: It is larger than files may be.
            InsufficientDisk: All together would be larger than they may be.
        """
        filename = checked_filename(filename)
        if name is not None:
            self.require_free(name)
        self.sweep()
        return Upload(self, name, filename, self.room(announced or 0))

    def add(self, source: Path, name: str) -> StoredDataset:
        """Copy a file of this machine. Raises as :meth:`begin` does, and ``OSError`` when it cannot be read."""
        with source.open("rb") as stream:
            upload = self.begin(source.name, name, os.fstat(stream.fileno()).st_size)
            try:
                while chunk := stream.read(4 << 20):
                    upload.write(chunk)
                return upload.publish()
            finally:
                upload.discard()

    def delete(self, reference: str) -> StoredDataset:
        """Remove a data set: out of sight at once, then from the disk.

        Raises:
            NotFound: There is none of this name or id.
        """
        dataset = self.get(reference)
        if self._shared is not None:
            from aidocks.storage.datasets import delete_dataset

            delete_dataset(self._shared, dataset.name)
            return dataset
        trash = self._dir / _TRASH / uuid.uuid4().hex
        trash.parent.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # somebody else was faster
            os.rename(self._dir / dataset.name, trash)
            sync_directory(self._dir)
            shutil.rmtree(trash, ignore_errors=True)
        return dataset

    def sweep(self) -> None:
        """Remove what deletions and uploads that were killed have left behind."""
        for leftover in entries(self._dir / _TRASH):
            shutil.rmtree(leftover, ignore_errors=True)
        for leftover in entries(self.staging):
            if time.time() - last_written(leftover) > _STALE_S:
                shutil.rmtree(leftover, ignore_errors=True)

    def _read(self, name: str) -> StoredDataset | None:
        directory = self._dir / name
        # A link could lead to any file of the service's user.
        if directory.is_symlink():
            return None
        try:
            described = json.loads(self._description(name))
            path = directory / data_file(described["filename"])
            found = StoredDataset.model_validate(described | {"name": name, "path": path})
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None
        if self._shared is not None:
            return found
        return found if path.is_file() and not path.is_symlink() else None

    def _description(self, name: str) -> bytes:
        if self._shared is None:
            return (self._dir / name / DATASET_FILE).read_bytes()
        described = self._shared.datasets.read(name)
        if described is None:
            raise FileNotFoundError(name)
        return described

    def _published_bytes(self) -> int:
        if self._shared is not None:
            return sum(dataset.bytes for dataset in self.all())
        return sum(data_bytes(self._dir / name) for name in self.names())

    def _is_taken(self, name: str) -> bool:
        if self._shared is not None:
            return self._shared.datasets.read(name, fresh=True) is not None
        return os.path.lexists(self._dir / name)

    def _instead_of(self, reference: str) -> str:
        names = self.names()
        if not names:
            return "None is stored; upload one with: aidocks datasets upload FILE."
        close = difflib.get_close_matches(reference, names, n=5, cutoff=0.5)
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        return f"Did you mean {', '.join(close)}?" if close else f"Stored are {', '.join(names[:10])}{more}."

    def require_free(self, name: str) -> None:
        """Refuse a name that no new data set can have.

        Raises:
            InvalidSpec: It cannot name one.
            NameTaken: One has it.
        """
        if not is_model_name(name) or FILE_ID.fullmatch(name):
            raise InvalidSpec(
                f"{shorten(name)!r} cannot name a data set.",
                field="name",
                value=shorten(name),
                hint="Use letters, digits, '.', '_' and '-', at most 96; ids (`file-…`) are given, not chosen.",
            )
        if self._is_taken(name):
            raise NameTaken(
                f"There is a data set called {name!r} already.",
                field="name",
                value=name,
                hint=f"Choose another name, or remove it: aidocks datasets delete {name}.",
            )

    def room(self, wanted: int, *, apart_from: Path | None = None, published: bool = False) -> int | None:
        """Return the bytes that a new file may have, None for any number.

        Args:
            wanted: Bytes that it has already, or is announced to have.
            apart_from: Directory that does not count: its own.
            published: Whether files on their way do not count. Else two that are too much together would stop
                each other in the end.

        Raises:
            BodyTooLarge, InsufficientDisk: ``wanted`` is more.
        """
        if self._max_upload is not None and wanted > self._max_upload:
            raise BodyTooLarge(
                f"The file is larger than {format_bytes(self._max_upload)}.",
                field="file",
                hint="Split it, or raise AIDOCKS_MAX_UPLOAD_BYTES where the service runs.",
            )
        if self._max_total is None:
            return self._max_upload
        used = self._published_bytes()
        if not published:
            used += sum(data_bytes(place) for place in entries(self.staging) if place != apart_from)
        left = self._max_total - used
        if wanted > left or left <= 0:
            raise InsufficientDisk(
                f"All data sets together may have {format_bytes(self._max_total)}; "
                f"{format_bytes(max(left, 0))} of them are free.",
                value=self._max_total,
                hint="Delete data sets, or raise AIDOCKS_MAX_DATASETS_BYTES where the service runs.",
            )
        return left if self._max_upload is None else min(left, self._max_upload)


class Upload:
    """A file on its way into the store. Nobody sees it before :meth:`publish`; see :meth:`DatasetStore.begin`.

    Args:
        store: Where it is to be.
        name: Name that it gets. None: its id.
        filename: Its name where it comes from.
        room: Bytes that it may have; None for any number.
        begun: Id of one of which all is there already.
    """

    def __init__(
        self,
        store: DatasetStore,
        name: str | None,
        filename: str,
        room: int | None,
        *,
        begun: str | None = None,
    ) -> None:
        self.id = begun or _new_id()
        self._store = store
        self._name = name or self.id
        self._filename = filename
        self._room = room
        self._next_look = _LOOK_BYTES
        self._directory = store.staging / self.id
        self._directory.mkdir(parents=True, exist_ok=begun is not None)
        path = self._directory / data_file(filename)
        self._file = StagedUpload(path, filename, written=begun is not None)

    def write(self, chunk: bytes | memoryview) -> None:
        """Store the next bytes.

        Raises:
            InvalidSpec: They are not of the kind that the file's ending promises.
            BodyTooLarge, InsufficientDisk: There is no room for them.
        """
        size = self._file.size + len(chunk)
        if self._room is not None and (size > self._room or size > self._next_look):
            self._next_look = size + _LOOK_BYTES
            self._room = self._store.room(size, apart_from=self._directory)
        self._file.write(chunk)

    def publish(self, purpose: str = "fine-tune") -> StoredDataset:
        """Make the file a data set, durably.

        Raises:
            InvalidSpec: It is empty, or not what its ending promises.
            NameTaken: Somebody else took the name in the meantime.
            InsufficientDisk: Somebody else took the room in the meantime.
        """
        store, target = self._store, self._store._dir / self._name
        sha256, rows = self._file.finish()
        described = StoredDataset(
            id=self.id,
            name=self._name,
            filename=self._filename,
            bytes=self._file.size,
            sha256=sha256,
            created_at=datetime.now(UTC),
            purpose=purpose,
            rows=rows,
            path=target / data_file(self._filename),
        )
        facts = described.model_dump_json(indent=2, exclude={"path"})
        write_text(self._directory / DATASET_FILE, facts + "\n")
        with locked(store._dir):
            if self._name != self.id:
                store.require_free(self._name)
            store.room(self._file.size, published=True)
            if not self._place(target):
                raise NameTaken(f"There is a data set called {self._name!r} already.", field="name")
            sync_directory(store._dir)
        return described

    def _place(self, target: Path) -> bool:
        """Make the directory what has its name, for all nodes where storage is shared; return whether that was free."""
        if self._store._shared is not None:
            from aidocks.storage.datasets import publish_dataset

            return publish_dataset(self._store._shared, self._directory, self._name)
        try:
            os.rename(self._directory, target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            return False
        return True

    def close(self) -> None:
        """Leave what is there to somebody who goes on with it."""
        self._file.close()

    def discard(self) -> None:
        """Remove what was not published."""
        self.close()
        shutil.rmtree(self._directory, ignore_errors=True)


def _new_id() -> str:
    while (made := f"file-{secrets.token_hex(12)}").startswith(RESERVED_ID):
        pass
    return made
