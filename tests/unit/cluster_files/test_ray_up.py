"""What ``ray up`` reads: valid by Ray's own account, and options that ``ray start`` has."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cluster_files import COMPOSE, RAY_KINDS, RAY_UP, groups, load

VALIDATE = """
import sys, yaml
from ray.autoscaler._private.util import prepare_config, validate_config
for path in sys.argv[1:]:
    config = yaml.safe_load(open(path))
    validate_config(prepare_config(config))
from ray.scripts.scripts import start
print(*(option for parameter in start.params for option in parameter.opts))
"""


@pytest.fixture(scope="module")
def options() -> set[str]:
    """Options of ``ray start``; asking for them, the files were validated."""
    done = subprocess.run(
        [sys.executable, "-c", VALIDATE, *map(str, RAY_UP)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {word for word in done.stdout.split() if word.startswith("--")}


def test_ray_start_has_all_options(options: set[str]) -> None:
    scripts = [
        line
        for path in RAY_UP
        for name in ("head_start_ray_commands", "worker_start_ray_commands")
        for line in load(path)[name]
    ]
    scripts.append(load(COMPOSE)["services"]["head"]["command"][-1])
    used: set[str] = set()
    for script in scripts:
        for command in re.findall(r"ray start([^;&]*)", script):
            used |= set(re.findall(r"--[a-z-]+", command))
    used |= {f"--{name}" for path in RAY_KINDS for group in groups(path) for name in group["rayStartParams"]}
    assert "--head" in used
    assert used <= options


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.name)
def test_the_last_command_of_the_head_deploys(path: Path) -> None:
    assert load(path)["head_start_ray_commands"][-1].endswith("aidocks up --ray-address auto")


def test_all_types_of_nodes_fit_the_number_of_machines() -> None:
    cloud = load(RAY_UP[0])
    types = cloud["available_node_types"]
    assert cloud["head_node_type"] in types
    assert sum(kind.get("max_workers", 0) for kind in types.values()) <= cloud["max_workers"]
    local = load(RAY_UP[1])
    assert local["min_workers"] == local["max_workers"] == len(local["provider"]["worker_ips"])
