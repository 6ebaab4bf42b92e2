"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from aidocks import errors
from aidocks.operations import OPERATIONS
from aidocks.specs.base import Spec

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("aidocks", "cluster", "train", "serve")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
HEAVY = ("torch", "ray", "transformers", "sqlalchemy", "matplotlib", "httpx", "numpy")

# The limit is 60; a function that is longer today may shrink, never grow.
LONGEST_FUNCTION = 60
LONGEST_MODULE = 400


def error_classes() -> list[type[errors.AIDocksError]]:
    found = [errors.AIDocksError]
    for kind in found:
        found.extend(kind.__subclasses__())
    return [kind for kind in found if kind.__module__.startswith("aidocks.")]


def loaded_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    return {name.partition(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(
    "statement",
    [
        "import aidocks",
        "import aidocks.operations; [r.spec_type() for r in aidocks.operations.OPERATIONS]",
        "import aidocks.cli.main, aidocks.cli.app",
    ],
)
def test_light_entry_points_load_nothing_heavy(statement: str) -> None:
    assert not loaded_after(statement) & set(HEAVY)


def test_planning_and_serving_load_no_torch() -> None:
    loading = "import serve.app; from aidocks.operations import OPERATIONS; [r.load() for r in OPERATIONS]"
    assert not loaded_after(loading) & {"torch", "transformers"}


def test_modules_and_functions_fit_a_screen() -> None:
    long_modules = [p for p in SOURCES if len(p.read_text().splitlines()) > LONGEST_MODULE]
    long_functions = [
        f"{path.relative_to(ROOT)}:{node.name}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno >= LONGEST_FUNCTION
    ]
    assert not long_modules
    assert not long_functions


def test_no_module_shadows_an_installed_one() -> None:
    names = {path.stem for package in ("cluster", "train", "serve") for path in (ROOT / package).glob("*.py")}
    assert not names & (set(sys.stdlib_module_names) | {"deepspeed", "datasets", "ray", "torch"})


def test_every_module_says_what_it_is() -> None:
    silent = [p for p in SOURCES if p.read_text().strip() and not ast.get_docstring(ast.parse(p.read_text()))]
    assert not silent


def test_errors_are_picklable_and_have_codes_of_their_own() -> None:
    kinds = error_classes()
    assert len({kind.code for kind in kinds}) == len(kinds)
    for kind in kinds:
        error = kind("It broke.", field="experts[0]", value=3, hint="Mend it.")
        back = pickle.loads(pickle.dumps(error))
        assert type(back) is kind
        assert back.problem() == error.problem()


@pytest.mark.parametrize("registration", OPERATIONS, ids=lambda r: r.name)
def test_specs_are_frozen_documented_and_round_trip(registration: object) -> None:
    spec_type: type[Spec] = registration.spec_type()  # type: ignore[attr-defined]
    assert spec_type.model_config["frozen"]
    assert spec_type.model_config["extra"] == "forbid"
    assert spec_type.__doc__
    assert not [name for name, field in spec_type.model_fields.items() if not field.description]
    examples = spec_type.model_json_schema().get("examples")
    assert examples, "a spec shows at least one whole example"
    for example in examples:
        spec = spec_type.model_validate(example)
        assert spec_type.model_validate_json(spec.model_dump_json()) == spec


def test_wheel_installs_one_import_name(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], check=True, cwd=ROOT,
        capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"aidocks"}
    assert {"aidocks/_service/serve/__init__.py", "aidocks/_service/cluster/__init__.py"} <= set(names)


def test_ray_cluster_file_is_valid() -> None:
    ray = pytest.importorskip("ray")
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(yaml.safe_load((ROOT / "ray-cluster.yaml").read_text()), schema)
