from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from aidocks.checkpoints.files import OutputFile
from aidocks.checkpoints.reader import Checkpoint
from aidocks.evaluate.objectives import ObjectiveSource
from aidocks.evaluate.scoring import Batch, load_task
from aidocks.evaluate.texts import TextSource
from aidocks.laser.calibration import (
    CollectCovariances,
    add_outer,
    calibration_groups,
    collect_moments,
    linear_layers,
    load_covariance,
    mirror,
    moments_bytes,
)
from aidocks.laser.matrices import Matrix, find_matrices
from aidocks.laser.workbench import locate_all
from aidocks.plan import UnitContext

TEXT = ObjectiveSource(
    metric="perplexity",
    text=TextSource(name="prose"),
    seq_length=24,
    sizes={"calibration": 10, "search": 8, "held_out": 8, "report": 8},
)
# Questions are padded, and have answers of several tokens, so several rows each.
QUESTIONS = ObjectiveSource(
    metric="accuracy",
    text=TextSource(name="capitals"),
    sizes={"calibration": 26, "search": 36, "held_out": 30, "report": 30},
)
KINDS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
ADDRESSES = tuple(
    f"model.layers.{layer}.{block}.{kind}.weight"
    for layer in range(2)
    for block, kinds in KINDS.items()
    for kind in kinds
)


