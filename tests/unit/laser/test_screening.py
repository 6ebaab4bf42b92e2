from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from aidocks.evaluate.causal_lm import load
from aidocks.evaluate.objectives import ObjectiveSource, size_objective
from aidocks.evaluate.scoring import Task, load_task, plain_forward
from aidocks.evaluate.texts import TextSource
from aidocks.laser import directions
from aidocks.laser.screening import (
    CutSums,
    Prediction,
    ScreenCandidate,
    ScreenCandidates,
    Screened,
    combine,
    screen,
)
from aidocks.laser.truncation import (
    activation_basis,
    load_basis,
    load_directions,
    reduce,
    save_basis,
    weight_basis,
)
from aidocks.laser.workbench import locate
from aidocks.plan import UnitContext

SIZES = {"calibration": 12, "search": 8, "held_out": 8, "report": 8}
TEXT = ObjectiveSource(metric="perplexity", text=TextSource(name="prose"), seq_length=24, sizes=SIZES)  # type: ignore[arg-type]
KINDS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.down_proj",
)


@pytest.fixture(scope="module")
def model(tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tiny_llama(
        tmp_path_factory.mktemp("tiny") / "model", num_hidden_layers=2, attention_bias=True
    )
    return path


def questions(model: Path) -> ObjectiveSource:
    source = ObjectiveSource(metric="accuracy", text=TextSource(name="capitals"))
    return size_objective(source, model)


def candidates_for(network: Any, addresses: Sequence[str], directory: Path) -> list[ScreenCandidate]:
    """Write both bases of every matrix, with second moments of the test's own."""
    found = []
    for number, address in enumerate(addresses):
        weight = locate(network, address).values
        width = weight.shape[1]
        inputs = torch.randn(40, width, generator=torch.Generator().manual_seed(number))
        inputs *= torch.logspace(0, 1, width)
        for truncation, basis in (
            ("weight", weight_basis(weight)),
            ("activation_aware", activation_basis(weight, inputs.mT @ inputs)),
        ):
            file = save_basis(directory / f"{number}-{truncation}.safetensors", basis)
            found.append(
                ScreenCandidate(
                    address=address,
                    truncation=truncation,  # type: ignore[arg-type]
                    basis=file.path,
                    sha256=file.sha256,
                    ranks=(1, 7, min(weight.shape) - 1, min(weight.shape)),
                    shrunken_ranks=(5,) if truncation == "weight" else (),
                )
            )
    return found


def difference(network: Any, candidate: ScreenCandidate, rank: int, shrink: bool) -> torch.Tensor:
    weight = locate(network, candidate.address).values
    return reduce(weight, load_basis(candidate.basis), rank, shrink=shrink) - weight


def changes_by_autograd(
    network: Any, task: Task, candidates: Sequence[ScreenCandidate]
) -> list[list[torch.Tensor]]:
    """Return <dL/dW, W_k - W> of every cut of every candidate: [items]."""
    found: list[list[list[float]]] = [[[] for _ in candidate.cuts] for candidate in candidates]
    forward = plain_forward(network)
    for batch in task.batches:
        losses = task.surrogate(batch, forward)
        for item in range(len(batch.items)):
            network.zero_grad()
            losses[item].backward(retain_graph=True)
            for candidate, cuts in zip(candidates, found, strict=True):
                slot = locate(network, candidate.address)
                assert slot.parameter.grad is not None
                gradient = slot.view(slot.parameter.grad)
                for (rank, shrink), values in zip(candidate.cuts, cuts, strict=True):
                    values.append(float((gradient * difference(network, candidate, rank, shrink)).sum()))
    network.zero_grad()
    return [[torch.tensor(values, dtype=torch.float64) for values in cuts] for cuts in found]


@pytest.mark.parametrize("kind", ["text", "questions"])
def test_predictions_are_those_of_autograd(model: Path, tmp_path: Path, kind: str) -> None:
    loaded = load(model, None, "cpu")
    for name, parameter in loaded.network.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    source = TEXT if kind == "text" else questions(model)
    task = load_task(source, "calibration", loaded.tokenizer)
    addresses = [f"model.layers.{layer}.{name}.weight" for layer in range(2) for name in KINDS]
    candidates = candidates_for(loaded.network, addresses, tmp_path)
    expected = changes_by_autograd(loaded.network, task, candidates)
    screened = screen(loaded.network, task, task.batches, candidates)
    assert screened.losses_per_item == (23 if kind == "text" else 1)
    predictions = iter(combine(candidates, [screened]))
    for candidate, cuts in zip(candidates, expected, strict=True):
        for (rank, shrink), changes in zip(candidate.cuts, cuts, strict=True):
            found = next(predictions)
            assert (found.address, found.truncation) == (candidate.address, candidate.truncation)
            assert (found.rank, found.shrink) == (rank, shrink)
            scale = 1e-4 * float(changes.abs().max()) + 1e-9
            assert found.mean == pytest.approx(float(changes.mean()), abs=scale)
            error = float(changes.std()) / len(changes) ** 0.5
            assert found.standard_error == pytest.approx(error, abs=scale)
            curvature = screened.losses_per_item * float(changes.var()) + float(changes.mean()) ** 2
            assert found.fisher == pytest.approx(curvature / 2, rel=1e-2, abs=scale)
            if rank == min(locate(loaded.network, candidate.address).values.shape) and not shrink:
                assert found.mean == found.standard_error == found.fisher == found.z == 0
    assert next(predictions, None) is None


def test_a_small_step_changes_the_loss_as_predicted(model: Path, tmp_path: Path) -> None:
    loaded = load(model, "float64", "cpu")
    task = load_task(TEXT, "calibration", loaded.tokenizer)
    addresses = [f"model.layers.1.{name}.weight" for name in KINDS]
    candidates = candidates_for(loaded.network, addresses, tmp_path)
    predictions = combine(candidates, [screen(loaded.network, task, task.batches, candidates)])

    def loss() -> float:
        with torch.no_grad():
            forward = plain_forward(loaded.network)
            return float(
                torch.cat([task.surrogate(batch, forward) for batch in task.batches]).double().mean()
            )

    for prediction in predictions:
        if prediction.rank != 7:
            continue
        candidate = next(
            c for c in candidates if (c.address, c.truncation) == (prediction.address, prediction.truncation)
        )
        slot = locate(loaded.network, prediction.address).values
        step = 1e-2 * difference(loaded.network, candidate, 7, shrink=False)
        slot.add_(step)
        after = loss()
        slot.sub_(2 * step)
        before = loss()
        slot.add_(step)
        assert (after - before) / 2e-2 == pytest.approx(prediction.mean, rel=2e-2, abs=1e-4)


def other_architectures() -> list[Any]:
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=64, n_embd=16, n_layer=2, n_head=2))
    mixtral = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=512,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=3,
        )
    )
    experts = "model.layers.0.block_sparse_moe.experts"
    return [
        pytest.param(gpt2, ["transformer.h.1.mlp.c_fc.weight", "transformer.wte.weight"], id="gpt2"),
        pytest.param(
            mixtral,
            [f"{experts}.0.w1.weight", f"{experts}.2.w3.weight", f"{experts}.2.w2.weight", "lm_head.weight"],
            id="mixtral",
        ),
    ]


