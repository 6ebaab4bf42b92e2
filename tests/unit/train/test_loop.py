"""The training loop in one process: its result, its curves, its checkpoints, and what stops it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("trl")

from aidocks.errors import InvalidSpec, MissingExtra
from aidocks.telling import StoryReader
from aidocks.training.checkpoints import complete_checkpoints
from aidocks.training.launch import read_outcome
from aidocks.training.run import AdapterSettings, LLMTraining, Reward
from tests.support.small_training import curve, points, small_training, write_rows
from tests.support.trainings import make_training
from train.loop import _explaining_deepspeed, _explaining_lack_of_memory, run
from train.methods import rows_left_out
from train.reporter import LocalReporter

#: Random in every step, so that going on is exact only with the random numbers of an undisturbed run.
_DROPOUT = AdapterSettings(rank=4, alpha=8, dropout=0.2)
_PICKLES = {".bin", ".pt", ".pth", ".pkl"}


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, stories260k: Path) -> LLMTraining:
    directory = tmp_path_factory.mktemp("undisturbed")
    held_out = write_rows(directory / "held_out.jsonl", 4)
    training = small_training(
        directory,
        stories260k,
        held_out=held_out,
        save_total_limit=3,
        adapter_settings=_DROPOUT,
        neftune_noise_alpha=2.0,
    )
    run(training, LocalReporter(training))
    return training


def _again(training: LLMTraining, directory: Path, **given: Any) -> LLMTraining:
    """Return the same training elsewhere."""
    return small_training(
        directory / "again",
        training.base,
        held_out=training.held_out,
        adapter_settings=training.adapter,
        **({"neftune_noise_alpha": 2.0} | given),
    )


def test_an_adapter_is_written_in_peft_s_layout_without_pickles(undisturbed: LLMTraining) -> None:
    trained = read_outcome(undisturbed.story.parent)
    names = {path.name for path in trained.files}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert not {path.suffix for path in trained.files} & _PICKLES
    config = json.loads((undisturbed.output / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/small-model"
    assert (trained.steps, trained.world_size, trained.attempts, trained.resumed_from) == (6, 1, 1, 0)
    assert 0 < trained.trainable < trained.parameters
    # Two moments of float32 for each trained parameter, and a counter for each tensor.
    assert trained.optimizer_bytes[0] == pytest.approx(8 * trained.trainable, rel=0.01)


def test_what_was_measured_is_told_and_kept(undisturbed: LLMTraining) -> None:
    told = StoryReader(undisturbed.story).read()
    steps = [each.data["step"] for each in told if each.kind == "metrics" and "loss" in each.data]
    assert steps == [1, 2, 3, 4, 5, 6]
    progress = [each for each in told if each.kind == "progress"]
    assert progress[-1].fraction == 1
    assert (progress[-1].label or "").startswith("step 6/6, loss ")
    assert [point.step for point in points(undisturbed) if point.eval_loss is not None] == [3, 6]
    tokens = [point.tokens for point in points(undisturbed) if point.loss is not None]
    assert tokens == sorted(tokens)
    assert any(undisturbed.tensorboard.iterdir())


def test_a_training_that_died_goes_on_as_if_it_had_not(undisturbed: LLMTraining, tmp_path: Path) -> None:
    """From a checkpoint at the end of an epoch, and with another number of checkpoints that are kept."""
    training = _again(undisturbed, tmp_path, save_total_limit=1)
    shutil.copytree(
        undisturbed.checkpoints / "checkpoint-00000004", training.checkpoints / "checkpoint-00000004"
    )
    for left in ("checkpoint-00000005.tmp-parts", "checkpoint-00000002.tmp-0123456789ab"):
        (training.checkpoints / left).mkdir()
    run(training, LocalReporter(training))
    assert curve(training) == curve(undisturbed)
    assert read_outcome(training.story.parent).resumed_from == 4
    assert [path.name for path in training.checkpoints.iterdir()] == ["checkpoint-00000006"]


def test_a_training_that_died_after_its_last_step_does_no_further_one(
    undisturbed: LLMTraining, tmp_path: Path
) -> None:
    """Its last checkpoint is in the middle of an epoch: transformers would go on with that."""
    training = _again(undisturbed, tmp_path)
    shutil.copytree(undisturbed.checkpoints, training.checkpoints)
    run(training, LocalReporter(training))
    trained = read_outcome(training.story.parent)
    assert (trained.steps, trained.resumed_from) == (6, 6)
    assert curve(training) == curve(undisturbed)
    one, other = (each.output / "adapter_model.safetensors" for each in (training, undisturbed))
    assert one.read_bytes() == other.read_bytes()


def test_another_job_s_checkpoint_is_the_beginning_in_the_middle_of_an_epoch(
    undisturbed: LLMTraining, tmp_path: Path
) -> None:
    training = _again(
        undisturbed, tmp_path, resume=undisturbed.checkpoints / "checkpoint-00000002", save_steps=6
    )
    run(training, LocalReporter(training))
    assert curve(training) == curve(undisturbed)


def test_a_loss_that_is_no_number_ends_the_training_and_keeps_what_was_good(
    tmp_path: Path, stories260k: Path
) -> None:
    training = small_training(
        tmp_path / "nan",
        stories260k,
        learning_rate=1e30,
        lr_scheduler_type="linear",
        save_steps=1,
        adapter="full",
    )
    with pytest.raises(InvalidSpec, match=r"of step \d.* learning rate of 1e\+30") as caught:
        run(training, LocalReporter(training))
    assert caught.value.field == "learning_rate"
    assert "checkpoint-" in (caught.value.hint or "")
    assert complete_checkpoints(training.checkpoints)
    with pytest.raises(InvalidSpec, match="learning rate"):
        read_outcome(training.story.parent)
    assert not training.output.exists()


def test_a_whole_model_is_written_in_the_type_of_its_base(tmp_path: Path, stories260k: Path) -> None:
    from safetensors import safe_open

    training = small_training(tmp_path / "full", stories260k, adapter="full", max_steps=2)
    run(training, LocalReporter(training))
    with (
        safe_open(training.output / "model.safetensors", "pt") as after,
        safe_open(stories260k / "model.safetensors", "pt") as before,
    ):
        assert set(after.keys()) == set(before.keys())
        name = "model.embed_tokens.weight"
        assert after.get_tensor(name).dtype == before.get_tensor(name).dtype
        assert not after.get_tensor(name).equal(before.get_tensor(name))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
    ],
)
def test_want_of_memory_is_explained(error: Exception, tmp_path: Path, stories260k: Path) -> None:
    training = small_training(tmp_path / "memory", stories260k)
    with (
        pytest.raises(InvalidSpec, match="a batch of 4 examples of up to 64 tokens") as caught,
        _explaining_lack_of_memory(training),
    ):
        raise error
    assert "per_device_train_batch_size" in str(caught.value.hint)


def test_a_tracker_that_is_not_installed_is_named(
    tmp_path: Path, stories260k: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.loop.find_spec", lambda name: None)
    training = small_training(tmp_path / "tracked", stories260k, report_to=("wandb",))
    with pytest.raises(MissingExtra, match="wandb"):
        run(training, LocalReporter(training))


def test_an_optimiser_whose_package_is_not_installed_is_named(
    tmp_path: Path, stories260k: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.loop.find_spec", lambda name: None)
    training = small_training(tmp_path / "eight", stories260k, optim="paged_adamw_8bit")
    with pytest.raises(MissingExtra, match="bitsandbytes") as caught:
        run(training, LocalReporter(training))
    assert caught.value.field == "optim"


def test_an_online_training_goes_on_as_if_it_had_not_died(tmp_path: Path, stories260k: Path) -> None:
    """In its second epoch: prompts come in the order of that one, and answers are drawn alike."""
    rows = [{"prompt": f"Once upon a time there was {what}"} for what in ("a cat", "the sun", "Tom", "a car")]

    def train(name: str, **given: Any) -> LLMTraining:
        training = make_training(
            tmp_path / name,
            stories260k,
            "grpo",
            rows,
            rewards=(Reward(kind="length", characters=30),),
            hyper={
                "max_steps": 4,
                "num_generations": 4,
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 2,
                "max_completion_length": 8,
                "save_steps": 3,
            },
            **given,
        )
        run(training, LocalReporter(training))
        return training

    whole = train("whole")
    again = train("again", resume=whole.checkpoints / "checkpoint-00000003")
    assert read_outcome(again.story.parent).resumed_from == 3
    for one, other in zip(points(again), points(whole), strict=True):
        assert (one.step, one.loss, one.grad_norm) == (other.step, other.loss, other.grad_norm)
        assert one.further["reward"] == other.further["reward"]


@pytest.mark.parametrize(("warmup_ratio", "steps"), [(0.03, 1), (0.5, 4)])
def test_the_first_step_learns_unless_the_rate_rises_for_longer(
    tmp_path: Path, stories260k: Path, warmup_ratio: float, steps: int
) -> None:
    training = small_training(
        tmp_path / "short",
        stories260k,
        max_steps=steps,
        warmup_ratio=warmup_ratio,
        lr_scheduler_type="linear",
    )
    run(training, LocalReporter(training))
    rates = [point.learning_rate for point in points(training) if point.loss is not None]
    peak = training.hyper.learning_rate
    assert rates == pytest.approx([peak] if steps == 1 else [0, peak / 2, peak, peak / 2])


def test_rows_that_are_left_out_are_told_and_noted(tmp_path: Path, stories260k: Path) -> None:
    rows = [{"prompt": "Hi", "completion": " there"}] * 3 + [{"prompt": "word " * 400, "completion": " end"}]
    training = make_training(
        tmp_path, stories260k, "sft", rows, held_out=rows[-1:], hyper={"max_steps": 1, "eval_steps": 1}
    )
    run(training, LocalReporter(training))
    notes = read_outcome(training.story.parent).notes
    assert notes == (
        "1 of 4 rows are not trained on: they are too long.",
        "1 of 1 held-out rows are not measured during the training: they are too long.",
    )
    assert set(notes) < {each.text for each in StoryReader(training.story).read()}


def test_of_packed_rows_nothing_is_said(tmp_path: Path, stories260k: Path) -> None:
    training = small_training(tmp_path / "packed", stories260k, packing=True)
    assert rows_left_out(SimpleNamespace(train_dataset=[1]), training) == ()


def test_a_whole_model_is_written_in_files_of_the_size_that_is_asked_for(
    tmp_path: Path, stories260k: Path
) -> None:
    training = small_training(
        tmp_path / "parts", stories260k, adapter="full", max_steps=1, max_shard_bytes=300_000
    )
    run(training, LocalReporter(training))
    parts = sorted(training.output.glob("model-*.safetensors"))
    assert len(parts) > 1
    assert set(parts) < set(read_outcome(training.story.parent).files)


def test_a_deepspeed_configuration_that_contradicts_the_request_is_explained() -> None:
    said = "Please correct the following DeepSpeed config values that mismatch TrainingArguments values:"
    with (
        pytest.raises(InvalidSpec, match="contradicts the request: ds a=1 vs b=2") as caught,
        _explaining_deepspeed(),
    ):
        raise ValueError(f"{said}\n- ds a=1 vs b=2")
    assert caught.value.field == "deepspeed"
    with pytest.raises(ValueError, match="something else"), _explaining_deepspeed():
        raise ValueError("something else")
