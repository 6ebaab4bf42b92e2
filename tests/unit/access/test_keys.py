"""API keys: how they are written, what they allow, until when they are good."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from aidocks.access.keys import KeyRequest, Scope, allowed, key_text, new_key, parse_key
from aidocks.access.redaction import refuse_secrets, without_secrets
from aidocks.access.store import CACHE_S, USE_S, KeyStore
from aidocks.errors import InvalidSpec, NotFound, Unauthenticated
from aidocks.jobs import database as tables
from aidocks.jobs.database import Database
from aidocks.specs.read import build_spec


def asked(name: str = "somebody", **fields: Any) -> KeyRequest:
    return KeyRequest(name=name, **fields)


def is_good(keys: KeyStore, text: str) -> bool:
    try:
        keys.check(text)
    except Unauthenticated:
        return False
    return True


def test_a_key_is_read_as_it_was_written() -> None:
    made = {new_key() for _ in range(200)}
    assert len(made) == 200
    for key_id, secret in made:
        assert parse_key(key_text(key_id, secret)) == (key_id, secret)
        assert len(secret) >= 43  # 32 bytes


@given(st.text(max_size=100) | st.from_regex(r"aidk_[0-9a-f_-]*_[\w-]*\Z"))
def test_what_is_no_key_is_none(text: str) -> None:
    parsed = parse_key(text)
    assert parsed is None or key_text(*parsed) == text


@given(st.text(max_size=30), st.text(max_size=30), st.booleans())
def test_logs_are_told_no_secrets(before: str, after: str, hub: bool) -> None:
    secret = f"hf_{'aB3' * 11}" if hub else key_text(*new_key())
    assert secret[8:] not in without_secrets(f"{before} {secret} {after}")
    assert without_secrets("/jobs/job-019a-1/events") == "/jobs/job-019a-1/events"


def test_what_is_stored_has_no_secrets() -> None:
    token = "hf_" + "aB3" * 11
    refuse_secrets(
        {
            "model": "hf_internal_testing_of_long-names_and_more/tiny",
            "rows": [{"text": "an aidk_ prefix"}],
            "n": 3,
            "x": None,
        }
    )
    places = {
        "trainer": {"trainer": token},
        "a.b[1].c": {"a": {"b": ["x", {"c": f"https://user:{token}@hub"}]}},
        "metadata": {"metadata": {key_text(*new_key()): 1}},
    }
    for field, value in places.items():
        with pytest.raises(InvalidSpec) as refused:
            refuse_secrets(value)
        assert refused.value.field == field
        assert token not in str(refused.value.problem())


def test_each_scope_allows_those_before_it() -> None:
    table = {scope: {wanted for wanted in Scope if allowed((scope,), wanted)} for scope in Scope}
    assert table == {
        Scope.READ: {Scope.READ},
        Scope.SUBMIT: {Scope.READ, Scope.SUBMIT},
        Scope.ADMIN: set(Scope),
    }
    assert not allowed((), Scope.READ)


@pytest.mark.parametrize(
    "fields",
    [
        {"name": ""},
        {"name": "  "},
        {"name": "a\nb"},
        {"name": "a\0b"},
        {"name": "x" * 129},
        {"scopes": []},
        {"scopes": ["root"]},
        {"max_jobs": 0},
        {"requests_per_minute": -1},
        {"expires_in_s": 0},
        {"expires_in_s": float("inf")},
        {"secret": "mine"},
    ],
)
def test_keys_that_cannot_be_made(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidSpec):
        build_spec(KeyRequest, {"name": "somebody"} | fields)


def test_a_key_and_what_is_stored_of_it(keys: KeyStore, database: Database) -> None:
    made, text = keys.create(asked(scopes=("admin", "read"), max_jobs=3))
    found = keys.check(text)
    assert (found.id, found.name, found.scopes) == (made.id, "somebody", (Scope.READ, Scope.ADMIN))
    assert (found.limits.max_jobs, found.limits.requests_per_minute) == (3, None)
    assert keys.list() == [made] == [found]
    with database.read() as connection:
        stored = str(connection.execute(select(tables.keys)).all())
    assert text.rpartition("_")[2] not in stored


def test_what_is_wrong_is_not_said(keys: KeyStore, clock: Any) -> None:
    (made, text), (_, other) = keys.create(asked()), keys.create(asked())
    expired, revoked = keys.create(asked(expires_in_s=1))[1], keys.create(asked())
    keys.revoke(revoked[0].id)
    clock.now += 2
    wrong = [
        "",
        "aidk",
        text[:-1],
        f"{text}x",
        f" {text}",
        text.upper(),
        key_text(made.id, other[-43:]),  # another's secret
        key_text("0" * 12, text[-43:]),
        expired,
        revoked[1],
        "aidk_" + "\u0660" * 12 + "_" + "a" * 43,  # digits, but not ours
    ]
    told = set()
    for candidate in wrong:
        with pytest.raises(Unauthenticated) as refused:
            keys.check(candidate)
        told.add(str(refused.value))
    assert len(told) == 1
    assert is_good(keys, text)


def test_an_expiry_is_kept_to_the_second(keys: KeyStore, clock: Any) -> None:
    text = keys.create(asked(expires_in_s=10))[1]
    clock.now += 9.9
    assert is_good(keys, text)  # and is remembered for longer than it is good
    clock.now += 0.1
    assert not is_good(keys, text)


def test_a_revoked_key_is_refused_here_at_once_and_elsewhere_soon(
    keys: KeyStore, database: Database, clock: Any
) -> None:
    elsewhere = KeyStore(database, clock=clock)
    made, text = keys.create(asked())
    assert is_good(keys, text)
    assert is_good(elsewhere, text)
    keys.revoke(made.id)
    assert not is_good(keys, text)
    assert is_good(elsewhere, text)
    clock.now += CACHE_S
    assert not is_good(elsewhere, text)
    first = keys.list()[0].revoked_at
    clock.now += 60
    keys.revoke(made.id)
    assert keys.list()[0].revoked_at == first
    with pytest.raises(NotFound):
        keys.revoke("f" * 12)


def test_a_key_that_is_asked_again_costs_no_look(keys: KeyStore, database: Database, clock: Any) -> None:
    text = keys.create(asked())[1]
    assert is_good(keys, text)
    database.close()
    database.read = None  # type: ignore[assignment, method-assign]
    assert is_good(keys, text)
    clock.now += CACHE_S
    with pytest.raises(TypeError):
        keys.check(text)


def test_the_last_use_is_written_once_a_minute(keys: KeyStore, clock: Any) -> None:
    text = keys.create(asked())[1]

    def written() -> float | None:
        keys.save_uses()
        moment = keys.list()[0].last_used_at
        return None if moment is None else moment.timestamp()

    assert written() is None
    keys.check(text)
    first = clock.now
    assert written() == first
    clock.now += USE_S - 1
    keys.check(text)
    assert written() == first
    clock.now += 1
    assert written() == first + USE_S - 1


def test_many_at_the_same_time(keys: KeyStore) -> None:
    good = [keys.create(asked(f"key {number}"))[1] for number in range(4)]
    doomed, lost = keys.create(asked("doomed"))
    found: list[tuple[str, bool]] = []
    begun = threading.Barrier(8)

    def work(number: int) -> None:
        begun.wait()
        for _ in range(10):
            text = good[number % 4]
            found.append((text, is_good(keys, text)))
            is_good(keys, lost)
            keys.save_uses()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    keys.revoke(doomed.id)
    for thread in threads:
        thread.join()
    assert all(right for _, right in found)
    assert len(found) == 80
