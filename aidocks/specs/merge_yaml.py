"""A merge written down as YAML, as people write it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from aidocks.specs.base import PublishableSpec
from aidocks.specs.merge_config import MergeConfig
from aidocks.specs.merge_settings import split_reference
from aidocks.specs.resources import ComputingSpec

if TYPE_CHECKING:
    from aidocks.specs.merge import MergeSpec

_LEFT_OUT = {*PublishableSpec.model_fields, *ComputingSpec.model_fields, "dry_run"}
#: Says nothing about the model that is made.
_ABOUT_THE_JOB = {"max_shard_size", "evaluate", "text", "chunks", "seqlen"}
_REFERENCES = ("model", "base_model", "tokenizer_source", "source")


class _Dumper(yaml.SafeDumper):
    pass


def _in_one_line(dumper: _Dumper, data: list[Any]) -> yaml.SequenceNode:
    """Write lists of scalars (gradients, ranges of layers) in one line."""
    scalars = all(isinstance(item, bool | int | float | str) for item in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=scalars)


_Dumper.add_representer(list, _in_one_line)


def to_yaml(spec: MergeSpec) -> str:
    """Return a merge as YAML that makes the same model again here: mergekit's order, without what is the default."""
    return _written(spec.model_dump(mode="json", exclude_defaults=True, exclude=_LEFT_OUT))


def to_public_yaml(spec: MergeSpec) -> str:
    """Return a merge as YAML for readers elsewhere: what makes the model, without the directories of this machine."""
    left_out = _LEFT_OUT | _ABOUT_THE_JOB
    return _written(_shown(spec.model_dump(mode="json", exclude_defaults=True, exclude=left_out)))


def shown_reference(reference: str) -> str:
    """Return ``model[+adapter]`` with the last part alone of what is a path."""
    model, adapter = (_last_part(part) if part else "" for part in split_reference(reference))
    return f"{model}+{adapter}" if adapter or "+" in model else model


def _last_part(reference: str) -> str:
    is_path = reference.startswith(("/", ".", "~"))
    return (Path(reference).name or reference) if is_path else reference


def _shown(node: Any) -> Any:
    """Return a part of a request with its references as readers elsewhere see them."""
    if isinstance(node, list):
        return [_shown(item) for item in node]
    if not isinstance(node, dict):
        return node
    shown = {key: inner if key == "parameters" else _shown(inner) for key, inner in node.items()}
    named = {key: shown_reference(shown[key]) for key in _REFERENCES if isinstance(shown.get(key), str)}
    return shown | named


def _written(given: dict[str, Any]) -> str:
    stages = [_ordered(stage) for stage in given.pop("stages", ())]
    document = {"stages": stages, **_ordered(given)} if stages else _ordered(given)
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _ordered(merge: dict[str, Any]) -> dict[str, Any]:
    known = [name for name in MergeConfig.model_fields if name in merge]
    return {name: merge[name] for name in (*known, *(name for name in merge if name not in known))}
