"""What must be true of base and experts before any work begins. Reads headers and settings only."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aidocks.moe.dense import COMPARED, DenseConfig, Member, read_dense
from aidocks.moe.parts import base_parts, check_nothing_else, check_parts, expert_parts
from aidocks.moe.vocabulary import TOKENIZER_FILES, Vocabulary, check_vocabulary, read_vocabulary


@dataclass(frozen=True)
class Checked:
    """Models that fit together.

    Attributes:
        dense: The base's configuration, which is the experts' where it matters.
        configs: Directory of every model -> its own configuration.
        vocabularies: Directory of every model -> its vocabulary.
    """

    dense: DenseConfig
    configs: Mapping[Path, DenseConfig]
    vocabularies: Mapping[Path, Vocabulary]


def check_members(base: Member, experts: Sequence[Member]) -> Checked:
    """Return what base and experts (routed ones, then shared ones) are, if everything fits together.

    Raises:
        IncompatibleModels: Naming the field, the first thing that differs, and both values.
    """
    config = read_dense(base)
    check_parts(base, base_parts(config))
    check_nothing_else(base, config)
    path = base.checkpoint.path
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise base.refuse(f"The model {base.reference!r} has no tokenizer ({' or '.join(TOKENIZER_FILES)}).")
    configs = {path: config}
    vocabularies = {path: read_vocabulary(base, config.vocab_size)}
    given: set[Path] = set()
    for expert in experts:
        # The base may be an expert, and a model may be several: each is looked at once.
        directory = expert.checkpoint.path
        if directory not in configs:
            found = read_dense(expert)
            _check_like_base(expert, found, base, config)
            check_nothing_else(expert, found)
            vocabulary = read_vocabulary(expert, found.vocab_size)
            check_vocabulary(vocabulary, vocabularies[path])
            configs[directory], vocabularies[directory] = found, vocabulary
        if directory not in given:
            check_parts(expert, expert_parts(config))
            given.add(directory)
    return Checked(config, configs, vocabularies)


def _check_like_base(expert: Member, config: DenseConfig, base: Member, expected: DenseConfig) -> None:
    for name in COMPARED:
        found, wanted = getattr(config, name), getattr(expected, name)
        if not _same(found, wanted):
            raise expert.refuse(
                f"{name} is {_shown(found)} in {expert.reference!r}, but {_shown(wanted)} in the base "
                f"{base.reference!r}.",
                "Experts are fine-tunes of one base, or share its shape.",
            )


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        return found.keys() == wanted.keys() and all(_same(found[key], wanted[key]) for key in found)
    if isinstance(found, list) and isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(_same, found, wanted))
    if isinstance(found, float) and isinstance(wanted, int | float):
        # Some writers store float32 values, with more decimals: 9.999999747378752e-06 is 1e-05.
        return math.isclose(found, wanted, rel_tol=1e-6)
    return bool(found == wanted)


def _shown(value: Any) -> str:
    return json.dumps(value if isinstance(value, int | float | str) or value is None else dict(value))
