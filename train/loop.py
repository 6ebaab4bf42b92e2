"""The training loop, callable without Ray: whoever starts the processes sets their environment and gives a reporter.

Top-level imports are light, because libraries read the environment when they are first imported, and unsloth patches
those that are imported after it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from aidocks.checkpoints.files import write_text
from aidocks.checkpoints.space import format_bytes
from aidocks.errors import AIDocksError, InvalidSpec, MissingExtra
from aidocks.telling import Told
from aidocks.training.checkpoints import step_of
from aidocks.training.kinds import FAMILIES
from aidocks.training.launch import FAILURE_FILE, OUTCOME_FILE
from aidocks.training.run import Backend, History, Trained, Training
from train.distributed import (
    Place,
    check_joined,
    check_same_beginning,
    choose_precision,
    find_place,
    join,
    prepare_environment,
)

if TYPE_CHECKING:
    from train.callbacks import Curves
    from train.reporter import Reporter

_ATTEMPTS_FILE = "attempts"
_PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "sentence-transformers",
    "accelerate",
    "datasets",
    "deepspeed",
    "unsloth",
)
_OF_BITSANDBYTES = ("8bit", "32bit")
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")


class Family(Protocol):
    """What is particular to a kind of training: the package that `aidocks.training.kinds.FAMILIES` names has it."""

    def choose_backend(self, training: Any, place: Place) -> tuple[Backend, str]:
        """Choose what trains, before anything imports it; return that, and why, in a sentence for people."""
        ...

    def build_trainer(
        self, training: Any, place: Place, backend: Backend, arguments: dict[str, Any], callbacks: list[Any]
    ) -> Any:
        """Load model and rows, apply the adapter, and return a transformers.Trainer that is ready to train."""
        ...

    def rows_left_out(self, trainer: Any, training: Any) -> tuple[str, ...]:
        """Say how many rows the trainer has left out, and why."""
        ...

    def save_result(self, trainer: Any, training: Any) -> tuple[Path, ...]:
        """Write what was trained to `training.output`, by the first process; return the files."""
        ...


def run(training: Training, reporter: Reporter) -> None:
    """Train, from the last checkpoint where there is one, and write the result.

    The first process writes ``training.output``, ``training.history`` and, last of all, the outcome (`Trained`) beside
    the story. Every process of the gang calls this; ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and
    ``MASTER_PORT`` say which it is, and without them it is alone.

    Raises:
        AIDocksError: What another attempt would meet again: a loss that is no number, want of memory, a wrong
            specification. It is written beside the story, too.
    """
    workspace = training.story.parent
    workspace.mkdir(parents=True, exist_ok=True)
    try:
        with _explaining_lack_of_memory(training):
            _run(training, reporter, workspace)
    except AIDocksError as error:
        write_text(workspace / FAILURE_FILE, json.dumps(error.problem(), default=str))
        raise


def _run(training: Training, reporter: Reporter, workspace: Path) -> None:
    prepare_environment()
    place = find_place()
    _check_packages(training)
    precision = choose_precision(training.precision, place, training.deepspeed is not None)
    training = training.model_copy(update={"precision": precision})
    family: Family = import_module(FAMILIES[training.kind])  # type: ignore[assignment]
    backend, reason = family.choose_backend(training, place)
    gang = join(place, training.deepspeed is not None)
    if backend == "unsloth":
        import_module("train.unsloth_backend")  # before whatever imports transformers
    # Of this machine and this process alone; whole checkpoints are the reporter's.
    with tempfile.TemporaryDirectory(prefix=f"aidocks-rank{place.rank}-") as directory:
        attempt = _count_attempt(workspace) if reporter.rank == 0 else 1
        checkpoint = reporter.last_checkpoint()
        from train.callbacks import Checkpoints, Curves
        from train.memory import forget_peak
        from train.sampling import settle_order

        forget_peak(place)
        curves = Curves(training, reporter, checkpoint)
        arguments = trainer_arguments(training, place, Path(directory)) | gang
        trainer = family.build_trainer(
            training, place, backend, arguments, [curves, Checkpoints(reporter, curves)]
        )
        settle_order(trainer)
        reporter.tell(Told(kind="message", text=_beginning(training, place, reason, checkpoint)))
        notes = family.rows_left_out(trainer, training)
        for note in notes:
            reporter.tell(Told(kind="message", text=note))
        try:
            _train(trainer, place, training, checkpoint)
        finally:
            curves.close()
        _require_steps(trainer, training)
        files = family.save_result(trainer, training)
        _finish(trainer, training, place, curves, workspace, (backend, reason), attempt, notes, files)


def _require_steps(trainer: Any, training: Training) -> None:
    if trainer.state.global_step == 0:
        raise InvalidSpec(
            f"The {training.train.count} rows do not fill one step, so nothing was trained.",
            field="dataset",
            hint="Give more rows, or lower per_device_train_batch_size, gradient_accumulation_steps or workers.",
        )


class _NothingLeft(Exception):
    """The checkpoint is that of the last step."""


def _train(trainer: Any, place: Place, training: Training, checkpoint: Path | None) -> None:
    from transformers import TrainerCallback

    class Begin(TrainerCallback):
        """Looks once everything is wrapped and loaded, before the first step."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            check_joined(trainer, place, training.deepspeed is not None)

        def on_epoch_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            # transformers looks after a step whether it was the last one, and would do one more.
            if state.global_step >= state.max_steps:
                raise _NothingLeft

    trainer.add_callback(Begin())
    _keep_first_step(trainer)
    check_same_beginning(trainer, step_of(checkpoint) if checkpoint else 0)
    with suppress(_NothingLeft), _explaining_deepspeed():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def _keep_first_step(trainer: Any) -> None:
    """Leave a rise of the learning rate out that is one step long.

    The schedules of transformers rise from zero, so of such a rise there would be nothing but a step that changes
    nothing: of a training of one step all of it.
    """
    make, arguments = trainer.create_scheduler, trainer.args

    def create_scheduler(num_training_steps: int, optimizer: Any = None) -> Any:
        # Of this one the rise says how fast the rate falls, too.
        if (
            arguments.get_warmup_steps(num_training_steps) == 1
            and arguments.lr_scheduler_type != "inverse_sqrt"
        ):
            arguments.warmup_steps = 0
        return make(num_training_steps, optimizer)

    trainer.create_scheduler = create_scheduler


