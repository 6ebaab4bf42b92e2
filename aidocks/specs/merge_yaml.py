"""A merge written down as YAML, as people write it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from aidocks.specs.base import PublishableSpec
from aidocks.specs.merge_config import MergeConfig

if TYPE_CHECKING:
    from aidocks.specs.merge import MergeSpec

_LEFT_OUT = {*PublishableSpec.model_fields, "dry_run"}


class _Dumper(yaml.SafeDumper):
    pass


def _in_one_line(dumper: _Dumper, data: list[Any]) -> yaml.SequenceNode:
    """Write lists of scalars (gradients, ranges of layers) in one line."""
    scalars = all(isinstance(item, bool | int | float | str) for item in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=scalars)


_Dumper.add_representer(list, _in_one_line)


def to_yaml(spec: MergeSpec) -> str:
    """Return a merge as YAML: in the order of mergekit's files, without what is the default."""
    given = spec.model_dump(mode="json", exclude_defaults=True, exclude=_LEFT_OUT)
    stages = [_ordered(stage) for stage in given.pop("stages", ())]
    document = {"stages": stages, **_ordered(given)} if stages else _ordered(given)
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _ordered(merge: dict[str, Any]) -> dict[str, Any]:
    known = [name for name in MergeConfig.model_fields if name in merge]
    return {name: merge[name] for name in (*known, *(name for name in merge if name not in known))}
