"""The unit that writes what a model's directory holds beside its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from aidocks.checkpoints.files import copy_file, write_text
from aidocks.checkpoints.layout import CONFIG_FILE, is_tokenizer_file, metadata_files, read_json_object
from aidocks.checkpoints.writer import ShardPlan, write_index
from aidocks.models.tokenizer_files import SPECIAL_TOKENS, TokenizerFiles, json_text, write_tokenizer
from aidocks.plan import UnitContext, WritingUnit, WrittenFiles

_GENERATION_FILE = "generation_config.json"


class WriteBesideWeights(WritingUnit):
    """Configuration, the index of the weight files, the tokenizer's files, and what else travels with the base."""

    base: Path = Field(description="Checkpoint directory of the base.")
    tokenizer: TokenizerFiles
    directory: Path = Field(description="Directory in which the result is staged.")
    config: dict[str, Any] = Field(description="Content of config.json.")
    shards: tuple[ShardPlan, ...] = Field(description="All weight files.")
    chat_template: str | None = Field(None, description="Replaces the tokenizer's.")

    @property
    def label(self) -> str:
        return "configuration and tokenizer"

    @property
    def computes(self) -> bool:
        return False

    def run(self, context: UnitContext) -> WrittenFiles:
        texts = {CONFIG_FILE: json_text(self.config)}
        if self.tokenizer.source != self.base:
            texts |= self._generation_config()
        beside = [
            path
            for path in metadata_files(self.base)
            if path.name not in texts and not is_tokenizer_file(path)
        ]
        files = [copy_file(path, self.directory / path.name) for path in beside]
        files += [write_text(self.directory / name, text) for name, text in texts.items()]
        files += write_tokenizer(self.tokenizer, self.directory, self.chat_template)
        return WrittenFiles(files=(*files, *write_index(self.directory, self.shards)))

    def _generation_config(self) -> dict[str, str]:
        """Return the base's generation_config.json with the special tokens of the other tokenizer's model."""
        ours, theirs = (place / _GENERATION_FILE for place in (self.base, self.tokenizer.source))
        if not ours.is_file():
            return {}
        said = read_json_object(theirs) if theirs.is_file() else self.config
        ids = {key: said[key] for key in said if key in SPECIAL_TOKENS and said[key] is not None}
        return {ours.name: json_text(read_json_object(ours) | ids)}
