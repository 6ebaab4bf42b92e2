"""Regular expressions from outside, searched for in names from outside: no pair of the two takes long.

Python's own search tries one way after another, and a name of a few hundred letters has millions of ways through
`a*a*b`. Here all ways are followed at once: what is kept is the set of places of the name that can be reached, so that
every character of an expression costs one step, and a repetition at most as many as the name has letters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

from aidocks.errors import InvalidSpec

MAX_PATTERN = 200
#: Expressions that one request, or one file, may have.
MAX_PATTERNS = 64
_MAX_REPETITIONS = 4
_HINT = (
    f"Write at most {MAX_PATTERN} characters, with at most {_MAX_REPETITIONS} of '*', '+' and '{{', and no group that "
    "is repeated or referred to."
)
_PIECE = re.compile(
    r"\\x..|\\u.{4}|\\U.{8}|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?:|\(\?|[*+?][?+]?|\{(?!\})\d*,?\d*\}[?+]?|.",
    re.DOTALL,
)
_REPEATED = re.compile(r"[*+?]|\{(?P<least>\d*)(?P<comma>,?)(?P<most>\d*)\}")
_PLACES = ("^", "$", r"\A", r"\Z", r"\b", r"\B")


class Pattern:
    """A regular expression of a request.

    Args:
        text: One that :func:`compile_pattern` allows.
    """

    def __init__(self, text: str) -> None:
        self.pattern = text
        self._alternatives = _parse(iter(_PIECE.findall(text)))

    def search(self, name: str) -> bool:
        """Tell whether something in a name matches."""
        everywhere = (1 << len(name) + 1) - 1
        return bool(_ends(self._alternatives, name, everywhere))

    def matches_end(self, name: str) -> bool:
        """Tell whether a name matches, or what follows one of its dots; as PEFT reads its patterns."""
        starts = 1 | sum(1 << place for place, letter in enumerate(name, 1) if letter == ".")
        return bool(_ends(self._alternatives, name, starts) >> len(name))


@lru_cache(maxsize=256)
def compile_pattern(text: str, field: str | None = None) -> Pattern:
    """Return a regular expression of a request.

    Raises:
        InvalidSpec: It is none, or none that is allowed; says what is.
    """
    flaw = (
        f"it has {len(text)} characters, more than {MAX_PATTERN}" if len(text) > MAX_PATTERN else _flaw(text)
    )
    if flaw is None:
        try:
            re.compile(text)
            return Pattern(text)
        except (re.error, OverflowError, RecursionError) as error:
            flaw = str(error)
    raise InvalidSpec(
        f"The regular expression {text[:80]!r} cannot be used: {flaw}.",
        field=field,
        value=text[:MAX_PATTERN],
        hint=_HINT,
    )


def _flaw(text: str) -> str | None:
    """Return what is not allowed in an expression, whether it is one or not."""
    pieces = _PIECE.findall(text)
    repetitions = [piece for piece in pieces if _REPEATED.match(piece)]
    if "(?" in pieces or any(re.match(r"\\\d", piece) for piece in pieces):
        return "it looks elsewhere in the text"
    if any(before == ")" and _REPEATED.match(piece) for before, piece in pairwise(pieces)):
        return "it repeats a group"
    if any(piece.endswith("+") and piece != "+" for piece in repetitions):
        return "it has a possessive repetition"
    if sum(piece[0] != "?" for piece in repetitions) > _MAX_REPETITIONS:
        return f"it repeats something more than {_MAX_REPETITIONS} times"
    return None


@dataclass(frozen=True)
class _Character:
    """One character, so many times; ``most`` None without end."""

    one: re.Pattern[str]
    least: int = 1
    most: int | None = 1

    def ends(self, name: str, starts: int) -> int:
        fitting = sum(1 << match.start() for match in self.one.finditer(name))
        count, found = 0, starts if self.least == 0 else 0
        while starts and count != self.most:
            starts = _step(starts, fitting)
            count += 1
            if count >= self.least:
                starts &= ~found  # from there all has been tried
                found |= starts
        return found


@dataclass(frozen=True)
class _Place:
    """A condition on a place, such as the beginning of the name."""

    one: re.Pattern[str]

    def ends(self, name: str, starts: int) -> int:
        return starts & sum(1 << match.start() for match in self.one.finditer(name))


@dataclass(frozen=True)
class _Group:
    alternatives: _Alternatives

    def ends(self, name: str, starts: int) -> int:
        return _ends(self.alternatives, name, starts)


_Alternatives = tuple[tuple[_Character | _Place | _Group, ...], ...]


def _ends(alternatives: _Alternatives, name: str, starts: int) -> int:
    """Return where matches can end that begin at given places: sets of places, as the bits of a number."""
    found = 0
    for parts in alternatives:
        places = starts
        for part in parts:
            if not places:
                break
            places = part.ends(name, places)
        found |= places
    return found


def _step(places: int, fitting: int) -> int:
    """Return the places behind those at which a fitting character stands."""
    return (places & fitting) << 1


def _parse(pieces: Iterator[str]) -> _Alternatives:
    """Read alternatives up to the end of their group."""
    alternatives: list[tuple[_Character | _Place | _Group, ...]] = []
    parts: list[_Character | _Place | _Group] = []
    for piece in pieces:
        repeated = _REPEATED.match(piece)
        if piece == ")":
            break
        if piece == "|":
            alternatives.append(tuple(parts))
            parts = []
        elif piece in ("(", "(?:"):
            parts.append(_Group(_parse(pieces)))
        elif piece in _PLACES:
            parts.append(_Place(re.compile(piece)))
        elif repeated and isinstance(parts[-1], _Character):
            least, most = _counts(repeated)
            parts[-1] = replace(parts[-1], least=least, most=most)
        else:
            parts.append(_Character(re.compile(piece)))
    return (*alternatives, tuple(parts))


def _counts(repeated: re.Match[str]) -> tuple[int, int | None]:
    """Return how often something is repeated at least and at most."""
    if repeated.group() in "*+?":
        return int(repeated.group() == "+"), 1 if repeated.group() == "?" else None
    least = int(repeated["least"] or 0)
    if not repeated["comma"]:
        return least, least
    return least, int(repeated["most"]) if repeated["most"] else None
