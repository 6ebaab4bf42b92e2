"""Regular expressions from outside: they mean what Python's mean, and none takes long on any name."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from aidocks.errors import InvalidSpec
from aidocks.specs import patterns
from aidocks.specs.patterns import MAX_PATTERN, compile_pattern

LONGEST_NAME = 512

atoms = st.sampled_from(["a", "b", r"\.", ".", "[ab]", "[^a]", r"\d", "[]a]", r"\x61", "{", "}", r"\*", "-"])
quantifiers = st.sampled_from(["", "", "", "*", "+", "?", "*?", "??", "{2}", "{1,2}", "{,1}", "{1,}"])
places = st.sampled_from(["^", "$", r"\b", r"\B", r"\A", r"\Z"])
pieces = st.one_of(st.builds(str.__add__, atoms, quantifiers), atoms, places)
sequences = st.lists(pieces, max_size=4).map("".join)
expressions = st.recursive(
    sequences,
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map("|".join),
        st.builds("{}({}){}".format, inner, inner, inner),
        st.builds("(?:{}){}".format, inner, inner),
    ),
    max_leaves=4,
)
names = st.text("ab.1{}-*", max_size=9)


@settings(max_examples=600, deadline=None)
@given(text=expressions, name=names)
def test_they_mean_what_pythons_mean(text: str, name: str) -> None:
    assume(sum(text.count(sign) for sign in "*+{") <= 4)
    found = compile_pattern(text)
    assert found.search(name) == bool(re.search(text, name))
    assert found.matches_end(name) == bool(re.match(rf"(.*\.)?({text})$", name))


@pytest.mark.parametrize(
    "text",
    [
        ".*.*.*.*Z",
        "[^.]*[^.]*[^.]*[^.]*[^.]Z",
        "x*x*" + "x" * 190 + "[YZ]",
        "x+x+" + "(x|x)" * 38 + "Z",
        "x*x*" + "x?" * 97 + "Z",
        "x{0,60000}x{3,70000}x{1,}x{,500}Z",
        "(" * 90 + "x*x*" + ")" * 90 + "Z",
    ],
)
def test_no_search_takes_more_than_a_step_for_each_letter_of_each_repetition(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0
    step = patterns._step

    def counted(places: int, fitting: int) -> int:
        nonlocal steps
        steps += 1
        return step(places, fitting)

    monkeypatch.setattr(patterns, "_step", counted)
    begin = time.perf_counter()
    assert not compile_pattern(text).search("x" * LONGEST_NAME)
    assert not compile_pattern(text).matches_end("x." * (LONGEST_NAME // 2))
    assert steps <= 2 * (MAX_PATTERN + 4 * (LONGEST_NAME + 1))
    # A computer that is busy with something else needs longer than the hundredth of a second that this takes.
    assert time.perf_counter() - begin < 2


@pytest.mark.parametrize(
    ("text", "flaw"),
    [
        ("(a+)+$", "repeats a group"),
        (r"(a\))*", "repeats a group"),
        ("(a|b){50}", "repeats a group"),
        ("a*b*c*d*e*", "more than 4 times"),
        ("x" * 201, "201 characters"),
        (r"(a)\1", "elsewhere"),
        ("(?=a)", "elsewhere"),
        ("(?i)a", "elsewhere"),
        ("(?P<n>a)", "elsewhere"),
        ("a*+b", "possessive"),
        ("(", "unterminated"),
        ("*a", "nothing to repeat"),
        ("a{99999999999}", "too large"),
        ("a|*", "nothing to repeat"),
        ("^*", "nothing to repeat"),
    ],
)
def test_what_is_not_allowed_is_told(text: str, flaw: str) -> None:
    with pytest.raises(InvalidSpec, match=flaw) as refused:
        compile_pattern(text, "include[0]")
    assert refused.value.field == "include[0]"
    assert refused.value.hint
