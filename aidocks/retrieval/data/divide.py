"""Which queries are trained on and which are only measured on, over all data sets of a request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from aidocks.retrieval.data.collect import Collected
from aidocks.retrieval.data.convert import Scored, digest_of
from aidocks.training.data.split import choose_held_out


class Part(NamedTuple):
    """What is done with one data set.

    Attributes:
        train: Places of the queries (or pairs) that are trained on, in the order of the data set.
        held_out: Places of those that are only measured on.
        leaked: Others, which are not trained on because their query is measured on, here or in another data set.
        shared_passages: Queries that are measured on, one of whose right passages is trained on.
    """

    train: tuple[int, ...]
    held_out: tuple[int, ...]
    leaked: int = 0
    shared_passages: int = 0


def divide(
    trained: Sequence[Collected], measured: Sequence[Collected], wanted: Callable[[int], int], seed: int
) -> tuple[Part, ...]:
    """Divide the data sets of a request.

    Args:
        trained: Those that are trained on.
        measured: Those that are only measured on.
        wanted: Queries of a data set -> how many of them are held out, about.
        seed: Chooses others.

    Returns:
        Of each of ``trained``, then of each of ``measured``.
    """
    chosen = []
    for data in trained:
        groups = [int.from_bytes(key[:8]) for key in _keys(data)]
        held = choose_held_out(groups, wanted(len(groups)), seed)
        chosen.append([group in held for group in groups])
    asked: set[bytes] = set()
    for data, flags in zip(trained, chosen, strict=True):
        asked.update(key for keys, held in zip(_meant(data), flags, strict=True) if held for key in keys)
    for data in measured:
        asked.update(key for keys in _meant(data) for key in keys)
    parts = []
    for data, flags in zip(trained, chosen, strict=True):
        leaks = [
            not held and not asked.isdisjoint(keys) for keys, held in zip(_meant(data), flags, strict=True)
        ]
        train = tuple(place for place, held in enumerate(flags) if not held and not leaks[place])
        parts.append(Part(train, tuple(place for place, held in enumerate(flags) if held), sum(leaks)))
    parts += [Part((), tuple(range(len(_keys(data))))) for data in measured]
    return _with_shared((*trained, *measured), parts)


def limited(data: Collected, places: Sequence[int], most: int, seed: int) -> tuple[int, ...]:
    """Return at most so many of the queries (or pairs) of a data set, chosen by their content."""
    if len(places) <= most:
        return tuple(places)
    keys = list(_keys(data))
    groups = [int.from_bytes(keys[place][:8]) for place in places]
    chosen = choose_held_out(groups, most, seed)
    return tuple(place for place, group in zip(places, groups, strict=True) if group in chosen)[:most]


def _keys(data: Collected) -> Sequence[bytes]:
    """Return what tells each query from any other; of a pair the first text is the query."""
    if data.rows == "ranking":
        return tuple(data.queries)
    return [digest_of(pair.first) for pair in data.pairs]


def _meant(data: Collected) -> Iterable[tuple[bytes, ...]]:
    """Yield what must not be on both sides: queries; of pairs also the whole pair, in either order."""
    if data.rows == "ranking":
        return ((key,) for key in data.queries)
    return ((digest_of(pair.first), _either_way(pair)) for pair in data.pairs)


def _either_way(pair: Scored) -> bytes:
    return b"".join(sorted((digest_of(pair.first), digest_of(pair.second))))


def _with_shared(datasets: Sequence[Collected], parts: Sequence[Part]) -> tuple[Part, ...]:
    """Count the queries whose right passages are trained on, in any data set."""
    learnt: set[bytes] = set()
    digests = [data.passages.digests for data in datasets]
    queries = [list(data.queries.values()) for data in datasets]
    for number, part in enumerate(parts):
        for place in part.train if queries[number] else ():
            learnt.update(digests[number][passage] for passage in queries[number][place].positives)
    counted = []
    for number, part in enumerate(parts):
        shared = sum(
            any(digests[number][passage] in learnt for passage in queries[number][place].positives)
            for place in (part.held_out if queries[number] else ())
        )
        counted.append(part._replace(shared_passages=shared))
    return tuple(counted)
