"""Regular expressions from outside: short, and of a form whose search ends soon on any name."""

from __future__ import annotations

import re
from functools import lru_cache

from aidocks.errors import InvalidSpec

MAX_PATTERN = 200
#: A search tries every way to divide a name among these: their number is an exponent.
_MAX_REPETITIONS = 4
_MAX_CHOICES = 12
_HINT = (
    "Write a short one: no group that is repeated or referred to, at most "
    f"{_MAX_REPETITIONS} of '*', '+' and '{{', at most {_MAX_CHOICES} of '|' and '?'."
)


@lru_cache(maxsize=256)
def compile_pattern(text: str, field: str | None = None) -> re.Pattern[str]:
    """Return a regular expression of a request.

    One that repeats a group can take longer than the age of the universe on a name of fifty letters, so that only
    those are allowed that cannot.

    Raises:
        InvalidSpec: It is none, or none that is allowed; says what is.
    """
    bare = re.sub(r"\\[^0-9]", "", text)
    flaw = None
    if len(text) > MAX_PATTERN:
        flaw = f"it has {len(text)} characters, more than {MAX_PATTERN}"
    elif re.search(r"\)[*+?{]", bare) or re.search(r"\\\d|\(\?(?!:)", bare):
        flaw = "it repeats a group, or looks elsewhere in the text"
    elif len(re.findall(r"[*+{]", bare)) > _MAX_REPETITIONS:
        flaw = f"it repeats something more than {_MAX_REPETITIONS} times"
    elif len(re.findall(r"[|?]", bare)) > _MAX_CHOICES:
        flaw = "it has too many alternatives"
    else:
        try:
            return re.compile(text)
        except (re.error, OverflowError, RecursionError) as error:
            flaw = str(error)
    raise InvalidSpec(
        f"The regular expression {text[:80]!r} cannot be used: {flaw}.",
        field=field,
        value=text[:MAX_PATTERN],
        hint=_HINT,
    )