@pytest.mark.parametrize(("network", "addresses"), other_architectures())
def test_what_is_not_a_linear_layer_is_predicted_from_its_gradient(
    model: Path, tmp_path: Path, network: Any, addresses: list[str]
) -> None:
    network = copy.deepcopy(network).eval()
    # Chunks that are so long that there are several batches.
    long = TEXT.model_copy(update={"seq_length": 60, "sizes": SIZES | {"calibration": 40}})
    task = load_task(long, "calibration", AutoTokenizer.from_pretrained(model))
    assert len(task.batches) > 2
    candidates = candidates_for(network, addresses, tmp_path)
    expected = changes_by_autograd(network, task, candidates)
    predictions = iter(combine(candidates, [screen(network, task, task.batches, candidates)]))
    for cuts in expected:
        for changes in cuts:
            found = next(predictions)
            scale = 1e-4 * float(changes.abs().max()) + 1e-9
            assert found.mean == pytest.approx(float(changes.mean()), abs=scale)
            # Of batches only; the same quantity, known less well.
            assert found.standard_error <= 4 * float(changes.std()) / len(changes) ** 0.5 + scale


def test_shares_together_say_what_the_whole_says(model: Path, tmp_path: Path) -> None:
    context = UnitContext(tmp_path)
    loaded = load(model, None, "cpu")
    candidates = tuple(candidates_for(loaded.network, ["model.layers.0.self_attn.v_proj.weight"], tmp_path))
    long = TEXT.model_copy(update={"seq_length": 200, "sizes": SIZES | {"calibration": 20}})

    def screened(groups: int) -> list[Screened]:
        units = [
            ScreenCandidates(
                checkpoint=model, objective=long, group=group, groups=groups, candidates=candidates
            )
            for group in range(groups)
        ]
        assert len({unit.unit_id for unit in units}) == len({unit.label for unit in units}) == groups
        return [unit.run(context) for unit in units]

    whole, shares = screened(1), screened(6)
    assert sum(share.items for share in shares) == whole[0].items == 20
    for one, other in zip(combine(candidates, whole), combine(candidates, shares), strict=True):
        assert one.mean == pytest.approx(other.mean, abs=1e-9)
        assert one.standard_error == pytest.approx(other.standard_error, abs=1e-9)
        assert one.fisher == pytest.approx(other.fisher, abs=1e-9)
    assert screened(6) == shares
    assert shares[-1].items == 0  # there are fewer batches than shares
    assert Screened.model_validate_json(shares[0].model_dump_json()) == shares[0]


