from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aidocks.checkpoints.reader import Checkpoint
from aidocks.evaluate.objectives import ObjectiveSource, resolve_objective, size_objective
from aidocks.evaluate.scoring import context_length, load_task
from aidocks.laser.evaluation import Change, MeasureChange
from aidocks.laser.matrices import Reduction, find_matrices, stored_matrix
from aidocks.laser.truncation import save_basis, weight_basis
from aidocks.laser.workbench import workbench
from aidocks.plan import UnitContext
from aidocks.specs.objective import Objective

MakeUnit = Callable[..., MeasureChange]


@pytest.fixture
def make_unit(stories260k: Path, tmp_path: Path) -> MakeUnit:
    checkpoint = Checkpoint(stories260k)
    matrices = {m.address: m for m in find_matrices(checkpoint.entries)}

    def reduction(address: str, rank: int) -> Reduction:
        file = tmp_path / f"{address}.safetensors"
        written = save_basis(file, weight_basis(stored_matrix(checkpoint, matrices[address])))
        return Reduction(address=address, rank=rank, basis=file, sha256=written.sha256)

    def sized(metric: str, data: str) -> ObjectiveSource:
        source = resolve_objective(Objective(metric=metric, data=data), [], seq_length=32)
        return size_objective(source, stories260k, chunks=32 if metric == "perplexity" else None)

    def make(*added: tuple[str, int], guard: bool = True, **more: object) -> MeasureChange:
        objectives = [sized("perplexity", "prose")]
        if guard:
            objectives.append(sized("log_likelihood", "capitals"))
        return MeasureChange(
            checkpoint=stories260k,
            added=tuple(reduction(*one) for one in added),
            objectives=tuple(objectives),
            part="search",
            subject="a trial",
            **more,
        )

    return make


UP = "model.layers.2.mlp.up_proj.weight"


def test_the_base_alone_is_measured_on_everything(make_unit: MakeUnit, tmp_path: Path) -> None:
    unit = make_unit()
    change = unit.run(UnitContext(tmp_path))
    assert unit.label == "a trial"
    assert [len(pairs.positions) for pairs in change.pairs] == [32, unit.objectives[1].sizes["search"]]
    assert all(pairs.before == pairs.after for pairs in change.pairs)
    assert all(pairs.comparison.z is None for pairs in change.pairs)
    value, error = change.objective.value_before
    assert value is not None
    assert error is not None
    assert 1 < value < 512
    assert Change.model_validate_json(change.model_dump_json()) == change


def test_guards_of_what_is_futile_are_not_measured(make_unit: MakeUnit, tmp_path: Path) -> None:
    context = UnitContext(tmp_path)
    early = make_unit((UP, 1), z_threshold=3.0).run(context)
    assert len(early.objective.positions) < 32
    assert early.guards == ()
    whole = make_unit((UP, 1)).run(context)
    assert len(whole.objective.positions) == 32
    assert len(whole.guards) == 1
    assert whole.objective.after[: len(early.objective.after)] == early.objective.after


def test_measurements_do_not_depend_on_what_the_worker_did_before(
    make_unit: MakeUnit, tmp_path: Path
) -> None:
    one, other = make_unit((UP, 30)), make_unit(("model.layers.0.self_attn.q_proj.weight", 20))
    both = other.model_copy(update={"base": one.added})
    fresh = [unit.run(UnitContext(tmp_path)) for unit in (one, other, both)]
    context = UnitContext(tmp_path)
    assert [unit.run(context) for unit in (both, other, one, both)] == [
        fresh[2], fresh[1], fresh[0], fresh[2],
    ]  # fmt: skip
    assert fresh[2].objective.before == fresh[0].objective.after


def test_after_a_guard_only_the_layers_above_a_change_run(
    make_unit: MakeUnit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = UnitContext(tmp_path)
    unit = make_unit(("model.layers.4.mlp.up_proj.weight", 30))
    bench = workbench(unit.checkpoint, None, context)
    tokens = 0
    for source in unit.objectives:
        task = load_task(source, "search", bench.model.tokenizer, longest=context_length(bench.model.network))
        tokens += sum(batch.ids_BT.numel() for batch in task.batches)
    # Room for the outputs of two layers: less than that of all objectives' at every second layer.
    bench.suffix._limit = 2 * tokens * bench.suffix._bytes_per_token
    first = unit.run(context)
    assert bench.suffix.stride == 3
    batches = bench.suffix.layers_run
    for rank, layers in ((29, 2), (30, 0)):
        bench.suffix.layers_run = 0
        again = make_unit(("model.layers.4.mlp.up_proj.weight", rank)).run(context)
        # The base is known, and the change begins at the output of layer 3 of 5.
        assert bench.suffix.layers_run == batches * layers / (5 + 2)
    assert again == first


def test_a_loss_that_is_not_finite_is_futile(
    make_unit: MakeUnit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "aidocks.laser.workbench.reduce", lambda w_OI, *_, **__: torch.full_like(w_OI, torch.inf)
    )
    change = make_unit((UP, 30), z_threshold=0.1).run(UnitContext(tmp_path))
    assert len(change.pairs) == 1
    assert change.objective.comparison.delta is None
    assert change.objective.value_after == (None, None)


def test_equal_work_has_equal_ids(make_unit: MakeUnit) -> None:
    unit = make_unit((UP, 30))
    assert unit.unit_id == make_unit((UP, 30)).unit_id
    assert unit.unit_id != make_unit((UP, 31)).unit_id
    assert MeasureChange.model_validate_json(unit.model_dump_json()) == unit
