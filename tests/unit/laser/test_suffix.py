from __future__ import annotations

from typing import Any

import pytest
import torch

from aidocks.evaluate.scoring import plain_forward
from aidocks.laser.suffix import LEAST_LIMIT, SuffixForward, cache_limit, decoder_layers

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "vocab_size": 96},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 3},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
}


def make(architecture: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = ARCHITECTURES.get(architecture, {})
    shape = {} if architecture == "gpt2" else SMALL
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **(shape | settings | more))
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def batch(rows: int = 3, length: int = 12, padding: int = 0) -> tuple[torch.Tensor, torch.Tensor | None]:
    ids_BT = torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(1))
    if not padding:
        return ids_BT, None
    mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    mask_BT[-1, length - padding :] = False
    return ids_BT, mask_BT


def first_matrix(layer: torch.nn.Module) -> torch.nn.Parameter:
    return next(parameter for parameter in layer.parameters() if parameter.ndim >= 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.inference_mode()
def test_suffixes_give_the_bits_of_a_whole_forward(architecture: str, dtype: torch.dtype) -> None:
    network = make(architecture, dtype)
    suffix, whole = SuffixForward(network), plain_forward(network)
    assert suffix.depth == 4, "an architecture of this list has a chain of layers"
    for padding, positions_K in ((0, None), (5, torch.tensor([2, 3, 6]))):
        ids_BT, mask_BT = batch(padding=padding)
        base = suffix.forward(padding, ids_BT, mask_BT, positions_K, start=4).clone()
        assert torch.equal(base, whole(ids_BT, mask_BT, positions_K))
        for start, layer in enumerate(decoder_layers(network)):
            matrix = first_matrix(layer)
            assert suffix.start_of(matrix) == start
            original = matrix.data.clone()
            matrix.data.mul_(1.5)
            suffix.layers_run = 0
            changed = suffix.forward(padding, ids_BT, mask_BT, positions_K, start=start)
            assert suffix.layers_run == 4 - start
            assert torch.equal(changed, whole(ids_BT, mask_BT, positions_K))
            assert not torch.equal(changed, base)
            matrix.data.copy_(original)
        assert torch.equal(suffix.forward(padding, ids_BT, mask_BT, positions_K, start=4), base)
    assert all("forward" not in module.__dict__ for module in network.modules())


@torch.inference_mode()
def test_a_new_base_keeps_what_lies_below_the_change() -> None:
    network = make("llama")
    suffix, whole = SuffixForward(network), plain_forward(network)
    ids_BT, _ = batch()
    suffix.forward(0, ids_BT, None, None, start=suffix.depth)
    first_matrix(decoder_layers(network)[2]).data.mul_(0.5)
    suffix.forget(2)
    suffix.layers_run = 0
    assert torch.equal(suffix.forward(0, ids_BT, None, None, start=4), whole(ids_BT, None, None))
    assert suffix.layers_run == 2
    suffix.forget(0)
    assert suffix.kept_bytes == 0


@torch.inference_mode()
@pytest.mark.parametrize(("share", "stride"), [(1.0, 1), (0.5, 2), (0.3, 4), (0.01, 5)])
def test_what_is_kept_stays_below_the_limit(share: float, stride: int) -> None:
    network = make("llama")
    ids_BT, _ = batch()
    everything = 4 * ids_BT.numel() * 32 * 4
    suffix, whole = SuffixForward(network, limit=int(share * everything)), plain_forward(network)
    suffix.expect(ids_BT.numel())
    assert suffix.stride == stride
    suffix.forward(0, ids_BT, None, None, start=suffix.depth)
    assert suffix.kept_bytes <= share * everything
    for start, layer in enumerate(decoder_layers(network)):
        matrix = first_matrix(layer)
        original = matrix.data.clone()
        matrix.data.mul_(1.5)
        assert torch.equal(suffix.forward(0, ids_BT, None, None, start=start), whole(ids_BT, None, None))
        matrix.data.copy_(original)


@torch.inference_mode()
def test_more_batches_than_expected_thin_out_what_is_kept() -> None:
    ids_BT, _ = batch()
    network = make("llama")
    suffix, whole = SuffixForward(network, limit=4 * ids_BT.numel() * 32 * 4), plain_forward(network)
    suffix.expect(ids_BT.numel())
    suffix.forward(0, ids_BT, None, None, start=4)
    everything = suffix.kept_bytes
    for tokens, stride, left in ((2, 2, 2), (3, 4, 1), (5, 5, 0)):
        suffix.expect(tokens * ids_BT.numel())
        assert suffix.stride == stride
        assert suffix.kept_bytes == everything * left / 4
        assert torch.equal(suffix.forward(0, ids_BT, None, None, start=3), whole(ids_BT, None, None))


@torch.inference_mode()
def test_a_changed_network_keeps_what_lies_below_its_change() -> None:
    network = make("llama")
    suffix, whole = SuffixForward(network), plain_forward(network)
    ids_BT, _ = batch()
    before = whole(ids_BT, None, None)
    last = first_matrix(decoder_layers(network)[3])
    original = last.data.clone()
    last.data.mul_(1.5)
    for layers in (4, 1):
        suffix.layers_run = 0
        assert torch.equal(suffix.forward(0, ids_BT, None, None, start=3), whole(ids_BT, None, None))
        assert suffix.layers_run == layers
    last.data.copy_(original)
    suffix.layers_run = 0
    assert torch.equal(suffix.forward(0, ids_BT, None, None, start=4), before)
    assert suffix.layers_run == 1


def test_a_workers_limit_is_its_share_of_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr("aidocks.laser.suffix._available_memory", lambda: 64 << 30)
    assert cache_limit(cpu, 1.0) == 16 << 30
    assert cache_limit(cpu, 0.5) == 8 << 30
    assert cache_limit(cpu, 0.01) == LEAST_LIMIT == 1 << 30
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (40 << 30, 80 << 30))
    assert cache_limit(torch.device("cuda:0"), 0.1) == 10 << 30
    monkeypatch.undo()
    assert cache_limit(cpu, 1.0) >= LEAST_LIMIT