@pytest.mark.parametrize(("room", "most_reads"), [(1 << 30, 1), (9000, None), (0, None)])
def test_directions_are_read_once_as_long_as_there_is_room(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, most_reads: int | None
) -> None:
    loaded = load(model, None, "cpu")
    long = TEXT.model_copy(update={"seq_length": 200, "sizes": SIZES | {"calibration": 20}})
    task = load_task(long, "calibration", loaded.tokenizer)
    assert len(task.batches) > 2
    addresses = [f"model.layers.1.{name}.weight" for name in KINDS]
    candidates = candidates_for(loaded.network, [*addresses, "model.embed_tokens.weight"], tmp_path)
    expected = screen(loaded.network, task, task.batches, candidates)
    reads: list[Path] = []
    begins: list[int] = []

    def counted(path: Path, first: int) -> torch.Tensor:
        reads.append(path)
        begins.append(first)
        return load_directions(path, first)

    monkeypatch.setattr(directions, "load_directions", counted)
    monkeypatch.setattr(directions, "_ROOM", room)
    network = load(model, None, "cpu").network
    assert screen(network, task, task.batches, candidates) == expected
    assert set(reads) == {candidate.basis for candidate in candidates}
    assert set(begins) == {0, 1}  # the first is kept by every cut, unless one shrinks it
    times = [reads.count(candidate.basis) for candidate in candidates]
    if most_reads is not None:
        assert max(times) == most_reads
    else:
        assert max(times) == len(task.batches)
        assert (min(times) == 1) == (room > 0)
    # Another share of the data for the same network asks for the same directions; other candidates have others.
    reads.clear()
    screen(network, task, task.batches[:1], candidates)
    assert len(reads) == (0 if most_reads else sum(count > 1 for count in times))
    screen(network, task, task.batches[:1], candidates[:1])
    assert reads[-1] == candidates[0].basis


def test_a_model_is_left_as_it_was(model: Path, tmp_path: Path) -> None:
    loaded = load(model, None, "cpu")
    network = loaded.network
    network.model.norm.weight.requires_grad_(False)
    task = load_task(TEXT, "calibration", loaded.tokenizer)
    addresses = ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"]
    candidates = candidates_for(network, addresses, tmp_path)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    asking = [parameter.requires_grad for parameter in network.parameters()]
    screen(network, task, task.batches, candidates)
    assert [parameter.requires_grad for parameter in network.parameters()] == asking
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())
    assert not any(p._post_accumulate_grad_hooks for p in network.parameters())


def test_a_gradient_that_is_not_finite_predicts_nothing(model: Path, tmp_path: Path) -> None:
    loaded = load(model, None, "cpu")
    task = load_task(TEXT, "calibration", loaded.tokenizer)
    candidates = candidates_for(loaded.network, ["model.layers.0.mlp.up_proj.weight"], tmp_path)
    loaded.network.model.norm.weight.data[0] = torch.nan
    screened = screen(loaded.network, task, task.batches, candidates)
    assert screened.sums == (None, None)
    assert Screened.model_validate_json(screened.model_dump_json()) == screened
    assert combine(candidates, [screened]) == []


def test_bfloat16_ranks_as_float32_does(stories260k: Path, tmp_path: Path) -> None:
    source = TEXT.model_copy(update={"seq_length": 64, "sizes": SIZES | {"calibration": 32}})
    predicted = {}
    for dtype in ("float32", "bfloat16"):
        loaded = load(stories260k, dtype, "cpu")
        task = load_task(source, "calibration", loaded.tokenizer)
        addresses = [
            f"model.layers.{layer}.{kind}.weight" for layer in (1, 3) for kind in (*KINDS, "mlp.up_proj")
        ]
        (tmp_path / dtype).mkdir()
        candidates = candidates_for(loaded.network, addresses, tmp_path / dtype)
        predicted[dtype] = combine(candidates, [screen(loaded.network, task, task.batches, candidates)])
    for key in ("z", "change"):
        one, other = ([getattr(p, key) for p in predictions] for predictions in predicted.values())
        ranks = [np.argsort(np.argsort(values)) for values in (one, other)]
        assert np.corrcoef(*ranks)[0, 1] > 0.95


changes = st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=20)


@given(values=changes, losses=st.integers(1, 100), split=st.integers(0, 20))
def test_the_figures_of_a_prediction(values: list[float], losses: int, split: int) -> None:
    candidate = ScreenCandidate(address="a", truncation="weight", basis=Path("b"), sha256="", ranks=(3,))
    groups = [
        Screened(
            items=len(part),
            losses_per_item=losses,
            sums=(
                CutSums(
                    samples=len(part), totals=(sum(part),), squares=(sum(value * value for value in part),)
                ),
            ),
        )
        for part in (values[:split], values[split:])
    ]
    (found,) = combine([candidate], groups)
    variance = float(np.var(values, ddof=1))
    assert found.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert found.standard_error == pytest.approx(np.sqrt(variance / len(values)), abs=1e-6)
    assert found.fisher == pytest.approx((losses * variance + np.mean(values) ** 2) / 2, abs=1e-9)
    assert found.change >= found.mean
    assert -1e9 <= found.z <= 1e9


def test_a_change_that_is_the_same_everywhere_is_certain() -> None:
    sure = Prediction(
        address="a", truncation="weight", rank=1, shrink=False, mean=-0.1, standard_error=0, fisher=0.01
    )
    assert sure.z == -1e9
    assert sure.model_copy(update={"mean": 0.0}).z == 0
    assert Prediction.model_validate_json(sure.model_dump_json()) == sure
