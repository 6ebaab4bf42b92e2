"""How often somebody may ask: token buckets, in the memory of one replica."""

from __future__ import annotations

import time
from collections.abc import Callable

_PERIOD_S = 60.0


class Rates:
    """A token bucket for each name: so many at once, and so many a minute in the long run.

    Of a bucket only one number is kept: when it is full again. Several replicas count each for itself.

    Args:
        most: Buckets that are kept. Beyond it the ones that were used least lately begin anew.
        clock: Returns seconds.
    """

    def __init__(self, most: int = 10_000, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._full_at: dict[str, float] = {}

    def wait_s(self, name: str, per_minute: int) -> float:
        """Return the seconds until there is a token, 0 when there is one now."""
        now = self._clock()
        missing = self._full_at.get(name, now) - now
        return max(0.0, missing - _PERIOD_S + _PERIOD_S / per_minute)

    def take(self, name: str, per_minute: int) -> float:
        """Take a token; return 0, or the seconds until there is one when there is none."""
        wait = self.wait_s(name, per_minute)
        if wait > 1e-9:
            return wait
        now = self._clock()
        full_at = max(now, self._full_at.pop(name, now)) + _PERIOD_S / per_minute
        if len(self._full_at) >= self._most:
            del self._full_at[next(iter(self._full_at))]
        self._full_at[name] = full_at
        return 0.0
