"""Which libraries run models that find texts: asked before they are imported, to say what to install."""

from __future__ import annotations

from importlib.util import find_spec

from aidocks.errors import MissingExtra

_PACKAGES = ("torch", "transformers", "sentence_transformers", "accelerate", "peft")


def require_libraries() -> None:
    """Refuse to go on where one of them is missing; imports none.

    Raises:
        MissingExtra: Naming it.
    """
    missing = next((name for name in _PACKAGES if find_spec(name) is None), None)
    if missing is not None:
        raise MissingExtra(
            f"Models that find texts need {missing.replace('_', '-')}, which is not installed.",
            hint="Install what runs models: pip install 'aidocks[local]'.",
        )