@pytest.fixture(scope="module")
def model(tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tiny_llama(tmp_path_factory.mktemp("tiny") / "model", num_hidden_layers=2)
    return path


def collect(model: Path, directory: Path, *objectives: ObjectiveSource, shards: int = 1) -> list[OutputFile]:
    context = UnitContext(directory)
    units = [
        CollectCovariances(
            checkpoint=model,
            objectives=objectives,
            matrices=ADDRESSES,
            directory=directory,
            shard=shard,
            shards=shards,
        )
        for shard in range(shards)
    ]
    assert len({unit.label for unit in units}) == shards
    return [file for unit in units for file in unit.outputs(unit.run(context))]


def captured(network: Any, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
    """Return what flows into each layer, row by row and without any padding: [tokens, I]."""
    found: dict[str, list[torch.Tensor]] = {address: [] for address in ADDRESSES}

    def keep(address: str) -> Callable[..., None]:
        return lambda module, inputs: found[address].append(inputs[0].detach()[0].double())

    hooks = [
        network.get_submodule(address.removesuffix(".weight")).register_forward_pre_hook(keep(address))
        for address in ADDRESSES
    ]
    for batch in batches:
        for ids_T, mask_T in zip(batch.ids_BT, batch.mask_BT, strict=True):
            network(input_ids=ids_T[mask_T][None])
    for hook in hooks:
        hook.remove()
    return {address: torch.cat(parts) for address, parts in found.items()}


@pytest.mark.parametrize("objective", [TEXT, QUESTIONS], ids=["text", "padded questions"])
def test_covariances_are_those_of_the_inputs(model: Path, tmp_path: Path, objective: ObjectiveSource) -> None:
    from aidocks.evaluate.causal_lm import load

    files = collect(model, tmp_path, objective)
    loaded = load(model, None, "cpu")
    task = load_task(objective, "calibration", loaded.tokenizer)
    assert (objective is QUESTIONS) == any(not bool(batch.mask_BT.all()) for batch in task.batches)
    for address, x_TI in captured(loaded.network, task.batches).items():
        covariance = load_covariance(files, address)
        assert covariance is not None
        assert covariance.dtype is torch.float64
        torch.testing.assert_close(covariance, x_TI.mT @ x_TI / len(x_TI), rtol=1e-4, atol=1e-6)


def test_layers_that_read_the_same_share_one_matrix(model: Path, tmp_path: Path) -> None:
    (file,) = collect(model, tmp_path, TEXT)
    with safe_open(file.path, framework="pt") as opened:
        kinds = sorted(key.split(".")[-2] for key in opened.keys())  # noqa: SIM118
    assert kinds == sorted(2 * ["q_proj", "o_proj", "gate_proj", "down_proj"])
    attention = [load_covariance([file], address) for address in ADDRESSES[:3]]
    assert torch.equal(attention[0], attention[1])
    assert torch.equal(attention[0], attention[2])


def test_shares_add_up_to_the_whole_and_every_run_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    long = TEXT.model_copy(update={"seq_length": 300})  # three chunks a batch
    whole, shares = (
        collect(model, tmp_path / "whole", long),
        collect(model, tmp_path / "shares", long, shards=3),
    )
    for address in ADDRESSES:
        torch.testing.assert_close(
            load_covariance(shares, address), load_covariance(whole, address), rtol=1e-5, atol=1e-7
        )
    assert collect(model, tmp_path / "again", long)[0].sha256 == whole[0].sha256
    # A share without any batch is an empty file, not a failure.
    many = collect(model, tmp_path / "many", TEXT, shards=2)
    torch.testing.assert_close(
        load_covariance(many, ADDRESSES[0]),
        load_covariance(collect(model, tmp_path / "one", TEXT), ADDRESSES[0]),
    )


def test_several_objectives_are_one_sum_in_which_each_counts_by_its_tokens(
    model: Path, tmp_path: Path
) -> None:
    both = collect(model, tmp_path / "both", TEXT, QUESTIONS, shards=2)
    assert len(both) == 2
    apart = [
        file
        for number, objective in enumerate((TEXT, QUESTIONS))
        for file in collect(model, tmp_path / str(number), objective, shards=2)
    ]
    for address in ADDRESSES:
        torch.testing.assert_close(
            load_covariance(both, address), load_covariance(apart, address), rtol=1e-5, atol=1e-7
        )


def test_groups_of_matrices_together_are_the_whole(model: Path, tmp_path: Path) -> None:
    matrices = find_matrices(Checkpoint(model).entries)
    widths = {m.address: m.shape[1] for m in matrices}
    layer = 3 * 4 * widths[ADDRESSES[0]] ** 2 + 4 * widths[ADDRESSES[6]] ** 2
    assert moments_bytes(matrices) == 2 * layer
    (whole,) = collect(model, tmp_path / "whole", TEXT)
    assert 0 <= whole.bytes - 2 * layer < 4096
    groups = calibration_groups(matrices, layer)
    assert [set(group) for group in groups] == [set(ADDRESSES[:7]), set(ADDRESSES[7:])]
    context = UnitContext(tmp_path)
    units = [
        CollectCovariances(checkpoint=model, objectives=(TEXT,), matrices=group, directory=tmp_path)
        for group in groups
    ]
    assert len({unit.label for unit in units}) == 2
    parts = [file for unit in units for file in unit.run(context).files]
    for address in ADDRESSES:
        assert torch.equal(load_covariance(parts, address), load_covariance([whole], address))


def matrix(name: str, inputs: int, expert: int | None = None, layer: int | None = 0) -> Matrix:
    return Matrix(name=name, layer=layer, kind="k", shape=(8, inputs), dtype="BF16", expert=expert)


def test_matrices_are_grouped_by_what_their_inputs_take() -> None:
    def layer(number: int) -> list[Matrix]:
        names = {"self_attn.q_proj": 4, "self_attn.k_proj": 4, "self_attn.v_proj": 4, "self_attn.o_proj": 4,
                 "mlp.gate_proj": 4, "mlp.up_proj": 4, "mlp.down_proj": 6}  # fmt: skip
        return [matrix(f"layers.{number}.{n}.weight", width, layer=number) for n, width in names.items()]

    one = 4 * (3 * 4 * 4 + 6 * 6)
    matrices = [*layer(2), *layer(0), *layer(1), matrix("lm_head.weight", 5, layer=None)]
    assert moments_bytes(matrices) == 3 * one + 4 * 5 * 5
    assert calibration_groups([]) == ()
    assert len(calibration_groups(matrices)) == 1
    assert [{m.split(".")[1] for m in g} for g in calibration_groups(matrices, 2 * one)] == [
        {"0", "1"},
        {"2", "weight"},
    ]
    # Too large together: the readers of one input still are.
    for limit in (1, 4 * 4 * 4, 4 * 6 * 6 - 1):
        groups = calibration_groups(layer(0), limit)
        assert sorted(sum(groups, ())) == sorted(m.address for m in layer(0))
        assert all(len(group) == 1 or _bytes(layer(0), group) <= limit or _same(group) for group in groups)
        attention = next(group for group in groups if "layers.0.self_attn.q_proj.weight" in group)
        assert {"layers.0.self_attn.k_proj.weight", "layers.0.self_attn.v_proj.weight"} <= set(attention)


def _bytes(matrices: Sequence[Matrix], group: Sequence[str]) -> int:
    return moments_bytes(m for m in matrices if m.address in group)


def _same(group: Sequence[str]) -> bool:
    return _bytes([matrix(address, 1) for address in group], group) == 4


def test_experts_are_apart_and_slices_left_out() -> None:
    dense = [matrix("layers.0.o_proj.weight", 4), matrix("layers.1.o_proj.weight", 4, layer=1)]
    experts = [matrix(f"layers.0.mlp.experts.{number}.w1.weight", 400) for number in range(3)]
    fused = [matrix("layers.0.mlp.experts.up", 400, number) for number in range(3)]
    assert moments_bytes([*dense, *experts, *fused]) == moments_bytes(dense)
    whole, *others = calibration_groups([*dense, *experts, *fused], 4 * 400**2)
    assert set(whole) == {m.address for m in dense}
    assert others == [(m.address,) for m in experts]


def test_the_parameters_of_a_network_are_looked_up_once(model: Path) -> None:
    from aidocks.evaluate.causal_lm import load

    network = load(model, None, "cpu").network
    calls = []

    class Counted(type(network)):  # type: ignore[misc]
        def named_parameters(self, *args: Any, **fields: Any) -> Any:
            if fields.get("recurse", True):
                calls.append(1)
            return super().named_parameters(*args, **fields)

    network.__class__ = Counted
    assert list(linear_layers(network, ADDRESSES)) == list(ADDRESSES)
    assert len(calls) == 1
    assert all(
        slot.parameter is network.get_parameter(a) for a, slot in locate_all(network, ADDRESSES).items()
    )


def test_only_linear_layers_have_inputs_here(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    batches = load_task(TEXT, "calibration", tokenizer).batches
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=64, n_embd=16, n_layer=1, n_head=2))
    # A transposed convolution; the embeddings, which the head shares.
    addresses = ["transformer.h.0.mlp.c_fc.weight", "transformer.wte.weight"]
    assert not collect_moments(gpt2, addresses, batches).sums
    mixtral = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=512,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=2,
        )
    )
    fused = "model.layers.0.block_sparse_moe.experts.1.w3.weight"
    query, head = "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"
    moments = collect_moments(mixtral, [fused, query, head], batches)
    assert set(moments.sums) == {query, head}
    # All tokens, also of the head.
    assert set(moments.tokens.values()) == {10 * 24}
    assert linear_layers(mixtral, [head]) == {head: mixtral.lm_head}


def test_what_nobody_saw_is_not_there(model: Path, tmp_path: Path) -> None:
    files = collect(model, tmp_path, TEXT)
    assert load_covariance(files, "model.layers.7.mlp.up_proj.weight") is None
    assert load_covariance([], ADDRESSES[0]) is None


@settings(deadline=None, max_examples=30)
@given(width=st.integers(1, 600), tokens=st.integers(0, 5), seed=st.integers(0, 2**16))
def test_the_blocks_make_up_the_outer_product(width: int, tokens: int, seed: int) -> None:
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    total = torch.zeros(width, width)
    add_outer(total, x)
    add_outer(total, 2 * x)
    mirror(total)
    torch.testing.assert_close(total, 5 * x.mT @ x)
    assert torch.equal(total, total.mT)
