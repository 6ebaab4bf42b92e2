"""The check of a finished MoE: loaded as users will, with all of its weights, and its routing as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from aidocks.errors import CorruptCheckpoint
from aidocks.evaluate.texts import Domain, TextSource
from aidocks.moe.check import CheckMoE, Routing
from aidocks.plan import UnitContext

LAYERS, EXPERTS, PER_TOKEN, LENGTH = 3, 4, 2, 32
PNG = b"\x89PNG\r\n"
RECORDS = tuple(
    f"Clause {i}: the licensor grants {i} rights to everybody who asks for them." for i in range(80)
)
DOMAINS = (
    Domain(name="experts[1]", text=TextSource(name="experts[1]", records=RECORDS), chunks=3),
    Domain(name="experts[2]", text=TextSource(name="prose"), chunks=40),
)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS, "num_experts_per_tok": PER_TOKEN},
    "qwen2_moe": {
        "num_experts": EXPERTS,
        "num_experts_per_tok": PER_TOKEN,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 48,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
    },
    "qwen3_moe": {
        "num_experts": EXPERTS,
        "num_experts_per_tok": PER_TOKEN,
        "moe_intermediate_size": 48,
        "head_dim": 8,
        "norm_topk_prob": False,
    },
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama") / "model")


def make_moe(path: Path, tokenizer: Path, architecture: str = "mixtral") -> Path:
    config = AutoConfig.for_model(
        architecture,
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        **ARCHITECTURES[architecture],
    )
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # routers as uneven as real ones
        for layer in network.model.layers:
            layer.mlp.gate.weight.normal_(0, 0.5)
    network.save_pretrained(path)
    for file in tokenizer.glob("tokenizer*"):
        (path / file.name).write_bytes(file.read_bytes())
    return path


def unit(path: Path, **fields: Any) -> CheckMoE:
    config = json.loads((path / "config.json").read_text())
    block = "block_sparse_moe" if config["model_type"] == "mixtral" else "mlp"
    network = AutoModelForCausalLM.from_pretrained(path)
    defaults: dict[str, Any] = {
        "expert_names": ("base", "/secret/place/code", "org/math", "./story"),
        "routers": tuple(f"model.layers.{layer}.{block}.gate.weight" for layer in range(LAYERS)),
        "condition": (1.5, None, 7.0),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "domains": DOMAINS,
        "seq_length": LENGTH,
        "seed": 0,
    }
    return CheckMoE(model=path, **(defaults | fields))


def run(check: CheckMoE) -> Routing:
    carried = CheckMoE.model_validate_json(check.model_dump_json())
    assert carried.unit_id == check.unit_id
    routing = carried.run(UnitContext(check.model))
    assert Routing.model_validate_json(routing.model_dump_json()) == routing
    return routing


def expected_logits(path: Path, domain: Domain) -> tuple[torch.Tensor, ...]:
    """What transformers itself reports of the routers, per layer [tokens, experts]."""
    from aidocks.evaluate.causal_lm import load

    model = load(path, None, "cpu")
    tokens = model.chunks(domain.text, "held_out", LENGTH, domain.chunks).tokens
    with torch.inference_mode():
        return tuple(model.network(tokens, output_router_logits=True, use_cache=False).router_logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_routing_is_what_transformers_does(architecture: str, tmp_path: Path, tokenizer: Path) -> None:
    path = make_moe(tmp_path / "moe", tokenizer, architecture)
    routing = run(unit(path))
    detail = json.loads((path / "report" / "routing.json").read_text())
    loads, aux_f, aux_p = [], [], []
    for domain, found in zip(DOMAINS, routing.domains, strict=True):
        assert (found.domain, found.tokens) == (domain.name, LENGTH * domain.chunks)
        probabilities = [logits.float().softmax(-1) for logits in expected_logits(path, domain)]
        chosen = [layer.topk(PER_TOKEN) for layer in probabilities]
        counts = torch.stack([top.indices.flatten().bincount(minlength=EXPERTS) for top in chosen])
        load = counts / counts.sum(1, keepdim=True)
        shares = [top.values / top.values.sum(-1, keepdim=True) for top in chosen]
        if architecture == "qwen3_moe":  # made without renormalisation: what a token's experts give varies
            shares = [top.values for top in chosen]
        weight = torch.stack(
            [
                torch.zeros(EXPERTS).index_add_(0, top.indices.flatten(), share.flatten())
                for top, share in zip(chosen, shares, strict=True)
            ]
        )
        weight = weight / weight.sum(1, keepdim=True)
        assert torch.allclose(torch.tensor(detail["domains"][domain.name]["load"]), load, atol=1e-5)
        assert torch.allclose(torch.tensor(detail["domains"][domain.name]["weight"]), weight, atol=1e-5)
        assert torch.allclose(torch.tensor(found.load), load.mean(0), atol=1e-5)
        assert torch.allclose(torch.tensor(found.weight), weight.mean(0), atol=1e-5)
        loads.append(load)
        aux_f.append(counts / found.tokens)
        aux_p.append(torch.stack([layer.mean(0) for layer in probabilities]))
    # Texts count in equal parts, however long they are.
    assert torch.allclose(torch.tensor(routing.load), (loads[0] + loads[1]) / 2, atol=1e-5)
    mix = EXPERTS * (sum(aux_f) / 2 * sum(aux_p) / 2).sum(1)
    assert torch.allclose(torch.tensor(routing.aux_loss), mix, atol=1e-5)


def test_the_balance_loss_is_that_of_transformers(tmp_path: Path, tokenizer: Path) -> None:
    path = make_moe(tmp_path / "moe", tokenizer)
    routing = run(unit(path, domains=DOMAINS[1:]))
    for layer, logits in enumerate(expected_logits(path, DOMAINS[1])):
        expected = float(load_balancing_loss_func((logits,), EXPERTS, PER_TOKEN))
        assert routing.aux_loss[layer] == pytest.approx(expected, rel=1e-5)


def test_the_report_has_pictures_and_no_paths(tmp_path: Path, tokenizer: Path) -> None:
    path = make_moe(tmp_path / "moe", tokenizer)
    check = unit(path)
    routing = run(check)
    assert {file.path.name for file in check.outputs(routing)} == {
        "routing.png",
        "balance.png",
        "gates.png",
        "routing.json",
    }
    for file in routing.files:
        content = file.path.read_bytes()
        assert len(content) == file.bytes
        assert file.path.suffix != ".png" or content.startswith(PNG)
    text = (path / "report" / "routing.json").read_text()
    assert "secret" not in text
    detail = json.loads(text)
    assert detail["experts"] == ["base", "code", "org/math", "story"]
    cosines = torch.tensor(detail["gate_cosines"])
    assert torch.allclose(cosines.diagonal(), torch.ones(EXPERTS))
    assert torch.allclose(cosines, cosines.T)


def test_identical_routers_share_evenly(tmp_path: Path, tokenizer: Path) -> None:
    path = make_moe(tmp_path / "moe", tokenizer)
    network = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        for layer in network.model.layers:
            layer.mlp.gate.weight[:] = layer.mlp.gate.weight[0]
    network.save_pretrained(path)
    routing = run(unit(path))
    # Whichever two are chosen, each supplies half, and probabilities are even: that is what k means.
    assert routing.aux_loss == pytest.approx([PER_TOKEN] * LAYERS, rel=1e-5)
    assert sorted({round(share, 3) for row in routing.weight for share in row}) == [0.0, 0.5]


def change(path: Path, edit: Any) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(path / "model.safetensors")
    edit(weights)
    save_file(weights, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop("model.layers.1.block_sparse_moe.gate.weight"), "lacks 1 of its model's weights"),
        (
            lambda w: w.update({"model.layers.9.extra.weight": torch.zeros(2)}),
            "not know, the first .*layers.9.extra",
        ),
        (lambda w: w["model.norm.weight"].fill_(float("nan")), "logits are not finite"),
    ],
)
def test_a_broken_moe_is_refused(edit: Any, message: str, tmp_path: Path, tokenizer: Path) -> None:
    path = make_moe(tmp_path / "moe", tokenizer)
    check = unit(path)
    change(path, edit)
    with pytest.raises(CorruptCheckpoint, match=message):
        check.run(UnitContext(tmp_path))
    assert not (path / "report").exists()


def test_a_moe_of_another_size_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    check = unit(make_moe(tmp_path / "moe", tokenizer), parameters=7)
    with pytest.raises(CorruptCheckpoint, match="not 7 as planned"):
        check.run(UnitContext(tmp_path))


def test_a_dense_layer_among_others_is_refused(tmp_path: Path, tiny_llama: Any) -> None:
    path = tiny_llama(tmp_path / "dense")
    network = AutoModelForCausalLM.from_pretrained(path)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    check = CheckMoE(
        model=path, expert_names=(), routers=(), parameters=parameters, domains=DOMAINS, seq_length=32, seed=0
    )
    with pytest.raises(CorruptCheckpoint, match="Layer 0 of the MoE has no router"):
        check.run(UnitContext(tmp_path))


def test_the_common_text_does_not_count_for_load_and_balance_beside_others(
    tmp_path: Path, tokenizer: Path
) -> None:
    path = make_moe(tmp_path / "moe", tokenizer, "mixtral")
    own, common = DOMAINS[0], DOMAINS[1].model_copy(update={"name": "text"})
    alone = run(unit(path).model_copy(update={"domains": (own,)}))
    both = run(unit(path).model_copy(update={"domains": (own, common)}))
    assert (both.load, both.weight, both.aux_loss) == (alone.load, alone.weight, alone.aux_loss)
    assert [part.domain for part in both.domains] == [own.name, "text"]
    only = run(unit(path).model_copy(update={"domains": (common,)}))
    assert only.load != alone.load
