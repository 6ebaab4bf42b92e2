"""One training step of SmolLM2-135M with LoRA, beside the products of matrices that the machine does at most.

python -m benchmarks.train_speed       also what the step's time goes into, operation by operation

Batches of texts of 256 tokens, bfloat16, in this process, with the service's own trainer. Needs cores that nobody else
uses.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.comparison import Comparison
from benchmarks.peers import scratch_dir
from benchmarks.small_model import smol_base

LENGTH = 256
BATCHES = (4, 8, 16)
RUNS = 5
_WORDS = "the price of three apples and four pears is seven coins so each of the children pays one coin and "
#: Sides of the products that count as the machine's most.
_SIDES = (1024, 2048)
_TOP = 14


def run() -> list[Comparison]:
    peak = {precision: _peak(precision) for precision in ("bfloat16", "float32")}
    results = []
    for batch in BATCHES:
        step, flops, tokens = _step(batch, "bfloat16")
        step()
        seconds = tuple(_seconds(step) for _ in range(RUNS))
        results.append(
            Comparison(
                f"LoRA step of SmolLM2, {batch} texts of {LENGTH} tokens",
                tuple(flops / each / 1e9 for each in seconds),
                (peak["bfloat16"] / 1e9,) * RUNS,
                "products of matrices at most",
                unit="GFLOP/s",
                facts={
                    "tokens/s": round(tokens / sorted(seconds)[RUNS // 2]),
                    "float32 products at most": round(peak["float32"] / 1e9),
                    "threads": os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1),
                },
            )
        )
    return results


def main() -> None:
    from torch.profiler import ProfilerActivity, profile

    for comparison in run():
        print(comparison, flush=True)
    step, _, _ = _step(BATCHES[0], "bfloat16")
    step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        step()
    print(profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=_TOP))
    print(
        profiled.key_averages(group_by_input_shape=True).table(
            sort_by="self_cpu_time_total", row_limit=2 * _TOP, max_shapes_column_width=60
        )
    )


def _step(batch: int, precision: str) -> tuple[Callable[[], None], float, int]:
    """Return what does one step, the operations of its products, and its tokens."""
    import torch

    from aidocks.training.run import AdapterSettings, LLMHyperparameters, LLMTraining, Rows
    from train.distributed import find_place
    from train.loop import trainer_arguments
    from train.methods import build_trainer

    directory = Path(tempfile.mkdtemp(prefix="train-speed-", dir=scratch_dir()))
    rows = directory / "rows.jsonl"
    rows.write_text(f'{{"text": "{_WORDS * 40}"}}\n' * batch)
    given = Rows(path=rows, sha256="0" * 64, count=batch)
    base = smol_base()
    training = LLMTraining(
        job_id="train-speed",
        method="pretrain",
        base=base,
        base_name="smollm2",
        tokenizer=base,
        train=given,
        adapter=AdapterSettings(),
        hyper=LLMHyperparameters(
            max_steps=1000, per_device_train_batch_size=batch, learning_rate=1e-4, max_length=LENGTH
        ),
        loss_on="all",
        precision=precision,
        checkpoints=directory,
        output=directory,
        tensorboard=directory,
        story=directory / "story.jsonl",
        history=directory / "history.json",
    )
    place = find_place()
    arguments = trainer_arguments(training, place, directory) | {"use_cpu": not place.gpu}
    trainer: Any = build_trainer(training, place, "trl", arguments, [])
    inputs = next(iter(trainer.get_train_dataloader()))
    shutil.rmtree(directory, ignore_errors=True)
    tokens = int(inputs["input_ids"].numel())
    assert tokens == batch * LENGTH, "texts are cut to one length"
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # as its loop sets it
    model = trainer.accelerator.prepare(trainer.model)  # which makes its products bfloat16
    model.train()

    def step() -> None:
        trainer.training_step(model, inputs)
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        trainer.optimizer.step()
        model.zero_grad()

    return step, _operations(model, tokens), tokens


def _operations(model: Any, tokens: int) -> float:
    """Return the operations of a step's products: of a weight two forward, as many backward, two more if trained."""
    frozen = trained = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained += parameter.numel()
        elif parameter.dim() == 2 or "lm_head" in name:  # the embedding is the head, too
            frozen += parameter.numel()
    config = model.config
    # Attention: scores and values, each token with half of the others.
    attention = 4 * config.num_hidden_layers * config.hidden_size * LENGTH / 2
    return tokens * (4.0 * frozen + 6.0 * trained + 3.0 * attention)


def _peak(precision: str) -> float:
    """Return the most operations a second that products of square matrices reach."""
    import torch

    best = 0.0
    for side in _SIDES:
        a, b = (torch.randn(side, side, dtype=getattr(torch, precision)) for _ in range(2))
        torch.mm(a, b)
        seconds = min(_seconds(lambda a=a, b=b: torch.mm(a, b)) for _ in range(2 * RUNS))
        best = max(best, 2 * side**3 / seconds)
    return best


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
