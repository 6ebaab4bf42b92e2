"""What a request says of its workers."""

from __future__ import annotations

import pytest
import yaml

from aidocks.errors import InvalidSpec
from aidocks.operations import OPERATIONS
from aidocks.specs.merge import MergeSpec
from aidocks.specs.merge_yaml import to_yaml

MERGE = """
merge_method: linear
models:
  - model: a
  - model: b
parameters: {weight: 0.5}
"""


@pytest.mark.parametrize("registration", OPERATIONS, ids=lambda registration: registration.name)
def test_every_operation_takes_resources(registration: object) -> None:
    spec_type = registration.spec_type()  # type: ignore[attr-defined]
    if spec_type.__name__ == "OriginalTrainSpec":
        return  # its `config` holds them
    assert "resources" in spec_type.model_fields


def test_a_merge_file_may_name_them_and_is_the_same_merge() -> None:
    plain = MergeSpec.model_validate(yaml.safe_load(MERGE))
    asked = MergeSpec.model_validate(yaml.safe_load(MERGE + "resources: {memory_gb: 16, cpus: 2}\n"))
    assert plain.resources is None
    assert asked.resources is not None
    assert (asked.resources.memory_gb, asked.resources.cpus) == (16, 2)
    assert to_yaml(asked) == to_yaml(plain)


def test_a_worker_has_one_gpu_at_most() -> None:
    with pytest.raises((InvalidSpec, ValueError), match="one GPU"):
        MergeSpec.model_validate(yaml.safe_load(MERGE + "resources: {gpus: 2}\n"))
