"""The plain script that ours is compared with: what one would write by hand for the same training, with TRL or unsloth.

``python -m benchmarks.train_plain settings.json said.json`` writes the seconds of the loop, and the losses. Of ours
it takes the order of the rows and, of TRL's where there is no GPU, the log-probabilities: without the latter TRL 1.15
needs Triton.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.comparison import run_process

#: All linear modules of a layer.
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Plain:
    """What the script trains: LoRA of rank 16 on the texts of a JSONL file.

    Attributes:
        precision: Of the frozen weights, ``bfloat16`` or ``float32``.
        unsloth: Whether unsloth makes the model.
    """

    base: str
    rows: str
    precision: str
    steps: int
    batch: int
    accumulated: int
    learning_rate: float
    max_length: int
    seed: int
    unsloth: bool = False


def run_plain(plain: Plain, directory: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """Run the script in a process of its own and return what it said: see :func:`main`.

    Args:
        plain: What it trains.
        directory: For its settings, what it says, and its log.
        environment: Added to this process's.
    """
    settings, told = directory / "plain.json", directory / "plain.told.json"
    settings.write_text(json.dumps(asdict(plain)))
    command = [sys.executable, "-m", "benchmarks.train_plain", settings, told]
    run_process(command, directory / "plain.log", environment)
    said: dict[str, Any] = json.loads(told.read_text())
    return said


def main() -> None:
    given = Plain(**json.loads(Path(sys.argv[1]).read_text()))
    if given.unsloth:
        import unsloth  # noqa: F401 - before everything that it changes
    import datasets
    import torch
    import trl
    from transformers import AutoTokenizer, TrainerCallback, set_seed

    from train.distributed import find_place
    from train.memory import peak_bytes
    from train.sampling import GroupedByLength

    begun: list[float] = []
    ended: list[float] = []

    class Clock(TrainerCallback):
        """Notes when the loop begins, and the end of every step."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            begun.append(time.time())

        def on_log(self, *_: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
            if logs and "loss" in logs:
                ended.append(time.time())

    lines = Path(given.rows).read_text(encoding="utf-8").splitlines()
    rows = datasets.Dataset.from_list([{"text": json.loads(line)["text"]} for line in lines])
    set_seed(given.seed)
    model, adapter = _from_unsloth(given) if given.unsloth else _from_transformers(given)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(
                output_dir=scratch,
                max_steps=given.steps,
                per_device_train_batch_size=given.batch,
                gradient_accumulation_steps=given.accumulated,
                learning_rate=given.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=0.03,
                max_length=given.max_length,
                bf16=given.precision == "bfloat16",
                gradient_checkpointing=False,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
                seed=given.seed,
            ),
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(given.base),
            peft_config=adapter,
            callbacks=[Clock()],
        )
        lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
        sampler = GroupedByLength(lengths, given.batch * given.accumulated, given.seed)
        trainer._get_train_sampler = lambda dataset=None: sampler
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    place = find_place()
    said = {
        "begun": begun[0],
        "ended": ended,
        "loop": ended[-1] - begun[0],
        "losses": losses,
        "peak_bytes": peak_bytes(place),
        "device": torch.cuda.get_device_name() if place.gpu else "cpu",
    }
    Path(sys.argv[2]).write_text(json.dumps(said))


def _from_transformers(given: Plain) -> tuple[Any, Any]:
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    from train.token_log_probs import install

    install()
    model = AutoModelForCausalLM.from_pretrained(given.base, dtype=given.precision)
    return model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=list(MODULES))


def _from_unsloth(given: Plain) -> tuple[Any, None]:
    import torch
    import unsloth

    model, _ = unsloth.FastLanguageModel.from_pretrained(
        model_name=given.base,
        max_seq_length=given.max_length,
        dtype=getattr(torch, given.precision),
        load_in_4bit=False,
    )
    with_adapter = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=32,
        lora_dropout=0,
        bias="none",
        target_modules=list(MODULES),
        use_gradient_checkpointing=False,
        random_state=given.seed,
    )
    return with_adapter, None


if __name__ == "__main__":
    main()
