"""What a training request names, found: its data sets, its chat template, the tensors that a scan lists."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from aidocks.checkpoints.files import copy_file
from aidocks.checkpoints.layout import CONFIG_FILE
from aidocks.errors import InvalidSpec
from aidocks.models.names import is_model_name
from aidocks.models.resolve import is_path, path_below
from aidocks.models.tokenizer_files import TokenizerFiles, write_tokenizer
from aidocks.plan import PlanContext, UnitContext, WritingUnit, WrittenFiles
from aidocks.specs.patterns import compile_pattern
from aidocks.specs.train_llm import LLMTrainSpec
from aidocks.specs.train_settings import ScannedLayers
from aidocks.storage import bring_file
from aidocks.training.data.hub import parse_data_reference
from aidocks.training.data.rows import DataSource, source_of_files, source_of_rows

_SCANS = "scans"
_MOST_LIST_BYTES = 4 << 20


class WriteTokenizer(WritingUnit):
    """The tokenizer that training, measurement and result use: the base's files, and the chat template."""

    base: Path = Field(description="Checkpoint directory of the base.")
    chat_template: str | None = Field(description="Jinja, in place of the base's; None to keep that.")
    directory: Path

    @property
    def label(self) -> str:
        return "tokenizer"

    @property
    def computes(self) -> bool:
        return False

    def run(self, context: UnitContext) -> WrittenFiles:
        files = write_tokenizer(TokenizerFiles(source=self.base), self.directory, self.chat_template)
        # Of some tokenizers it says which class they are of.
        config = copy_file(self.base / CONFIG_FILE, self.directory / CONFIG_FILE)
        return WrittenFiles(files=(*files, config))


def data_source(
    reference: str | Sequence[Mapping[str, Any]], context: PlanContext, field: str
) -> DataSource | None:
    """Return the data set that a request names; None for one of the hub, whose form alone is checked.

    Args:
        reference: A registry name, `file-…`, a path below an allowed root, `org/name[:config][@revision]`, or rows.
        context: Of the plan.
        field: Spec field to blame.

    Raises:
        InvalidSpec: Nothing is there, or it is no data file.
        PathNotAllowed: A path outside the allowed roots.
    """
    from aidocks.datasets.store import DatasetStore
    from aidocks.training.data.reading import SUFFIXES, source_of_path

    if not isinstance(reference, str):
        return source_of_rows(reference)
    if is_path(reference):
        return source_of_path(reference, context.resolver.allowed_roots, field)
    store = DatasetStore(context.datasets_dir) if context.datasets_dir is not None else None
    stored = store.resolve(reference) if store is not None else None
    if store is not None and stored is not None:
        store.bring(stored)
        return source_of_files(reference, [stored.path])
    if reference.endswith(SUFFIXES):
        return source_of_path(reference, context.resolver.allowed_roots, field)
    if is_model_name(reference):
        from difflib import get_close_matches

        known = store.names() if store is not None else []
        close = get_close_matches(reference, known, n=1)
        raise InvalidSpec(
            f"There is no data set called {reference!r}.",
            field=field,
            value=reference,
            hint=(f"Did you mean {close[0]!r}? " if close else "")
            + "Upload one (aidocks datasets add), or write a path (/… or ./…), or org/name of the hub.",
        )
    parse_data_reference(reference, field)
    return None


def scanned_layers(scanned: ScannedLayers, context: PlanContext) -> tuple[str, ...]:
    """Return the patterns of the tensors that a scan lists.

    Args:
        scanned: What the request says of it.
        context: Of the plan.

    Raises:
        InvalidSpec: There is no such scan, or it has no such list, or that is none.
        PathNotAllowed: A path outside the allowed roots.
    """
    path = _scan_path(scanned.scan, context)
    if path.is_dir():
        path = _list_in(path, scanned)
    if path.stat().st_size > _MOST_LIST_BYTES:
        raise _no_list(scanned, f"{path.name} is too large for a list")
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise _no_list(scanned, f"{path.name} cannot be read as YAML") from error
    found = document.get("unfrozen_parameters") if isinstance(document, Mapping) else None
    if not isinstance(found, list) or not found or not all(isinstance(one, str) for one in found):
        raise _no_list(scanned, f"{path.name} has no `unfrozen_parameters`")
    for pattern in found:
        if pattern.endswith("]"):
            raise _no_list(scanned, f"{pattern!r} names rows of a tensor; tensors are trained as a whole")
        compile_pattern(pattern, "layers")
    return tuple(found)


def _scan_path(reference: str, context: PlanContext) -> Path:
    """Return the directory or file of a scan: below the cache, where scans are, or below an allowed root."""
    hint = (
        "Name a job of POST /laser/scan that has succeeded, the `path` of its result, or a file of its lists."
    )
    roots = (*context.resolver.allowed_roots, context.cache_dir / _SCANS)
    if not is_path(reference):
        result = context.result_of(reference) or {}
        found = Path(str(result.get("path") or ""))
        if "unfrozen_yaml" in result:
            bring_file(found)
        # The files of a scan may have been removed with the cache.
        if "unfrozen_yaml" in result and found.is_dir():
            return found
        raise InvalidSpec(
            f"There is no scan {reference!r} here.", field="layers.scan", value=reference, hint=hint
        )
    path = path_below(reference, roots, "layers.scan", hint)
    if not path.exists():
        raise InvalidSpec(
            f"There is nothing at {reference!r}.", field="layers.scan", value=reference, hint=hint
        )
    return path


def _list_in(directory: Path, scanned: ScannedLayers) -> Path:
    """Return the file of the list that a request means."""
    try:
        lists = json.loads((directory / "scan.json").read_bytes()).get("lists") or []
    except (OSError, ValueError) as error:
        raise _no_list(scanned, f"{directory.name} is no scan") from error
    of_score = [one for one in lists if one["score"] == scanned.score]
    fitting = [one for one in of_score if scanned.fraction in (None, one["top_fraction"])]
    if not fitting:
        raise InvalidSpec(
            f"The scan has no list of the fraction {scanned.fraction}.",
            field="layers.fraction",
            value=scanned.fraction,
            hint=f"It has {', '.join(str(one['top_fraction']) for one in of_score) or 'none'}.",
        )
    return directory / Path(fitting[0]["file"]).name


def _no_list(scanned: ScannedLayers, flaw: str) -> InvalidSpec:
    return InvalidSpec(
        f"{scanned.scan!r} names no tensors to train: {flaw}.",
        field="layers.scan",
        value=scanned.scan,
        hint="Lists of tensors are what POST /laser/scan writes (unfrozen-25-percent.yaml).",
    )


def data_sources(spec: LLMTrainSpec, context: PlanContext) -> dict[str, DataSource | None]:
    """Return field -> data set of a request; None for one of the hub. Errors as for :func:`data_source`."""
    return {field: data_source(reference, context, field) for field, reference in named_data(spec).items()}


def named_data(spec: LLMTrainSpec) -> dict[str, str | Sequence[Mapping[str, Any]]]:
    """Return field -> data set of a request."""
    found: dict[str, str | Sequence[Mapping[str, Any]]] = {"dataset": spec.dataset}
    return found if spec.eval_dataset is None else found | {"eval_dataset": spec.eval_dataset}
