"""In which order examples are seen: those of similar length together, since padding is computed like text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import RandomSampler, Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl.trainer.utils import RepeatSampler

#: Batches that are sorted by length together: enough to be alike, few enough that their order stays random.
_TOGETHER = 50


class GroupedByLength(Sampler[int]):
    """Yields each example once an epoch, in batches of similar length whose order is random.

    The order depends on the seed and the epoch alone: after a restart it goes on where it was. (Of the sampler of
    transformers it depends on every random number that was drawn before.)

    Args:
        lengths: Tokens of every example.
        batch: Examples of one optimiser step, of all processes together: so they do not wait for each other.
        seed: Of the order.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self._lengths = torch.tensor(lengths)
        self._batch = batch
        self._seed = seed
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of another epoch."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        order = torch.randperm(len(self), generator=generator)
        together = order.split(_TOGETHER * self._batch)
        ordered = torch.cat([part[self._lengths[part].argsort(stable=True)] for part in together])
        whole = len(self) // self._batch * self._batch
        batches = ordered[:whole].view(-1, self._batch)
        batches = batches[torch.randperm(len(batches), generator=generator)]
        yield from batches.flatten().tolist()
        yield from ordered[whole:].tolist()


class FollowEpochs(TrainerCallback):
    """Tells a sampler of the epoch: accelerate's loader does not, of one that is continued in several processes."""

    def __init__(self, set_epoch: Callable[[int], object]) -> None:
        self._set_epoch = set_epoch

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._set_epoch(int(state.epoch or 0))


def settle_order(trainer: Any) -> None:
    """Make the order of a trainer's examples depend on the seed and the epoch alone.

    One that would shuffle them sees those of similar length together; where it does not know their lengths in tokens,
    or packs them, they are shuffled alone. Online methods shuffle their prompts, and those that take examples as they
    come keep to that.
    """
    sampler = trainer._get_train_sampler()
    if isinstance(sampler, RepeatSampler):
        _settle_prompts(trainer)
    elif isinstance(sampler, RandomSampler):
        _group_by_length(trainer)


def _settle_prompts(trainer: Any) -> None:
    """Shuffle from a seed of every epoch: TRL's one generator goes on from epoch to epoch, but not after a restart."""
    make, seed = trainer._get_train_sampler, trainer.args.seed
    generator = torch.Generator()

    def get_train_sampler(dataset: Any = None) -> RepeatSampler:
        sampler = make(dataset)
        sampler.generator = generator
        return sampler

    trainer._get_train_sampler = get_train_sampler
    trainer.add_callback(FollowEpochs(lambda epoch: generator.manual_seed(seed + epoch)))


def _group_by_length(trainer: Any) -> None:
    arguments = trainer.args
    batch = (
        arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    )
    sampler = GroupedByLength(_lengths(trainer), batch, arguments.seed)
    trainer._get_train_sampler = lambda dataset=None: sampler
    trainer.add_callback(FollowEpochs(sampler.set_epoch))


def _lengths(trainer: Any) -> list[int]:
    """Return the tokens of every example; ones where they are all the same or not known."""
    rows = trainer.train_dataset
    names = list(getattr(rows, "column_names", None) or ())
    # Of preference pairs the prompt stands in both, but that changes no order by much.
    columns = ["input_ids"] if "input_ids" in names else [name for name in names if name.endswith("_ids")]
    if not columns or getattr(trainer.args, "packing", False):
        return [1] * len(rows)
    return [sum(map(len, each)) for each in zip(*(list(rows[name]) for name in columns), strict=True)]
