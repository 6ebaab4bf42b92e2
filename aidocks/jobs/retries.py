"""Which errors end a job at once, and after which it is tried again: when, and how often."""

from __future__ import annotations

import random

from aidocks.errors import AIDocksError, WorkerLost

#: How often a job is put back after errors that may pass; the next one ends it.
MOST_FAILURES = 3
#: The same, where workers died of one of its units. Each try has cost four of them: what kills eight is no accident.
MOST_LOSSES = 1
#: 30 s, 2 min, 8 min: time for a network to come back, and for somebody to free disk space.
FIRST_WAIT_S, GROWTH = 30.0, 4.0


class Hopeless(Exception):
    """An error after which its job is not tried again, although another of its kind might pass.

    Args:
        error: What the job ends with.
    """

    def __init__(self, error: AIDocksError) -> None:
        super().__init__(error.message)
        self.error = error


def wait_before_retry(error: AIDocksError, failures: int) -> float | None:
    """Return the seconds after which a job is tried again, or None where it has failed for good.

    They grow with each failure, and vary by a fifth: what failed together shall not come back together.

    Args:
        error: What ended the attempt.
        failures: How often the job was put back before.
    """
    most = MOST_LOSSES if isinstance(error, WorkerLost) else MOST_FAILURES
    if not error.retryable or failures >= most:
        return None
    return FIRST_WAIT_S * GROWTH**failures * random.uniform(0.8, 1.2)
