"""Secrets where they do not belong: left out of logs, refused in what is stored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from aidocks.access.keys import PREFIX
from aidocks.errors import InvalidSpec

#: A key of ours, or a token of the hub; no name that only begins like one.
_SECRETS = re.compile(rf"({PREFIX}_)[0-9a-f]{{12}}_[A-Za-z0-9_-]{{20,}}|(hf_)[A-Za-z0-9]{{30,}}")


def without_secrets(text: str) -> str:
    """Return a text for logs: what looks like a key or a token in it is left out."""
    return _SECRETS.sub(r"\1\2***", text)


def refuse_secrets(value: Any, field: str = "") -> None:
    """Refuse what would be stored, and shown to every key, with a key or a token in it.

    Args:
        value: A request as JSON.
        field: Path of the field that it is the value of.

    Raises:
        InvalidSpec: Naming the field, never the value.
    """
    if isinstance(value, str):
        if _SECRETS.search(value):
            raise InvalidSpec(
                f"{field or 'The request'}: This looks like an access token or an API key.",
                field=field or None,
                hint="Requests are stored. A token of the hub belongs into HF_TOKEN where the service runs.",
            )
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            refuse_secrets(str(name), field)
            refuse_secrets(inner, f"{field}.{name}" if field else str(name))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            refuse_secrets(inner, f"{field}[{number}]")