def trainer_arguments(training: Training, place: Place, directory: Path) -> dict[str, Any]:
    """Return the TrainingArguments of a training on one process, but those of its method and of its gang.

    Args:
        directory: On this machine, of this process alone: checkpoints are written there before they are kept.
    """
    from train.zero import completed

    hyper = training.hyper
    same = (
        "num_train_epochs",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "learning_rate",
        "lr_scheduler_type",
        "weight_decay",
        "max_grad_norm",
        "optim",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "gradient_checkpointing",
        "save_steps",
        "eval_steps",
        "logging_steps",
        "seed",
    )
    return (
        {name: getattr(hyper, name) for name in same}
        | {
            "output_dir": str(directory),
            "gradient_accumulation_steps": training.passes(place.world_size),
            "max_steps": hyper.max_steps or -1,
            "warmup_steps": hyper.warmup_ratio,  # below 1: a share of all steps
            "bf16": training.precision == "bfloat16",
            "deepspeed": completed(training.deepspeed, gpu=place.gpu)
            if training.deepspeed is not None
            else None,
            "gradient_checkpointing_kwargs": {"use_reentrant": False}
            if hyper.gradient_checkpointing
            else None,
            "eval_strategy": "steps" if training.measures_loss else "no",
            "prediction_loss_only": True,
            "save_strategy": "steps",
            "save_total_limit": None,  # whoever keeps them removes the old ones
            "logging_strategy": "steps",
            "logging_nan_inf_filter": False,  # it hides what is to be found
            "report_to": list(training.report_to) if place.rank == 0 else [],
            "run_name": training.job_id,
            "disable_tqdm": True,
            "dataloader_num_workers": 0,  # rows are tokens already; a process beside this one only takes time from it
            "dataloader_pin_memory": place.gpu,
            "ddp_find_unused_parameters": False,
        }
    )


