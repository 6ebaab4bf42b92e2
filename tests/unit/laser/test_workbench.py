from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aidocks.checkpoints.reader import Checkpoint
from aidocks.errors import IncompatibleModels
from aidocks.evaluate.objectives import ObjectiveSource, resolve_objective, size_objective
from aidocks.evaluate.scoring import context_length, load_task, plain_forward
from aidocks.laser.matrices import Reduction, find_matrices, stored_matrix
from aidocks.laser.truncation import load_basis, reduce, save_basis, weight_basis
from aidocks.laser.workbench import Workbench, locate, workbench
from aidocks.plan import UnitContext
from aidocks.specs.objective import Objective

Q, UP, DOWN = (
    f"model.layers.{name}.weight" for name in ("1.self_attn.q_proj", "2.mlp.up_proj", "3.mlp.down_proj")
)
MakeReduction = Callable[[Path, str, int], Reduction]


@pytest.fixture
def reduction(tmp_path: Path) -> MakeReduction:
    def make(model: Path, address: str, rank: int) -> Reduction:
        checkpoint = Checkpoint(model)
        (matrix,) = (m for m in find_matrices(checkpoint.entries, all_weights=True) if m.address == address)
        file = tmp_path / "bases" / f"{address}.safetensors"
        file.parent.mkdir(exist_ok=True)
        written = save_basis(file, weight_basis(stored_matrix(checkpoint, matrix)))
        return Reduction(address=address, rank=rank, basis=file, sha256=written.sha256)

    return make


def states(bench: Workbench) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in bench.model.network.state_dict().items()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in one if not torch.equal(one[name], other[name])}


def small_objective(model: Path, data: str = "perplexity:prose", chunks: int = 16) -> ObjectiveSource:
    metric, _, name = data.partition(":")
    source = resolve_objective(Objective(metric=metric, data=name), [], seq_length=32)
    return size_objective(source, model, chunks=chunks if metric == "perplexity" else None)


def whole_losses(bench: Workbench, source: ObjectiveSource) -> list[float]:
    """Losses of the model in its present state, by its own forward."""
    network = bench.model.network
    task = load_task(source, "search", bench.model.tokenizer, longest=context_length(network))
    with torch.inference_mode():
        return torch.cat([task.losses(b, plain_forward(network)) for b in task.batches]).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_state_is_reached_exactly_and_left_without_a_trace(
    tiny_llama: Any, tmp_path: Path, dtype: torch.dtype, reduction: MakeReduction
) -> None:
    path = tiny_llama(tmp_path / "model", dtype=dtype)
    context = UnitContext(tmp_path)
    bench = workbench(path, None, context)
    assert workbench(path, None, context) is bench
    q5, q9, up60, up30 = (reduction(path, *which) for which in ((Q, 5), (Q, 9), (UP, 60), (UP, 30)))
    base = states(bench)
    bench.apply([q5, up60])
    both = states(bench)
    assert differing(base, both) == {Q, UP}
    assert torch.equal(both[UP], reduce(base[UP], load_basis(up60.basis), 60))
    bench.apply([up60])
    assert differing(base, states(bench)) == {UP}
    bench.apply([q9, up30])
    bench.apply([up60, q5])
    assert differing(both, states(bench)) == set()
    bench.apply([q9, q5, up60])  # of one matrix the last counts
    assert differing(both, states(bench)) == set()
    bench.apply([])
    assert differing(base, states(bench)) == set()


def test_an_interrupted_change_is_undone_by_the_next(
    tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reduction: MakeReduction
) -> None:
    path = tiny_llama(tmp_path / "model")
    bench = workbench(path, None, UnitContext(tmp_path))
    base = states(bench)
    first, second = reduction(path, Q, 3), reduction(path, UP, 7)

    def fails_on_the_second(w_OI: torch.Tensor, basis: Any, rank: int, **more: Any) -> torch.Tensor:
        if rank == 7:
            raise KeyboardInterrupt
        return reduce(w_OI, basis, rank, **more)

    monkeypatch.setattr("aidocks.laser.workbench.reduce", fails_on_the_second)
    with pytest.raises(KeyboardInterrupt):
        bench.apply([first, second])
    assert differing(base, states(bench)) == {Q}
    bench.apply([])
    assert differing(base, states(bench)) == set()


