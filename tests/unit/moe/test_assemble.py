"""The bytes that are written: copied ranges, casts, scales and noise, the routers, and what lies beside weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from aidocks.checkpoints.files import OutputFile, hash_file
from aidocks.checkpoints.reader import Checkpoint
from aidocks.checkpoints.writer import ShardPlan, TensorPlan
from aidocks.errors import CorruptCheckpoint, IncompatibleModels
from aidocks.moe.assemble import AssembleShard, WriteRouter, assembly_units
from aidocks.moe.recipes import Piece, Recipe
from aidocks.plan import UnitContext

DOWN = "model.layers.1.mlp.down_proj.weight"
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_have_the_type_that_was_asked_for(
    dtype: str, tmp_path: Path, tiny_model: Any, assemble: Any
) -> None:
    base = tiny_model(tmp_path / "base")
    other = tiny_model(tmp_path / "other", seed=1, dtype=torch.bfloat16)
    moe = assemble(base, [base, other], dtype=dtype)
    stored, source = Checkpoint(moe.path), Checkpoint(other)
    assert {entry.dtype for entry in stored.entries.values()} == {DTYPES[dtype]}
    found = stored.tensor("model.layers.1.block_sparse_moe.experts.1.w2.weight")
    assert torch.equal(found, source.tensor(DOWN).to(getattr(torch, dtype)))
    assert moe.target.config["dtype"] == dtype


def test_the_default_type_is_the_base_s(tmp_path: Path, tiny_model: Any, assemble: Any) -> None:
    base = tiny_model(tmp_path / "base", dtype=torch.bfloat16)
    other = tiny_model(tmp_path / "other", seed=1)
    stored = Checkpoint(assemble(base, [base, other]).path)
    assert {entry.dtype for entry in stored.entries.values()} == {"BF16"}


@pytest.mark.parametrize(("family", "shared"), [("llama", 0), ("phi3", 0), ("qwen2", 0), ("qwen2", 1)])
def test_copying_needs_no_torch(
    family: str, shared: int, tmp_path: Path, tiny_model: Any, assemble: Any
) -> None:
    base = tiny_model(tmp_path / "base", family)
    moe = assemble(base, [base, base], shared_experts=[base] * shared)
    kept = [[f"{type(unit).__module__}:{type(unit).__name__}", unit.model_dump_json()] for unit in moe.units]
    code = """
import importlib, json, sys
from pathlib import Path
from aidocks.plan import UnitContext
for kind, body in json.loads(sys.argv[1]):
    module, _, name = kind.partition(":")
    unit = getattr(importlib.import_module(module), name).model_validate_json(body)
    unit.run(UnitContext(Path(sys.argv[2])))
    assert name == "WriteRouter" or "numpy" not in sys.modules, name
