"""The trainers of sentence-transformers, with what the loop needs of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    SentenceTransformer,
    SentenceTransformerTrainer,
)
from torch.utils.data import DataLoader

from train.retrieval.adapters import load_trained, trained_state
from train.retrieval.batches import Batches
from train.retrieval.counting import Tokens
from train.retrieval.rows import Examples
from train.sampling import FollowEpochs

#: In a checkpoint: what is trained, under the names that it has in the model.
TRAINED_FILE = "model.safetensors"


class _OfTheLoop:
    """What differs from the trainers of sentence-transformers, mixed into both of them.

    They write checkpoints that are whole models, with cards that they ask the hub about, and read them back by way of
    PEFT, which may lose a head; here a checkpoint is exactly what is trained. Batches are those of
    :class:`train.retrieval.batches.Batches`, and the tokens that were read are logged.
    """

    _in_batch = False
    _tokens: Tokens

    def settle(self, *, in_batch: bool) -> None:
        """Begin to count what is read, and choose how steps are put together.

        Args:
            in_batch: Whether the loss takes a step's passages for wrong answers to its other queries.
        """
        self._in_batch = in_batch
        self._tokens = Tokens(self.model)  # type: ignore[attr-defined]

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Leave the card to the registry."""

    def _get_train_sampler(self, train_dataset: Any = None) -> None:
        # Its order does not come from a sampler of single examples.
        return None

    def _build_dataloader(self, dataset: Examples, batch_size: int, dataset_kind: str) -> DataLoader[Any]:
        trains = dataset_kind == "train"
        args: Any = self.args  # type: ignore[attr-defined]
        batches = Batches(
            dataset,
            # A loss within the step is only comparable with one of as many passages.
            args.train_batch_size if self._in_batch else batch_size,
            args.world_size,
            args.seed,
            apart=self._in_batch,
            shuffled=trains,
        )
        if trains:
            self.add_callback(FollowEpochs(batches.set_epoch))  # type: ignore[attr-defined]
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,  # type: ignore[attr-defined]
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["num_tokens"] = self._tokens.of_all(self.accelerator)  # type: ignore[attr-defined]
        super().log(logs, start_time)  # type: ignore[misc]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        # The other one leaves out of the last step what would be there twice; here all steps are full.
        self.gather_function = self.accelerator.gather  # type: ignore[attr-defined]
        return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        directory = Path(output_dir or self.args.output_dir)  # type: ignore[attr-defined]
        directory.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(trained_state(self.model), directory / TRAINED_FILE)  # type: ignore[attr-defined]

    def _load_from_checkpoint(self, checkpoint_path: str, model: Any = None) -> None:
        state = safetensors.torch.load_file(Path(checkpoint_path) / TRAINED_FILE)
        load_trained(self.model, state)  # type: ignore[attr-defined]


class EmbeddingTrainer(_OfTheLoop, SentenceTransformerTrainer):
    """Trains a SentenceTransformer."""

    model: SentenceTransformer


class RerankerTrainer(_OfTheLoop, CrossEncoderTrainer):
    """Trains a CrossEncoder."""

    model: CrossEncoder
