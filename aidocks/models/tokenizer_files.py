"""Tokenizers as files: what tokenizer.json says, and the files of a result whose vocabulary is another one.

Nothing is loaded into a tokenizer library: a vocabulary is a JSON object, and adding a token to it is an entry.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from aidocks.checkpoints.files import OutputFile, copy_file, write_text
from aidocks.checkpoints.layout import is_tokenizer_file, metadata_files, read_json_object
from aidocks.errors import CorruptCheckpoint, IncompatibleModels
from aidocks.models.chat_templates import TEMPLATES, resolve_template

#: Fields of config.json and generation_config.json with the numbers of special tokens.
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
FAST_FILE, SETTINGS_FILE, TEMPLATE_FILE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
#: Older forms of what tokenizer.json says: they would still say what it said before tokens were added.
_OTHER_FORMS = ("added_tokens.json", "merges.txt", "tokenizer.model", "vocab.json", "vocab.txt")
_EXAONE = """\
{%- for message in messages %}
    {{- '[|' + message['role'] + '|]' + message['content'] }}
    {{- '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '[|assistant|]' }}
{%- endif %}
"""


class AddedToken(BaseModel):
    """A token that stands beside a tokenizer's own, as tokenizer.json lists it."""

    model_config = ConfigDict(frozen=True)

    id: int
    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False


@dataclass(frozen=True)
class Tokenizer:
    """What a tokenizer.json says.

    Attributes:
        directory: Where it is, or will be.
        tokens: All tokens with their numbers.
        added: Those that are listed beside the model's own, by number.
    """

    directory: Path
    tokens: Mapping[str, int]
    added: tuple[AddedToken, ...]

    def below(self, rows: int | None) -> Tokenizer:
        """Return it without the tokens that have no row in an embedding of so many; None keeps all."""
        if rows is None or max(self.tokens.values(), default=-1) < rows:
            return self
        tokens = {token: number for token, number in self.tokens.items() if number < rows}
        return Tokenizer(self.directory, tokens, tuple(t for t in self.added if t.id < rows))


class TokenizerFiles(BaseModel):
    """Which files a result's tokenizer consists of.

    Attributes:
        source: Directory that they are copied from.
        rows: Tokens whose number is this or larger are left out; None keeps all.
        added: Tokens that are added, with their numbers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Path
    rows: int | None = None
    added: tuple[AddedToken, ...] = ()

    @property
    def is_copy(self) -> bool:
        """Whether the files stay as they are."""
        return self.rows is None and not self.added


def read_tokenizer(directory: Path, known: Mapping[Path, Tokenizer] | None = None) -> Tokenizer | None:
    """Return a model's tokenizer; None where it has no tokenizer of any kind.

    Args:
        directory: The model's.
        known: Tokenizers of directories that do not exist yet.

    Raises:
        CorruptCheckpoint: When tokenizer.json cannot be read.
        IncompatibleModels: When there is only a tokenizer of another form.
    """
    if known and directory in known:
        return replace(known[directory], directory=directory)
    path = directory / FAST_FILE
    if not path.is_file():
        other = next((name for name in _OTHER_FORMS if (directory / name).is_file()), None)
        if other is None:
            return None
        raise IncompatibleModels(
            f"{directory.name} has a tokenizer only as {other}, whose tokens cannot be compared.",
            value=directory.name,
            hint="Load it with transformers' AutoTokenizer and save it again: that writes tokenizer.json.",
        )
    document = read_json_object(path)
    try:
        own = document["model"]["vocab"]
        if isinstance(own, list):  # a Unigram model lists its tokens with their scores
            own = {token: number for number, (token, *_) in enumerate(own)}
        added = [AddedToken.model_validate(token) for token in document.get("added_tokens") or ()]
        tokens = {str(token): int(number) for token, number in own.items()}
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise CorruptCheckpoint(
            f"The tokenizer.json of {directory.name} cannot be read: {str(error)[:200]}.",
            value=directory.name,
        ) from error
    added.sort(key=lambda token: token.id)
    tokens |= {token.content: token.id for token in added}
    return Tokenizer(directory, tokens, tuple(added))


def write_tokenizer(
    files: TokenizerFiles, directory: Path, chat_template: str | None = None
) -> tuple[OutputFile, ...]:
    """Write the files of a result's tokenizer, byte for byte those of the source where nothing changes in them.

    Args:
        files: Which.
        directory: Where the result is staged.
        chat_template: Jinja, in place of the source's.
    """
    sources = [path for path in metadata_files(files.source) if is_tokenizer_file(path)]
    texts: dict[str, str] = {}
    if not files.is_copy:
        sources = [path for path in sources if path.name not in _OTHER_FORMS]
        texts[FAST_FILE] = json_text(_changed(read_json_object(files.source / FAST_FILE), files))
    settings = files.source / SETTINGS_FILE
    if settings.is_file():
        before = read_json_object(settings)
        after = _changed_settings(before, files, chat_template)
        if after != before:
            texts[SETTINGS_FILE] = json_text(after)
    if chat_template is not None:
        # chat_template.json is an older form of the same thing, which some readers prefer.
        sources = [path for path in sources if path.name != "chat_template.json"]
        texts[TEMPLATE_FILE] = chat_template
    copied = [copy_file(path, directory / path.name) for path in sources if path.name not in texts]
    return (*copied, *(write_text(directory / name, text) for name, text in texts.items()))


def _changed(document: dict[str, Any], files: TokenizerFiles) -> dict[str, Any]:
    """Return tokenizer.json without the tokens that have no row, and with those that are added."""
    listed = {token["id"]: token for token in document.get("added_tokens") or ()}
    if files.rows is not None:
        rows = files.rows
        listed = {number: token for number, token in listed.items() if number < rows}
        document = document | {"model": _without(document["model"], rows)}
    listed |= {token.id: token.model_dump() for token in files.added}
    return document | {"added_tokens": [listed[number] for number in sorted(listed)]}


def _without(model: dict[str, Any], rows: int) -> dict[str, Any]:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        return model | {"vocab": vocabulary[:rows]}
    kept = {token: number for token, number in vocabulary.items() if number < rows}
    if len(kept) == len(vocabulary):
        return model
    merges = model.get("merges")
    if merges is None:
        return model | {"vocab": kept}
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges]
    kept_merges = [
        merge
        for merge, pair in zip(merges, pairs, strict=True)
        if all(token in kept for token in (*pair, "".join(pair)))
    ]
    return model | {"vocab": kept, "merges": kept_merges}


def _changed_settings(
    settings: dict[str, Any], files: TokenizerFiles, chat_template: str | None
) -> dict[str, Any]:
    settings = dict(settings)
    if chat_template is not None:
        settings.pop("chat_template", None)
    listed = settings.get("added_tokens_decoder")
    if isinstance(listed, dict) and not files.is_copy:
        if files.rows is not None:
            listed = {number: token for number, token in listed.items() if int(number) < files.rows}
        more = {str(token.id): token.model_dump(exclude={"id"}) for token in files.added}
        settings["added_tokens_decoder"] = listed | more
    return settings


def choose_chat_template(given: str | None, directories: Sequence[Path]) -> str | None:
    """Return the text of the chat template that a request asks for; None to leave the tokenizer's.

    Args:
        given: ``auto`` (that of most of the models, the first of equally many), a name, or Jinja.
        directories: Of the models.

    Raises:
        InvalidSpec: For a name that is not known, or a template that cannot be parsed.
    """
    if given is None:
        return None
    if given == "auto":
        found = Counter(text for text in map(read_template, directories) if text)
        return found.most_common(1)[0][0] if found else None
    if given == "exaone" and given not in TEMPLATES:
        return _EXAONE
    return resolve_template(given).text


def read_template(directory: Path) -> str | None:
    """Return a model's default chat template, where it has one."""
    path = directory / TEMPLATE_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace").strip()
    settings = directory / SETTINGS_FILE
    template = read_json_object(settings).get("chat_template") if settings.is_file() else None
    if isinstance(template, list):  # several by name
        named = [t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[-1] if named else None
    return template.strip() if isinstance(template, str) else None


def json_text(content: Mapping[str, Any]) -> str:
    """Return the text of a JSON file as people read it, its keys in their order."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