@torch.inference_mode()
def test_embeddings_and_heads_have_their_place() -> None:
    untied = make("llama")
    suffix = SuffixForward(untied)
    assert suffix.start_of(untied.lm_head.weight) == 4
    assert suffix.start_of(untied.model.embed_tokens.weight) == 0
    assert suffix.start_of(untied.model.norm.weight) == 0
    ids_BT, _ = batch()
    suffix.forward(0, ids_BT, None, None, start=suffix.depth)
    untied.lm_head.weight.data.mul_(0.5)
    whole = plain_forward(untied)(ids_BT, None, None)
    assert torch.equal(suffix.forward(0, ids_BT, None, None, start=4), whole)
    tied = make("qwen2")
    assert SuffixForward(tied).start_of(tied.lm_head.weight) == 0


@torch.inference_mode()
def test_layers_with_secret_passages_run_whole() -> None:
    network = make("llama")
    second, last = network.model.layers[1], network.model.layers[3]
    own_second, own_last = second.forward, last.forward
    passed: list[torch.Tensor] = []

    def leaves_something(hidden: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        passed.append(own_second(hidden, *rest, **named))
        return passed[-1]

    second.forward = leaves_something
    last.forward = lambda hidden, *rest, **named: own_last(hidden + passed.pop(), *rest, **named)
    suffix, whole = SuffixForward(network), plain_forward(network)
    assert suffix.depth == 0
    assert suffix.start_of(first_matrix(last)) == 0
    ids_BT, _ = batch()
    suffix.forward(0, ids_BT, None, None, start=suffix.depth)
    assert torch.equal(suffix.forward(0, ids_BT, None, None), whole(ids_BT, None, None))


@torch.inference_mode()
def test_layers_that_write_into_what_they_get_run_whole() -> None:
    network = make("llama")
    last = network.model.layers[3]
    own = last.forward
    last.forward = lambda hidden, *rest, **named: own(hidden.add_(1), *rest, **named)
    assert SuffixForward(network).depth == 0


@torch.inference_mode()
def test_layers_that_run_twice_run_whole() -> None:
    network = make("llama")
    network.model.layers[2] = network.model.layers[1]
    assert SuffixForward(network).depth == 0


@torch.inference_mode()
def test_an_interrupted_forward_leaves_the_network_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    network = make("llama")
    suffix, whole = SuffixForward(network), plain_forward(network)
    ids_BT, _ = batch()
    base = suffix.forward(0, ids_BT, None, None, start=suffix.depth).clone()
    with monkeypatch.context() as broken:
        broken.setattr(network.model.norm, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            suffix.forward(0, ids_BT, None, None, start=3)
    assert torch.equal(whole(ids_BT, None, None), base)
