"""The units that learn a router: repeatable, and going on where others got to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from aidocks.checkpoints.files import OutputFile, hash_file
from aidocks.checkpoints.writer import ShardPlan
from aidocks.errors import InvalidSpec
from aidocks.evaluate.causal_lm import load
from aidocks.evaluate.texts import TextSource
from aidocks.moe.assemble import assembly_units
from aidocks.moe.examples import Examples, take_sequences
from aidocks.moe.gate_files import read_gates, write_gates
from aidocks.moe.learning import (
    FitGates,
    Floor,
    GateFile,
    JudgeAverage,
    JudgeGates,
    Judgement,
    PrepareDraft,
    TrainedGates,
    TrainGates,
)
from aidocks.moe.training import Schedule, State, train, validate
from aidocks.plan import Unit, UnitContext
from tests.support.routing import records

LENGTH = 16


def examples(number: int, chunks: int = 8) -> Examples:
    return Examples(text=TextSource(name=f"text {number}", records=records(number)), chunks=chunks)


@dataclass
class Setting:
    """A staged MoE without a router, and its draft.

    Attributes:
        models: Of the experts.
        shared: Fields that all learning units have.
    """

    staged: Path
    router: ShardPlan
    models: tuple[Path, ...]
    shared: dict[str, Any]

    @property
    def prepare(self) -> PrepareDraft:
        return PrepareDraft(staged=self.staged, directory=self.shared["draft"], router=self.router)


@pytest.fixture
def setting(tmp_path: Path, tiny_model: Any, plan: Any) -> Setting:
    models = tuple(tiny_model(tmp_path / f"model-{seed}", seed=seed) for seed in range(3))
    target = plan(models[0], models)
    files = target.plan_files(1 << 30)
    for unit in assembly_units(target, files, tmp_path / "staged"):
        unit.run(UnitContext(tmp_path))
    shared = {
        "draft": tmp_path / "draft",
        "directory": tmp_path / "gates",
        "routers": tuple(target.router_name(layer) for layer in range(target.num_layers)),
        "experts": tuple(examples(number) for number in range(3)),
        "seq_length": LENGTH,
        "tokenizer": models[0],
        "fit_tokens": 96,
        "seed": 0,
    }
    found = Setting(tmp_path / "staged", files[-1], models, shared)
    found.prepare.run(UnitContext(tmp_path))
    return found


def run(unit: Unit[Any]) -> Any:
    """Run a unit as a worker that it was sent to does, twice; return its result, which is the same."""
    carried = type(unit).model_validate_json(unit.model_dump_json())
    assert carried.unit_id == unit.unit_id
    context = UnitContext(Path("/nowhere"))
    result = carried.run(context)
    assert unit.result_type.model_validate_json(result.model_dump_json()) == result
    assert carried.run(context) == result
    for file in unit.outputs(result):
        assert (file.path.stat().st_size, hash_file(file.path)) == (file.bytes, file.sha256)
    return result


def rows_in(setting: Setting, file: OutputFile, prefix: str = "") -> torch.Tensor:
    stored = read_gates([file])
    return torch.from_numpy(np.stack([stored[f"{prefix}{name}"] for name in setting.shared["routers"]]))


def write_rows(setting: Setting, name: str, seed: int) -> OutputFile:
    generator = np.random.default_rng(seed)
    routers = {r: generator.standard_normal((3, 64)).astype(np.float32) for r in setting.shared["routers"]}
    return write_gates(setting.shared["directory"] / name, routers)


@pytest.fixture
def drawn(setting: Setting) -> Callable[..., OutputFile]:
    """``drawn(seed)``: a file of random rows."""
    setting.shared["directory"].mkdir(exist_ok=True)
    return lambda seed: write_rows(setting, f"drawn-{seed}.safetensors", seed)


def test_a_draft_is_links_and_a_router_of_zeros(setting: Setting) -> None:
    before = {path.name: path.stat() for path in setting.staged.iterdir()}
    run(setting.prepare)
    draft = setting.shared["draft"]
    links = {path.name: path.resolve() for path in draft.iterdir() if path.is_symlink()}
    assert links == {name: (setting.staged / name).resolve() for name in before}
    assert [path.name for path in draft.iterdir() if not path.is_symlink()] == [setting.router.file_name]
    assert {path.name: path.stat() for path in setting.staged.iterdir()} == before
    network, info = AutoModelForCausalLM.from_pretrained(draft, output_loading_info=True)
    assert not any(info.values())
    assert all(not layer.mlp.gate.weight.any() for layer in network.model.layers)


def test_fitted_rows_are_centred_and_of_the_result_s_form(setting: Setting) -> None:
    fitted: GateFile = run(FitGates(**setting.shared))
    rows = rows_in(setting, fitted.file)
    assert (rows.shape, rows.dtype) == ((2, 3, 64), torch.float32)
    assert bool(rows.isfinite().all())
    assert float(rows.sum(1).abs().max()) < 1e-5 * float(rows.abs().max())
    assert float(rows.abs().max()) > 0


def test_experts_in_another_order_have_their_rows_in_that_order(setting: Setting) -> None:
    rows = rows_in(setting, run(FitGates(**setting.shared)).file)
    order = [2, 0, 1]
    permuted = setting.shared | {"experts": tuple(setting.shared["experts"][i] for i in order)}
    # The draft's experts keep their order here, so only the first layer, which they do not reach, must agree.
    other = rows_in(setting, run(FitGates(**permuted)).file)
    assert torch.allclose(other[0], rows[0][order], rtol=1e-3, atol=1e-5 * float(rows.abs().max()))


def test_experts_with_equal_texts_have_equal_rows(setting: Setting) -> None:
    experts = (examples(0), examples(1), examples(0))
    rows = rows_in(setting, run(FitGates(**setting.shared | {"experts": experts})).file)
    scale = float(rows.abs().max())
    assert torch.allclose(rows[:, 0], rows[:, 2], atol=1e-5 * scale)
    assert not torch.allclose(rows[:, 0], rows[:, 1], atol=1e-2 * scale)


def test_prompts_alone_are_enough(setting: Setting) -> None:
    experts = tuple(Examples(prompts=records(number, 6)) for number in range(3))
    fields = setting.shared | {"experts": experts}
    fitted: GateFile = run(FitGates(**fields))
    judged: Judgement = run(JudgeGates(**fields, files=(fitted.file,)))
    assert all(loss > 0 for loss in judged.losses)


def test_a_prompt_of_one_token_teaches_nothing(setting: Setting, tmp_path: Path) -> None:
    model = load(setting.models[0], None, "cpu")
    model.tokenizer.bos_token = None
    assert take_sequences(Examples(prompts=("a",)), "fit", model, LENGTH, 64, 0) == []
    assert len(take_sequences(Examples(prompts=("a", "a b")), "fit", model, LENGTH, 64, 0)) == 1
    settings_file = setting.models[0] / "tokenizer_config.json"
    settings_file.write_text(json.dumps(json.loads(settings_file.read_text()) | {"bos_token": None}))
    experts = (examples(0), Examples(prompts=("a",)), examples(2))
    with pytest.raises(InvalidSpec) as caught:
        FitGates(**setting.shared | {"experts": experts}).run(UnitContext(tmp_path))
    assert (caught.value.field, caught.value.value) == ("experts[1].positive_prompts", ["a"])


def test_what_is_judged_was_not_learned_from(setting: Setting) -> None:
    model = load(setting.models[0], None, "cpu")
    parts = {
        part: {
            tuple(ids.tolist())
            for ids in take_sequences(examples(0, chunks=30), part, model, LENGTH, 96, seed=0)
        }
        for part in ("fit", "validate", "train")
    }
    assert len(parts["fit"]) == 6
    assert parts["validate"]
    assert parts["fit"] <= parts["train"]
    assert len(parts["train"]) == 30 - len(parts["validate"])
    assert not parts["validate"] & parts["train"]
    held_out = model.chunks(examples(0).text, "held_out", LENGTH, 10).tokens  # type: ignore[arg-type]
    assert not {tuple(ids) for ids in held_out.tolist()} & (parts["train"] | parts["validate"])


def test_a_judgement_is_of_the_scaled_mean_of_all_files(setting: Setting, drawn: Any) -> None:
    files = (drawn(1), drawn(2), drawn(3))
    mean = sum(rows_in(setting, file) for file in files) / 3
    judged: Judgement = run(JudgeGates(**setting.shared, files=files, scale=0.5))
    rows = rows_in(setting, judged.file)
    assert torch.allclose(rows, 0.5 * mean, atol=1e-6)
    model = load(setting.shared["draft"], None, "cpu")
    sequences = [take_sequences(each, "validate", model, LENGTH, 96, 0) for each in setting.shared["experts"]]
    losses, balance = validate(model.network, rows, sequences)
    assert judged.losses == pytest.approx(losses)
    assert judged.balance == pytest.approx(balance)
    assert judged.loss == pytest.approx(sum(losses) / 3)
    assert judged.mean_balance == pytest.approx(sum(balance) / 2)


def test_the_floor_is_the_loss_of_the_averaged_weights(setting: Setting) -> None:
    floor: Floor = run(JudgeAverage(**setting.shared, models=setting.models))
    average = load(setting.models[0], None, "cpu")
    others = [AutoModelForCausalLM.from_pretrained(path).state_dict() for path in setting.models]
    average.network.load_state_dict({name: sum(o[name] for o in others) / 3 for name in others[0]})
    for each, loss in zip(setting.shared["experts"], floor.losses, strict=True):
        ids = torch.stack(take_sequences(each, "validate", average, LENGTH, 96, 0))
        wanted = float(average.chunk_nll(ids).sum()) / (len(ids) * (LENGTH - 1))
        assert loss == pytest.approx(wanted, rel=1e-4)


def steps(
    setting: Setting, *starts: OutputFile, step: int = 0, count: int = 3, replica: int = 0
) -> TrainGates:
    rates = {"total_steps": 12, "rate": 0.05, "balance": 1e-3}
    return TrainGates(**setting.shared, starts=starts, step=step, count=count, replica=replica, **rates)


def test_training_goes_on_where_it_was(setting: Setting, drawn: Any) -> None:
    # One sequence a domain: whatever is drawn, it is that.
    setting.shared["experts"] = tuple(Examples(prompts=records(number, 1)) for number in range(3))
    start = drawn(1)
    first: TrainedGates = run(steps(setting, start))
    second: TrainedGates = run(steps(setting, first.file, step=3, count=4))
    model = load(setting.shared["draft"], None, "cpu")
    sequences = [take_sequences(each, "train", model, LENGTH, 96, 0) for each in setting.shared["experts"]]
    rows = rows_in(setting, start)
    state = State(rows.clone(), torch.zeros_like(rows), torch.zeros_like(rows), 0)
    losses, tokens = train(model.network, state, sequences, 7, Schedule(0.05, 12, 1e-3), seed=0)
    assert first.losses + second.losses == pytest.approx(losses, abs=1e-5)
    assert (len(first.losses), first.tokens + second.tokens) == (3, tokens)
    assert torch.equal(rows_in(setting, second.file), state.gates)
    assert torch.equal(rows_in(setting, second.file, "first_moment."), state.first)
    assert torch.equal(rows_in(setting, second.file, "second_moment."), state.second)


def test_replicas_see_other_sequences_and_meet_in_the_mean(setting: Setting, drawn: Any) -> None:
    start = drawn(1)
    one, other = (run(steps(setting, start, replica=replica)) for replica in range(2))
    assert one.losses != other.losses
    both = read_gates([one.file, other.file])
    parts = [read_gates([trained.file]) for trained in (one, other)]
    assert both.keys() == {
        f"{prefix}{name}"
        for prefix in ("", "first_moment.", "second_moment.")
        for name in setting.shared["routers"]
    }
    for name, rows in both.items():
        assert rows.dtype == np.float32
        np.testing.assert_allclose(rows, (parts[0][name] + parts[1][name]) / 2, rtol=1e-6)
    # A step of nothing: what is written is what training starts from.
    unmoved = TrainGates(
        **setting.shared,
        starts=(one.file, other.file),
        replica=0,
        step=3,
        count=1,
        total_steps=4,
        rate=1e-12,
        balance=0,
    )
    rows = rows_in(setting, run(unmoved).file)
    for layer, name in enumerate(setting.shared["routers"]):
        assert rows[layer].numpy() == pytest.approx(both[name], rel=1e-5)
