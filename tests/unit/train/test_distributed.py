"""Two processes on a CPU: the same curve as one process, with and without DeepSpeed's stages."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("trl")
pytest.importorskip("deepspeed")

from aidocks.errors import InvalidSpec
from aidocks.training.checkpoints import checkpoint_name
from aidocks.training.launch import _environment, _free_port, read_outcome
from aidocks.training.process import STARTER
from aidocks.training.run import LLMTraining
from tests.support.small_training import curve, small_training
from train.distributed import Place, check_joined, check_same_beginning, choose_precision
from train.zero import completed

_SEVERAL = Path(__file__).parents[2] / "support" / "train_several.py"
_PLACE = Place(rank=0, world_size=2, local_rank=0, device="cpu", gpu=False)
_RESUMED = ("lora-ddp", "lora-2")
_ZERO: dict[str, Any] = {"lora-1": 1, "lora-2": 2, "lora-3": 3, "full-2": 2, "full-3": 3}


def _wait_for(members: list[subprocess.Popen[bytes]]) -> list[int | None]:
    """Return the exit codes when all have ended, or one has failed, for which the other would wait."""
    while True:
        codes = [member.poll() for member in members]
        if any(codes) or None not in codes:
            return codes
        time.sleep(0.1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, stories260k: Path) -> dict[str, LLMTraining]:
    """One gang of two that trains one after another, since most of the time goes into imports."""
    root = tmp_path_factory.mktemp("gang")

    def make(name: str, how: str, **given: object) -> LLMTraining:
        return small_training(
            root / name,
            stories260k,
            adapter=how.partition("-")[0],
            per_device_train_batch_size=2,
            max_steps=6,
            save_steps=5,
            save_total_limit=3,
            deepspeed={"zero_optimization": {"stage": _ZERO[how]}} if how in _ZERO else None,
            **given,
        )

    trainings: dict[str, LLMTraining] = {}
    # Those without DeepSpeed first: after its stage 3 a process divides whatever it loads.
    for name in ("lora-ddp", "full-ddp", *_ZERO):
        trainings[name] = make(name, name)
        if name in _RESUMED:
            # In the second epoch, which has four steps like the first.
            resume = trainings[name].checkpoints / checkpoint_name(5)
            trainings[f"{name} again"] = make(f"{name} again", name, resume=resume)
    paths = [str(training.story.parent / "training.json") for training in trainings.values()]
    for path, training in zip(paths, trainings.values(), strict=True):
        Path(path).write_text(training.model_dump_json())
    port, members = _free_port(), []
    for rank in range(2):
        environment = _environment(rank, 2, 1, port)
        del environment[STARTER]
        with (root / f"log-{rank}.txt").open("wb") as log:
            command = [sys.executable, str(_SEVERAL), *paths]
            members.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        codes = _wait_for(members)
    finally:
        for member in members:
            member.kill()
            member.wait()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in root.glob("log-*.txt"))
    return trainings


@pytest.mark.parametrize("name", _RESUMED)
def test_a_gang_goes_on_in_a_later_epoch_as_if_it_had_not_died(
    name: str, trained: dict[str, LLMTraining]
) -> None:
    again = trained[f"{name} again"]
    assert read_outcome(again.story.parent).resumed_from == 5
    assert curve(again) == pytest.approx(curve(trained[name]), rel=1e-6)


@pytest.mark.parametrize("name", _ZERO)
def test_stages_of_zero_have_the_curve_of_plain_ddp(name: str, trained: dict[str, LLMTraining]) -> None:
    plain = trained[name.partition("-")[0] + "-ddp"]
    assert curve(trained[name]) == pytest.approx(curve(plain), rel=1e-3)


@pytest.mark.parametrize("name", _ZERO)
def test_stages_of_zero_share_out_the_optimiser_s_states(name: str, trained: dict[str, LLMTraining]) -> None:
    plain = read_outcome(trained[name.partition("-")[0] + "-ddp"].story.parent).optimizer_bytes
    shared = read_outcome(trained[name].story.parent).optimizer_bytes
    assert len(shared) == 2
    assert shared == pytest.approx([each / 2 for each in plain], rel=0.01)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_stage_3_gathers_is_what_plain_ddp_writes(kind: str, trained: dict[str, LLMTraining]) -> None:
    import torch
    from safetensors.torch import load_file

    plain, shared = (
        load_file(next(trained[f"{kind}-{how}"].output.glob("*.safetensors"))) for how in ("ddp", "3")
    )
    assert plain.keys() == shared.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(shared[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a training sets of this process's environment is as it was afterwards."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")


@pytest.mark.usefixtures("one_thread")
def test_two_processes_have_the_curve_of_one(
    trained: dict[str, LLMTraining], tmp_path: Path, stories260k: Path
) -> None:
    from train.loop import run
    from train.reporter import LocalReporter

    alone = small_training(tmp_path / "alone", stories260k, max_steps=6, save_steps=6)
    run(alone, LocalReporter(alone))
    assert curve(alone) == pytest.approx(curve(trained["lora-ddp"]), rel=1e-3)


@pytest.mark.usefixtures("one_thread")
def test_fewer_go_on_with_the_same_steps(
    trained: dict[str, LLMTraining], tmp_path: Path, stories260k: Path
) -> None:
    from train.loop import run
    from train.reporter import LocalReporter

    of_two = trained["lora-ddp"]
    alone = small_training(
        tmp_path / "alone",
        stories260k,
        per_device_train_batch_size=2,
        max_steps=6,
        save_steps=5,
        workers=2,
        resume=of_two.checkpoints / checkpoint_name(5),
    )
    run(alone, LocalReporter(alone))
    outcome = read_outcome(alone.story.parent)
    assert (outcome.world_size, outcome.resumed_from) == (1, 5)
    assert curve(alone) == pytest.approx(curve(of_two), rel=1e-5)
    assert "with the forward passes of 2" in alone.story.read_text()


def test_what_cannot_be_divided_among_processes_is_refused(tmp_path: Path, stories260k: Path) -> None:
    training = small_training(tmp_path / "three", stories260k, workers=3)
    assert [training.passes(size) for size in (1, 3)] == [3, 1]
    with pytest.raises(InvalidSpec, match="A step of 3 forward passes cannot be divided among 2 processes"):
        training.passes(2)


def test_deepspeed_that_was_silently_left_out_is_an_error() -> None:
    trainer = SimpleNamespace(model_wrapped=object(), args=SimpleNamespace(world_size=2))
    with pytest.raises(RuntimeError, match="DeepSpeed was configured, but the model is trained by object"):
        check_joined(trainer, _PLACE, deepspeed=True)
    with pytest.raises(RuntimeError, match="does not join their gradients"):
        check_joined(trainer, _PLACE, deepspeed=False)
    trainer.args.world_size = 1
    with pytest.raises(RuntimeError, match="counts 1 processes, but there are 2"):
        check_joined(trainer, _PLACE, deepspeed=True)


def test_a_user_s_own_configuration_stays() -> None:
    own = {"zero_optimization": {"stage": 3, "overlap_comm": True}, "gradient_clipping": 0.5}
    filled = completed(own, gpu=True)
    assert filled["gradient_clipping"] == 0.5
    assert filled["zero_optimization"]["overlap_comm"] is True
    assert filled["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    offloading = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    assert "offload_optimizer" not in completed(offloading, gpu=False)["zero_optimization"]


def test_bfloat16_that_cannot_be_trained_in_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.distributed.multiplies_bfloat16", lambda: True)
    assert choose_precision(None, _PLACE, deepspeed=False) == "bfloat16"
    assert choose_precision(None, _PLACE, deepspeed=True) == "float32"
    assert choose_precision("bfloat16", _PLACE, deepspeed=False) == "bfloat16"
    assert choose_precision("float32", _PLACE, deepspeed=True) == "float32"
    with pytest.raises(InvalidSpec, match="with DeepSpeed that needs a GPU") as caught:
        choose_precision("bfloat16", _PLACE, deepspeed=True)
    assert caught.value.field == "precision"


@pytest.mark.parametrize(("seen", "agreed"), [([4, 4], True), ([4, 0], False)])
def test_processes_that_see_different_checkpoints_do_not_begin(seen: list[int], agreed: bool) -> None:
    import torch

    gathered = SimpleNamespace(device="cpu", gather=lambda own: torch.tensor(seen))
    trainer = SimpleNamespace(accelerator=gathered)
    if agreed:
        check_same_beginning(trainer, 4)
    else:
        with pytest.raises(RuntimeError, match=r"of the steps \[4, 0\]"):
            check_same_beginning(trainer, 4)