assert "torch" not in sys.modules
"""
    before = {path.name: hash_file(path) for path in moe.path.iterdir()}
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", code, json.dumps(kept), str(tmp_path)]
    subprocess.run(command, check=True, cwd=root)
    assert before == {path.name: hash_file(path) for path in moe.path.iterdir()}


def test_the_scale_of_an_expert_is_in_its_last_matrix(tmp_path: Path, tiny_model: Any, assemble: Any) -> None:
    base = tiny_model(tmp_path / "base", dtype=torch.bfloat16)
    moe = assemble(base, [base, {"source_model": str(base), "residual_scale": 0.3}])
    stored, source = Checkpoint(moe.path), Checkpoint(base)
    for kind, dense in moe.target.form.kinds.items():
        weight = source.tensor(f"model.layers.1.mlp.{dense}.weight")
        expected = (weight.float() * 0.3).bfloat16() if kind == "w2" else weight
        assert torch.equal(stored.tensor(moe.target.form.expert_name(1, 1, kind)), expected)
        assert torch.equal(stored.tensor(moe.target.form.expert_name(1, 0, kind)), weight)


def test_noise_is_gaussian_of_the_size_that_was_asked_for(
    tmp_path: Path, tiny_model: Any, assemble: Any
) -> None:
    base = tiny_model(tmp_path / "base")
    noisy = {"source_model": str(base), "noise_scale": 0.5, "residual_scale": 2.0}
    moe = assemble(base, [base, noisy, noisy], seed=3)
    stored, source = Checkpoint(moe.path), Checkpoint(base)
    drawn = []
    for number in (1, 2):
        for kind, dense in moe.target.form.kinds.items():
            scale = 2.0 if kind == "w2" else 1.0
            weight = stored.tensor(moe.target.form.expert_name(0, number, kind)) / scale
            drawn.append((weight - source.tensor(f"model.layers.0.mlp.{dense}.weight")).flatten())
    for noise in drawn:
        assert abs(float(noise.std()) - 0.5) < 0.02
        assert abs(float(noise.mean())) < 0.02
        assert 2.6 < float((noise**4).mean() / noise.var() ** 2) < 3.4
    assert torch.corrcoef(torch.stack(drawn)).triu(1).abs().max() < 0.05
    plain = stored.tensor(moe.target.form.expert_name(0, 0, "w1"))
    assert torch.equal(plain, source.tensor("model.layers.0.mlp.gate_proj.weight"))


def test_noise_is_the_same_however_the_work_is_divided(
    tmp_path: Path, tiny_model: Any, assemble: Any
) -> None:
    base = tiny_model(tmp_path / "base")
    experts = [base, {"source_model": str(base), "noise_scale": 0.1}]
    whole = assemble(base, experts, seed=3)
    parts = assemble(base, experts, seed=3, max_shard_size="100KB", order=lambda units: units[::-1])
    other = assemble(base, experts, seed=4)
    first, second, third = (Checkpoint(moe.path) for moe in (whole, parts, other))
    assert len(second.weight_files) > 5
    assert all(torch.equal(first.tensor(name), second.tensor(name)) for name in first.entries)
    differ = {name for name in first.entries if not torch.equal(first.tensor(name), third.tensor(name))}
    assert differ == {name for name in first.entries if ".experts.1." in name}


def test_another_seed_is_other_work_only_where_there_is_noise(
    tmp_path: Path, tiny_model: Any, plan: Any
) -> None:
    base = tiny_model(tmp_path / "base")

    def ids(noise: float, seed: int) -> list[str]:
        target = plan(base, [base, {"source_model": str(base), "noise_scale": noise}], seed=seed)
        units = assembly_units(target, target.plan_files(200_000), tmp_path / "out")
        return [unit.unit_id for unit in units]

    assert ids(0, 1) == ids(0, 2)
    changed = [one != other for one, other in zip(ids(0.1, 1), ids(0.1, 2), strict=True)]
    assert any(changed)
    assert not all(changed)


def test_values_too_large_for_the_type_are_refused(tmp_path: Path, tiny_model: Any, assemble: Any) -> None:
    base = tiny_model(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors[DOWN].mul_(1e8)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(IncompatibleModels) as caught:
        assemble(base, [base, base], dtype="float16")
    assert caught.value.field == "dtype"
    assert DOWN in str(caught.value)


def test_a_source_that_changes_while_it_is_read(tmp_path: Path, tiny_model: Any, plan: Any) -> None:
    base = tiny_model(tmp_path / "base")
    target = plan(base, [base, base])
    units = assembly_units(target, target.plan_files(1 << 30), tmp_path / "out")
    tensors = load_file(base / "model.safetensors")
    del tensors[DOWN]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(CorruptCheckpoint, match=DOWN):
        units[0].run(UnitContext(tmp_path))
    assert not list((tmp_path / "out").glob("*"))


@given(
    rows=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4),
    dtypes=st.lists(st.sampled_from(["float32", "bfloat16", "float64"]), min_size=2, max_size=2),
    target=st.sampled_from(["float32", "bfloat16"]),
    axis=st.sampled_from([0, 1]),
)
@settings(max_examples=20, deadline=None)
def test_a_recipe_joins_rows(
    rows: list[tuple[int, int]],
    dtypes: list[str],
    target: str,
    axis: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    home = tmp_path_factory.mktemp("recipe")
    weights, paths = [], []
    for number, dtype in enumerate(dtypes):
        weight = torch.arange(18.0).view(6, 3).add(100 * number).to(getattr(torch, dtype))
        directory = home / str(number)
        directory.mkdir()
        save_file({"pad": torch.zeros(3, dtype=torch.uint8), "w": weight}, directory / "model.safetensors")
        (directory / "config.json").write_text("{}")
        weights.append(weight)
        paths.append(directory)
    if axis == 1:
        rows = [(0, 2)] * len(rows)
    ranges = [(n % 2, min(ends), max(ends) + 1) for n, ends in enumerate(rows)]
    pieces = tuple(Piece(source=s, tensor="w", rows=(a, b)) for s, a, b in ranges)
    expected = torch.cat([weights[s][a:b].to(getattr(torch, target)) for s, a, b in ranges], dim=axis)
    plan = ShardPlan(
        file_name="x.safetensors",
        tensors=(
            TensorPlan(name="joined", dtype=DTYPES[target], shape=tuple(expected.shape)),
            TensorPlan(name="zero", dtype=DTYPES[target], shape=(4, 5)),
        ),
    )
    recipes = {"joined": Recipe(pieces=pieces, axis=axis), "zero": Recipe()}
    unit = AssembleShard(sources=tuple(paths), directory=home / "out", shard=plan, recipes=recipes)
    unit.run(UnitContext(home))
    found = load_file(home / "out" / "x.safetensors")
    assert torch.equal(found["joined"], expected)
    assert torch.equal(found["zero"], torch.zeros(4, 5, dtype=expected.dtype))


def write_router(
    home: Path, gates: dict[str, torch.Tensor], plans: list[TensorPlan]
) -> dict[str, torch.Tensor]:
    path = home / "gates.safetensors"
    save_file(gates, path)
    stored = OutputFile(path=path, bytes=path.stat().st_size, sha256=hash_file(path))
    shard = ShardPlan(file_name="router.safetensors", tensors=tuple(plans))
    WriteRouter(gates=stored, directory=home, shard=shard).run(UnitContext(home))
    return load_file(home / "router.safetensors")


@given(
    values=st.lists(st.floats(width=32, min_value=-60_000, max_value=60_000), min_size=4, max_size=4),
    dtype=st.sampled_from(sorted(DTYPES)),
)
@settings(max_examples=25, deadline=None)
def test_gates_are_rounded_as_torch_rounds_them(
    values: list[float], dtype: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = torch.tensor(values).view(2, 2)
    # Half-way values, where rounding to even shows.
    rows = torch.cat([rows, torch.tensor([[1 + 2**-8, 1 + 3 * 2**-8], [1 + 2**-11, 1 + 3 * 2**-11]])])
    plans = [TensorPlan(name="gate.weight", dtype=DTYPES[dtype], shape=(4, 2))]
    found = write_router(tmp_path_factory.mktemp("router"), {"gate.weight": rows}, plans)
    assert torch.equal(found["gate.weight"], rows.to(getattr(torch, dtype)))


@pytest.mark.parametrize(
    ("value", "dtype"), [(float("nan"), "BF16"), (float("inf"), "F32"), (1e6, "F16"), (3.4e38, "BF16")]
)
def test_gates_that_are_not_finite_in_the_result_s_type(value: float, dtype: str, tmp_path: Path) -> None:
    plans = [TensorPlan(name="gate.weight", dtype=dtype, shape=(2, 2))]
    with pytest.raises(CorruptCheckpoint, match=r"gate\.weight are not finite"):
        write_router(tmp_path, {"gate.weight": torch.full((2, 2), value)}, plans)


def test_gates_of_another_shape_or_absent(tmp_path: Path) -> None:
    plans = [TensorPlan(name="gate.weight", dtype="F32", shape=(2, 2))]
    with pytest.raises(CorruptCheckpoint, match=r"F32 \[3, 2\], not F32 \[2, 2\]"):
        write_router(tmp_path, {"gate.weight": torch.ones(3, 2)}, plans)
    with pytest.raises(CorruptCheckpoint, match=r"no tensor gate\.weight"):
        write_router(tmp_path, {"other": torch.ones(3, 2)}, plans)


def test_a_shared_gate_that_nobody_computed_is_small_but_not_zero(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.shared_expert_gate.weight"
    found = write_router(
        tmp_path, {"other": torch.ones(1)}, [TensorPlan(name=name, dtype="BF16", shape=(1, 8))]
    )
    assert found[name].tolist() == [[2**-6] * 8]


def test_files_beside_weights_are_the_base_s(tmp_path: Path, tiny_model: Any, assemble: Any) -> None:
    base = tiny_model(tmp_path / "base", rms_norm_eps=3e-6)
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (base / "LICENSE").write_text("Do as you please.")
    moe = assemble(base, [base, base, base], experts_per_token=1, router_aux_loss_coef=0.02)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "LICENSE",
    ):
        assert (moe.path / name).read_bytes() == (base / name).read_bytes()
    config = json.loads((moe.path / "config.json").read_text())
    assert (config["rms_norm_eps"], config["num_experts_per_tok"], config["router_aux_loss_coef"]) == (
        3e-6,
        1,
        0.02,
    )
    index = json.loads((moe.path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == Checkpoint(moe.path).total_bytes


def test_what_the_target_says_of_its_size(tmp_path: Path, tiny_model: Any, assemble: Any) -> None:
    base = tiny_model(tmp_path / "base", "qwen2")
    moe = assemble(base, [base, base, base], shared_experts=[base])
    target = moe.target
    assert (target.num_layers, target.hidden_size, target.num_experts, target.num_shared_experts) == (
        2,
        64,
        3,
        1,
    )
    assert (target.architecture, target.class_name) == ("qwen2_moe", "Qwen2MoeForCausalLM")
    stored = Checkpoint(moe.path).entries
    assert target.parameters == sum(entry.numel for entry in stored.values())
    assert target.expert_parameters == sum(e.numel for name, e in stored.items() if ".experts.1." in name)
    assert [plan.name for plan in target.routers] == [
        *(target.router_name(layer) for layer in range(2)),
        *(target.shared_gate_name(layer) for layer in range(2)),
    ]