@pytest.mark.parametrize("data", ["perplexity:prose", "accuracy:capitals", "log_likelihood:capitals"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measured_losses_are_those_of_the_whole_model(
    tiny_llama: Any, tmp_path: Path, dtype: torch.dtype, data: str, reduction: MakeReduction
) -> None:
    path = tiny_llama(tmp_path / "model", dtype=dtype)
    source = small_objective(path, data)
    bench = workbench(path, None, UnitContext(tmp_path))
    q, up, down = (reduction(path, *which) for which in ((Q, 2), (UP, 40), (DOWN, 3)))
    for base, added in (((), (up,)), ((), (q, down)), ((up,), (q,)), ((up, q), (down,)), ((), (down,))):
        bench.set_base(base)
        pairs = bench.measure(source, "search", added)
        bench.apply(base)
        assert list(pairs.before) == whole_losses(bench, source)
        bench.apply([*base, *added])
        assert list(pairs.after) == whole_losses(bench, source)
        assert len(pairs.positions) == source.sizes["search"]
        assert pairs.dtype == str(bench.model.dtype).removeprefix("torch.")


def test_order_of_measurements_and_memory_make_no_difference(
    tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reduction: MakeReduction
) -> None:
    path = tiny_llama(tmp_path / "model")
    prose, capitals = small_objective(path), small_objective(path, "accuracy:capitals")
    q, up, down = (reduction(path, *which) for which in ((Q, 2), (UP, 40), (DOWN, 3)))
    tried = [
        (base, added, source) for base in ((), (up,)) for added in (q, down) for source in (prose, capitals)
    ]

    def measure(limit: int, order: Callable[[list[Any]], list[Any]]) -> dict[str, Any]:
        bench = Workbench(workbench(path, None, UnitContext(tmp_path)).model, Checkpoint(path), limit=limit)
        found = {}
        for base, added, source in order(tried):
            bench.set_base(base)
            found[f"{base}{added}{source}"] = bench.measure(source, "search", (added,))
        return found

    expected = measure(1 << 30, list)
    assert measure(1 << 30, lambda tried: tried[::-1]) == expected
    assert measure(200_000, list) == expected
    assert measure(0, list) == expected
    monkeypatch.setattr("aidocks.laser.workbench._KEPT_MEASUREMENTS", 1)
    assert measure(1 << 30, list) == expected


def test_nothing_is_measured_twice(tiny_llama: Any, tmp_path: Path, reduction: MakeReduction) -> None:
    path = tiny_llama(tmp_path / "model")
    source = small_objective(path)
    bench = workbench(path, None, UnitContext(tmp_path))
    up, down, lower_down = reduction(path, UP, 40), reduction(path, DOWN, 3), reduction(path, DOWN, 2)
    assert layers_of(bench, source, ()) == 4
    assert layers_of(bench, source, (up,)) == 2  # layers 2 and 3
    # The change is accepted: its losses are the new base's, whose output of layer 2 comes with the next measurement.
    bench.set_base((up,))
    assert layers_of(bench, source, (down,)) == 2
    assert layers_of(bench, source, (lower_down,)) == 1
    expected = bench.measure(source, "search", (down,))
    # The result, again, after other data were looked at.
    bench.set_base(())
    bench.measure(source, "held_out", (up, down))
    assert layers_of(bench, source, (up, down)) == 0
    assert bench.measure(source, "search", (up, down)).after == expected.after
    fresh = workbench(path, None, UnitContext(tmp_path))
    fresh.set_base((up,))
    assert fresh.measure(source, "search", (down,)) == expected


def layers_of(bench: Workbench, source: ObjectiveSource, added: tuple[Reduction, ...]) -> float:
    """Return how many layers a change runs for each batch."""
    bench.suffix.layers_run = 0
    bench.measure(source, "search", added)
    task = load_task(source, "search", bench.model.tokenizer, longest=context_length(bench.model.network))
    return bench.suffix.layers_run / len(task.batches)


def test_memory_is_divided_among_all_objectives_before_the_first(
    tiny_llama: Any, tmp_path: Path, reduction: MakeReduction
) -> None:
    path = tiny_llama(tmp_path / "model", num_hidden_layers=6)
    prose, capitals = small_objective(path, chunks=100), small_objective(path, "log_likelihood:capitals")
    last, lower, lowest = (
        (reduction(path, "model.layers.5.mlp.down_proj.weight", rank),) for rank in (3, 2, 1)
    )
    model = workbench(path, None, UnitContext(tmp_path)).model
    # Room for three outputs of the prose, of 64 numbers a token, or for two of both.
    limit = 3 * (100 * 32) * 64 * 4
    bench = Workbench(model, Checkpoint(path), limit=limit)
    bench.expect([prose, capitals], "search")
    assert bench.suffix.stride == 3
    expected = bench.measure(prose, "search", last)
    bench.measure(capitals, "search", last)
    assert layers_of(bench, prose, lower) == layers_of(bench, capitals, lower) == 3
    assert 0.5 * limit < bench.suffix.kept_bytes <= limit
    bench.apply([])
    # A guard that was not announced: what had to go for it comes back with the next measurement.
    bench = Workbench(model, Checkpoint(path), limit=limit)
    assert bench.measure(prose, "search", last) == expected
    assert bench.suffix.stride == 2
    bench.measure(capitals, "search", last)
    assert bench.suffix.stride == 3
    assert layers_of(bench, prose, lower) == 6
    assert layers_of(bench, prose, lowest) == 3
    assert bench.measure(prose, "search", last) == expected


def test_what_is_not_a_number_ends_at_once(
    tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reduction: MakeReduction
) -> None:
    path = tiny_llama(tmp_path / "model")
    source = small_objective(path, chunks=64)
    bench = workbench(path, None, UnitContext(tmp_path))
    nan = lambda w_OI, *_, **__: torch.full_like(w_OI, torch.nan)  # noqa: E731
    monkeypatch.setattr("aidocks.laser.workbench.reduce", nan)
    pairs = bench.measure(source, "search", (reduction(path, Q, 2),))
    assert len(pairs.positions) < 64
    assert set(pairs.after) == {None}
    assert None not in pairs.before
    assert pairs.comparison.worsened(3)
    assert not pairs.comparison.improved(0.1)


def test_a_hopeless_change_is_not_measured_to_its_end(
    stories260k: Path, tmp_path: Path, reduction: MakeReduction
) -> None:
    source = small_objective(stories260k, chunks=64)
    bench = workbench(stories260k, None, UnitContext(tmp_path))
    harmful = (reduction(stories260k, UP, 1),)
    everything = bench.measure(source, "search", harmful)
    early = bench.measure(source, "search", harmful, z_threshold=3)
    count = len(early.positions)
    assert count in (8, 16, 32)
    assert early.positions == everything.positions[:count]
    assert early.after == everything.after[:count]
    assert early.tokens == everything.tokens * count // 64


def test_gpt2_matrices_are_found_without_their_prefix(
    shared_data: Path, tmp_path: Path, reduction: MakeReduction
) -> None:
    path = shared_data / "models" / "gpt2-shakespeare-char"
    bench = workbench(path, None, UnitContext(tmp_path))
    name = "transformer.h.1.mlp.c_fc.weight"
    slot = locate(bench.model.network, name).values
    bare = locate(bench.model.network, name.removeprefix("transformer."))
    assert bare.values.data_ptr() == slot.data_ptr()
    assert bench.suffix.start_of(bare.parameter) == 1
    before = slot.clone()
    bench.apply([reduction(path, next(n for n in Checkpoint(path).entries if name.endswith(n)), 4)])
    assert int(torch.linalg.matrix_rank(slot, rtol=1e-4)) == 4
    bench.apply([])
    assert torch.equal(slot, before)


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    return tmp_path / "mixtral"


def test_experts_are_addressed_one_by_one(mixtral: Path) -> None:
    from safetensors.torch import load_file
    from transformers import MixtralForCausalLM

    network = MixtralForCausalLM.from_pretrained(mixtral)
    for name, stored in load_file(mixtral / "model.safetensors").items():
        if ".layers." in name and stored.ndim == 2:
            assert torch.equal(locate(network, name).values, stored), name
    slot = locate(network, "model.layers.0.block_sparse_moe.experts.1.w3.weight")
    slot.values.zero_()
    fused = network.model.layers[0].mlp.experts.gate_up_proj
    assert slot.parameter is fused
    assert [bool((fused[e, 24:] == 0).all()) for e in range(3)] == [False, True, False]
    assert not bool((fused[:, :24] == 0).all())


def test_slices_of_a_fused_tensor_are_addressed_by_number(mixtral: Path) -> None:
    from transformers import MixtralForCausalLM

    network = MixtralForCausalLM.from_pretrained(mixtral)
    name = "model.layers.0.mlp.experts.down_proj"
    fused = network.model.layers[0].mlp.experts.down_proj
    slot = locate(network, f"{name}[2]")
    assert slot.parameter is fused
    assert torch.equal(slot.values, fused[2])
    gradient = torch.randn_like(fused)
    assert torch.equal(slot.view(gradient), gradient[2])
    for wrong in (f"{name}[3]", name):
        with pytest.raises(IncompatibleModels):
            locate(network, wrong)


def test_what_cannot_be_addressed_is_named(tiny_llama: Any, tmp_path: Path, reduction: MakeReduction) -> None:
    path = tiny_llama(tmp_path / "model")
    bench = workbench(path, None, UnitContext(tmp_path))
    with pytest.raises(IncompatibleModels, match=r"model\.layers\.9\.q\.weight"):
        locate(bench.model.network, "model.layers.9.q.weight")
    square = reduction(path, Q, 5)
    slot = locate(bench.model.network, Q).values
    slot.copy_(slot.T.clone())  # as if transformers kept it transposed
    with pytest.raises(IncompatibleModels, match="q_proj"):
        bench.apply([square])
