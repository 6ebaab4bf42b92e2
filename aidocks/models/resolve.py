"""From a model reference to a directory: the only place where text from a request becomes a path."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from aidocks.checkpoints.reader import Checkpoint
from aidocks.errors import AIDocksError, PathNotAllowed, UnknownModel
from aidocks.models.names import close_names, is_model_name, refuse_tricks
from aidocks.models.registry import Registry

_HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9](?:[\w.-]{0,94}\w)?/[A-Za-z0-9](?:[\w.-]{0,94}\w)?)(?:@(?P<revision>[\w][\w./-]{0,199}))?",
    re.ASCII,
)
#: Patterns of what a hub model consists of, and of copies of the same weights in other layouts: whatever lies in
#: sub-directories, but for numbered ones (1_Pooling), which are modules of sentence-transformers.
HUB_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
HUB_DUPLICATES = ("[!0-9]*/*", "*/*/*", "consolidated*.safetensors")
#: Patterns of adapters for tasks, each in a sub-directory of its own.
HUB_TASKS = ("*/adapter_config.json", "*/adapter_model.safetensors")
_FORMS = "Write a registry name, org/name[@revision], or a path below an allowed root ('/…' or './…')."


class ResolvedModel(BaseModel):
    """Where a reference leads."""

    model_config = ConfigDict(frozen=True)

    reference: str
    kind: Literal["registry", "hub", "path"]
    path: Path
    revision: str | None = None


class ModelResolver:
    """Finds the directory that a model reference means.

    Args:
        models_dir: The registry's directory.
        allowed_roots: Directories below which a reference may name a path.
    """

    def __init__(self, models_dir: Path, allowed_roots: Sequence[Path]) -> None:
        self.registry = Registry(models_dir)
        self.allowed_roots = tuple(allowed_roots)

    def resolve(self, reference: str, *, field: str | None = None) -> ResolvedModel:
        """Return where the reference leads, without any network.

        A registry name wins over everything else; a reference that begins with ``/``, ``./`` or ``~`` is a
        path; what has the form ``org/name[@revision]`` is looked up in the local cache of the hub.

        Args:
            reference: As it came in the request.
            field: Path of the spec's field, for the error.

        Raises:
            UnknownModel: Nothing is there; lists similar names.
            PathNotAllowed: A path outside the allowed roots, or a reference that tries to be one.
        """
        refuse_tricks(reference, field)
        if is_path(reference):
            path = allowed_path(reference, self.allowed_roots, field)
            refuse_escaping_links(path, self.allowed_roots, field)
            return ResolvedModel(reference=reference, kind="path", path=path)
        if is_model_name(reference):
            return self._resolve_name(reference, field)
        repo, revision = parse_hub_id(reference, field)
        path_found = cached_snapshot(repo, revision)
        if path_found is None:
            raise UnknownModel(
                f"The hub model {reference!r} is not on this machine.",
                field=field,
                value=reference,
                hint="Download it first; for a directory, write a path that begins with '/' or './'.",
            )
        return ResolvedModel(reference=reference, kind="hub", path=path_found, revision=path_found.name)

    def needs_download(self, reference: str, *, field: str | None = None) -> bool:
        """Tell whether the reference is a hub model that is not, or not completely, in the local cache.

        Raises:
            UnknownModel: It has none of the forms of a reference.
            PathNotAllowed: It tries to be something else.
        """
        refuse_tricks(reference, field)
        if is_path(reference) or is_model_name(reference):
            return False
        return cached_snapshot(*parse_hub_id(reference, field)) is None

    def _resolve_name(self, name: str, field: str | None) -> ResolvedModel:
        if not self.registry.exists(name):
            raise UnknownModel(
                f"The registry holds no model called {name!r}.",
                field=field,
                value=name,
                hint=close_names(name, self.registry.names()),
            )
        self.registry.manifest(name)
        return ResolvedModel(reference=name, kind="registry", path=self.registry.bring(name))

    def open(self, reference: str, *, field: str) -> Checkpoint:
        """Return the checkpoint that a reference means; whatever is wrong with it is said of ``field``.

        Raises:
            UnsafeCheckpoint, CorruptCheckpoint: As :class:`~aidocks.checkpoints.reader.Checkpoint`.
            AIDocksError: As :meth:`resolve`.
        """
        path = self.resolve(reference, field=field).path
        try:
            return Checkpoint(path)
        except AIDocksError as error:
            if error.field is None:
                error.field, error.value = field, reference
            raise


def is_path(reference: str) -> bool:
    """Tell whether a reference has the form of a path."""
    return reference in (".", "~") or reference.startswith(("/", "./", "~"))


def allowed_path(text: str, allowed_roots: Sequence[Path], field: str | None = None) -> Path:
    """Return the real path that ``text`` means, which must exist below one of the roots, links followed.

    Raises:
        PathNotAllowed: It lies outside; the same for paths that exist and paths that do not.
        UnknownModel: It would be allowed, but nothing is there.
    """
    real = path_below(
        text,
        allowed_roots,
        field,
        "Import the model (aidocks models import), or add its directory to AIDOCKS_ALLOWED_ROOTS.",
    )
    if not real.exists():
        raise UnknownModel(f"There is nothing at {text!r}.", field=field, value=text)
    return real


def path_below(text: str, allowed_roots: Sequence[Path], field: str | None, hint: str) -> Path:
    """Return the real path that ``text`` means, which lies below one of the roots, links followed.

    Raises:
        PathNotAllowed: It lies outside, with ``hint`` as what to do instead.
    """
    refuse_tricks(text, field)
    # Only one's own home: "~name" would ask the system's user table, and fail in ways of its own.
    expanded = Path(text).expanduser() if text == "~" or text.startswith("~/") else Path(text)
    real = Path(os.path.realpath(expanded))
    if not any(real.is_relative_to(os.path.realpath(root)) for root in allowed_roots):
        roots = ", ".join(str(root) for root in allowed_roots) or "none are configured"
        raise PathNotAllowed(
            f"{text!r} is not below an allowed root ({roots}).",
            field=field,
            value=text,
            hint=hint,
        )
    return real


def refuse_escaping_links(directory: Path, allowed_roots: Sequence[Path], field: str | None = None) -> None:
    """Refuse a directory in which a link leads out of the allowed roots: its files would be read and copied.

    Raises:
        PathNotAllowed: Naming the link.
    """
    if not directory.is_dir():
        return
    roots = [os.path.realpath(root) for root in allowed_roots]
    inner = [Path(entry.path) for entry in os.scandir(directory) if entry.is_dir(follow_symlinks=False)]
    # Modules of sentence-transformers lie one level below.
    for entry in (entry for place in (directory, *inner) for entry in os.scandir(place)):
        target = Path(os.path.realpath(entry.path))
        if entry.is_symlink() and not any(target.is_relative_to(root) for root in roots):
            raise PathNotAllowed(
                f"The link {entry.name!r} in {directory.name!r} leads outside the allowed roots.",
                field=field,
                value=entry.name,
                hint="Copy the file that it points to into the directory.",
            )


def parse_hub_id(reference: str, field: str | None = None) -> tuple[str, str | None]:
    """Divide ``org/name[@revision]``.

    Raises:
        UnknownModel: It does not have that form.
    """
    match = _HUB_ID.fullmatch(reference)
    if match is None or "--" in match["repo"] or ".." in reference:
        raise UnknownModel(
            f"{reference!r} is not a model reference.", field=field, value=reference, hint=_FORMS
        )
    return match["repo"], match["revision"]


def cached_snapshot(repo: str, revision: str | None) -> Path | None:
    """Return the directory of a hub model in the local cache, when all that it consists of is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    from aidocks.checkpoints.layout import weights_present

    try:
        # The patterns, because the hub library compares the cache with the repository's listing where it
        # knows that, and would miss what is never downloaded.
        found = snapshot_download(
            repo,
            revision=revision,
            local_files_only=True,
            allow_patterns=list(HUB_FILES),
            ignore_patterns=list(HUB_DUPLICATES),
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return Path(found) if weights_present(Path(found)) else None
