from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from aidocks.errors import IncompatibleModels
from aidocks.laser.spectrum import reduce_rank
from aidocks.laser.workbench import Workbench, parameter_slot, workbench
from aidocks.plan import UnitContext


def states(bench: Workbench) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in bench.model.network.state_dict().items()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in one if not torch.equal(one[name], other[name])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_state_is_reached_exactly_and_left_without_a_trace(
    tiny_llama: Any, tmp_path: Path, dtype: torch.dtype
) -> None:
    path = tiny_llama(tmp_path / "model", dtype=dtype)
    context = UnitContext(tmp_path)
    bench = workbench(path, None, context)
    assert workbench(path, None, context) is bench
    q, up = "model.layers.1.self_attn.q_proj.weight", "model.layers.2.mlp.up_proj.weight"
    base = states(bench)
    bench.apply({q: 5, up: 60})
    both = states(bench)
    assert differing(base, both) == {q, up}
    assert torch.equal(both[up], reduce_rank(base[up], 60))
    bench.apply({up: 60})
    assert differing(base, states(bench)) == {up}
    bench.apply({q: 9, up: 30})
    bench.apply({up: 60, q: 5})
    assert differing(both, states(bench)) == set()
    bench.apply({})
    assert differing(base, states(bench)) == set()


def test_an_interrupted_change_is_undone_by_the_next(
    tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = workbench(tiny_llama(tmp_path / "model"), None, UnitContext(tmp_path))
    base = states(bench)
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]

    def fails_on_the_second(stored: torch.Tensor, rank: int) -> torch.Tensor:
        if rank == 7:
            raise KeyboardInterrupt
        return reduce_rank(stored, rank)

    monkeypatch.setattr("aidocks.laser.workbench.reduce_rank", fails_on_the_second)
    with pytest.raises(KeyboardInterrupt):
        bench.apply({names[0]: 3, names[1]: 7})
    assert differing(base, states(bench)) == {names[0]}
    bench.apply({})
    assert differing(base, states(bench)) == set()


def test_gpt2_matrices_are_found_without_their_prefix(shared_data: Path, tmp_path: Path) -> None:
    bench = workbench(shared_data / "models" / "gpt2-shakespeare-char", None, UnitContext(tmp_path))
    name = "transformer.h.1.mlp.c_fc.weight"
    slot = parameter_slot(bench.model.network, name)
    assert (
        parameter_slot(bench.model.network, name.removeprefix("transformer.")).data_ptr() == slot.data_ptr()
    )
    before = slot.clone()
    bench.apply({name: 4})
    assert int(torch.linalg.matrix_rank(slot, rtol=1e-4)) == 4
    bench.apply({})
    assert torch.equal(slot, before)


def test_fused_experts_are_addressed_one_by_one(tmp_path: Path) -> None:
    from safetensors.torch import load_file
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
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    network = MixtralForCausalLM.from_pretrained(tmp_path)
    for name, stored in load_file(tmp_path / "model.safetensors").items():
        if ".layers." in name and stored.ndim == 2:
            assert torch.equal(parameter_slot(network, name), stored), name
    slot = parameter_slot(network, "model.layers.0.block_sparse_moe.experts.1.w3.weight")
    slot.zero_()
    fused = network.model.layers[0].mlp.experts.gate_up_proj
    assert [bool((fused[e, 24:] == 0).all()) for e in range(3)] == [False, True, False]
    assert not bool((fused[:, :24] == 0).all())


def test_what_cannot_be_addressed_is_named(tiny_llama: Any, tmp_path: Path) -> None:
    bench = workbench(tiny_llama(tmp_path / "model"), None, UnitContext(tmp_path))
    with pytest.raises(IncompatibleModels, match=r"model\.layers\.9\.q\.weight"):
        parameter_slot(bench.model.network, "model.layers.9.q.weight")
