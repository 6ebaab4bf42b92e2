"""Files that come in parts, each on the disk before it is acknowledged.

Who sends them waits for that, so nothing piles up in memory between, however many servers pass it on; and because all
that is known stands on the disk, any replica takes any part, and a part that was lost or cut off is sent again.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aidocks.checkpoints.files import locked, write_text
from aidocks.datasets.store import FILE_ID, DatasetStore, StoredDataset, Upload
from aidocks.datasets.upload import checked_filename, data_file, explaining_full_disk
from aidocks.errors import Conflict, InvalidSpec, NotFound
from aidocks.models.names import shorten

#: What a part may have; what any request may have.
PART_BYTES = 1_000_000
_ABOUT = "upload.json"


class PartedUpload(BaseModel):
    """A file that comes in parts."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str = Field(description="Id that the data set will have.")
    name: str | None = Field(None, description="Name that it will have. None: its id.")
    filename: str
    bytes: int = Field(ge=0, description="What the whole file has.")
    part_bytes: int = Field(PART_BYTES, description="Most that one part may have.")


class PartedUploads:
    """The files that come in parts into a store."""

    def __init__(self, store: DatasetStore) -> None:
        self._store = store

    def begin(self, filename: str, name: str | None, size: int) -> PartedUpload:
        """Begin a file of so many bytes. Raises as :meth:`DatasetStore.begin` does."""
        upload = self._store.begin(filename, name, size)
        try:
            begun = PartedUpload(id=upload.id, name=name, filename=filename, bytes=size)
            write_text(self._store.staging / begun.id / _ABOUT, begun.model_dump_json())
        except BaseException:
            upload.discard()
            raise
        upload.close()
        return begun

    def write(self, upload_id: str, offset: int, part: bytes) -> PartedUpload:
        """Store a part. The same one may come again.

        Raises:
            NotFound: There is no such upload, or it is over.
            Conflict: What comes before the part is not there.
            InvalidSpec: It would reach beyond the end of the file.
            InsufficientDisk: There is no room for it.
        """
        directory, begun = self._begun(upload_id)
        if offset + len(part) > begun.bytes:
            raise InvalidSpec(
                f"The part ends behind the end of the file, which was said to have {begun.bytes:,} bytes.",
                field="offset",
                value=offset,
            )
        try:
            with locked(directory):
                self._write(directory, begun, offset, part)
        except FileNotFoundError:
            raise _unknown(upload_id) from None
        return begun

    def _write(self, directory: Path, begun: PartedUpload, offset: int, part: bytes) -> None:
        path = directory / data_file(begun.filename)
        there = path.stat().st_size
        if offset > there:
            raise Conflict(
                f"Only {there:,} bytes of the file are there.",
                field="offset",
                value=offset,
                hint=f"Go on with the part at {there}.",
            )
        self._store.room(offset + len(part), apart_from=directory)
        with explaining_full_disk(path), path.open("r+b") as stream:
            stream.seek(offset)
            stream.write(part)

    def complete(self, upload_id: str) -> StoredDataset:
        """Make the file a data set; asked again, return it.

        Raises:
            NotFound: There is no such upload.
            InvalidSpec: Not all of it has come, or it is not what its ending promises.
            NameTaken, InsufficientDisk: As :meth:`Upload.publish`.
        """
        try:
            directory, _ = self._begun(upload_id)
            with locked(directory):
                # Again: another request may have been faster.
                directory, begun = self._begun(upload_id)
                return self._publish(directory, begun)
        except (NotFound, FileNotFoundError):
            if FILE_ID.fullmatch(upload_id) and (made := self._store.resolve(upload_id)) is not None:
                return made
            raise _unknown(upload_id) from None

    def _publish(self, directory: Path, begun: PartedUpload) -> StoredDataset:
        there = (directory / data_file(begun.filename)).stat().st_size
        if there != begun.bytes:
            raise InvalidSpec(
                f"Only {there:,} of {begun.bytes:,} bytes have come.",
                field="file",
                hint=f"Go on with the part at {there}.",
            )
        upload = Upload(self._store, begun.name, begun.filename, None, begun=begun.id)
        try:
            made = upload.publish()
        finally:
            upload.close()
        (made.path.parent / _ABOUT).unlink(missing_ok=True)
        return made

    def discard(self, upload_id: str) -> None:
        """Forget an upload that is not to be completed.

        Raises:
            NotFound: There is none.
        """
        directory, _ = self._begun(upload_id)
        shutil.rmtree(directory, ignore_errors=True)

    def _begun(self, upload_id: str) -> tuple[Path, PartedUpload]:
        if not FILE_ID.fullmatch(upload_id):
            raise _unknown(upload_id)
        directory = self._store.staging / upload_id
        try:
            begun = PartedUpload.model_validate_json((directory / _ABOUT).read_bytes())
            if begun.id != upload_id or checked_filename(begun.filename) != begun.filename:
                raise _unknown(upload_id)
        except (OSError, ValidationError, InvalidSpec):
            raise _unknown(upload_id) from None
        return directory, begun


def _unknown(upload_id: str) -> NotFound:
    return NotFound(
        f"There is no upload {shorten(upload_id)!r}.",
        field="upload_id",
        value=shorten(upload_id),
        hint="It was completed or given up, or nothing of it came for an hour. Begin it anew.",
    )