def _finish(
    trainer: Any,
    training: Training,
    place: Place,
    curves: Curves,
    workspace: Path,
    backend: tuple[Backend, str],
    attempt: int,
    notes: tuple[str, ...],
    files: tuple[Path, ...],
) -> None:
    import torch

    from train.memory import optimizer_bytes, parameter_counts, peak_bytes

    accelerator = trainer.accelerator
    own = torch.tensor([[peak_bytes(place), optimizer_bytes(trainer.optimizer)]], device=accelerator.device)
    peaks, states = accelerator.gather(own).T.tolist()
    trainable, parameters = parameter_counts(trainer.model)
    if place.rank != 0:
        return
    tokens, seconds = curves.tokens, curves.step_seconds
    write_text(training.history, History(points=tuple(curves.points)).model_dump_json(exclude_defaults=True))
    trained = Trained(
        files=files,
        steps=trainer.state.global_step,
        epochs=trainer.state.epoch or 0.0,
        tokens=max((point.tokens or 0 for point in curves.points), default=0) or None,
        seconds=seconds,
        tokens_per_s=tokens / seconds if tokens and seconds else None,
        loss=curves.mean_loss,
        backend=backend[0],
        backend_reason=backend[1],
        device=torch.cuda.get_device_name(place.device) if place.gpu else "cpu",
        world_size=place.world_size,
        precision=training.precision or "float32",
        trainable=trainable,
        parameters=parameters,
        peak_bytes=tuple(peaks),
        optimizer_bytes=tuple(states),
        attempts=attempt,
        resumed_from=curves.first_step,
        versions=_versions(),
        notes=notes,
    )
    write_text(workspace / OUTCOME_FILE, trained.model_dump_json())


def _beginning(training: Training, place: Place, reason: str, checkpoint: Path | None) -> str:
    gang = f"{place.world_size} processes" if place.world_size > 1 else "one process"
    parts = [f"{reason} {gang.capitalize()} on {'GPU' if place.gpu else 'CPU'}, {training.precision}"]
    if training.workers is not None and place.world_size < training.workers:
        parts.append(f"with the forward passes of {training.workers}")
    if training.deepspeed is not None:
        parts.append(f"DeepSpeed ZeRO stage {training.zero_stage}")
    if checkpoint is not None:
        parts.append(f"from {checkpoint.name}")
    return ", ".join(parts) + "."


def _check_packages(training: Training) -> None:
    for name in training.report_to:
        if find_spec(name) is None:
            raise MissingExtra(
                f"The package {name} is not installed on the worker.",
                field="report_to",
                value=name,
                hint=f"Install it with `pip install {name}`, or leave it out: TensorBoard files are always written.",
            )
    optim = training.hyper.optim
    if optim.endswith(_OF_BITSANDBYTES) and find_spec("bitsandbytes") is None:
        raise MissingExtra(
            f"The optimiser {optim!r} is in the package bitsandbytes, which is not installed on the worker.",
            field="optim",
            value=optim,
            hint="The extra `gpu` brings it; or use 'adamw_torch_fused'.",
        )


def _count_attempt(workspace: Path) -> int:
    path = workspace / _ATTEMPTS_FILE
    attempt = int(path.read_text()) + 1 if path.exists() else 1
    write_text(path, str(attempt))
    return attempt


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@contextmanager
def _explaining_deepspeed() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        said, _, rest = str(error).partition("\n")
        if "DeepSpeed config values that mismatch" not in said:
            raise
        wrong = "; ".join(
            line.removeprefix("- ").strip() for line in rest.splitlines() if line.startswith("- ")
        )
        raise InvalidSpec(
            f"The DeepSpeed configuration contradicts the request: {wrong[:500]}.",
            field="deepspeed",
            hint="Leave these out of it: they are taken from the request's own fields.",
        ) from error


@contextmanager
def _explaining_lack_of_memory(training: Training) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(
            text in str(error).lower() for text in _OUT_OF_MEMORY
        ):
            raise
        raise _lack_of_memory(training, error) from error


def _lack_of_memory(training: Training, error: BaseException) -> InvalidSpec:
    hyper = training.hyper
    batch, length = hyper.per_device_train_batch_size, hyper.max_length
    advice = ["halve per_device_train_batch_size and double gradient_accumulation_steps"] if batch > 1 else []
    advice.append("shorten max_length")
    if not hyper.gradient_checkpointing:
        advice.append("turn gradient_checkpointing on")
    if training.adapter.kind in ("full", "layers"):
        advice.append("train an adapter (lora)")
    where = ""
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        where = f" The GPU has {format_bytes(total)}, of which {format_bytes(free)} were free afterwards."
    said = str(error).partition("\n")[0][:300] or "no memory"
    return InvalidSpec(
        f"The memory does not hold a batch of {batch} examples of up to {length} tokens.{where}",
        field="per_device_train_batch_size",
        value=batch,
        hint=f"Try one of these: {'; '.join(advice)}. ({said})",
    )
