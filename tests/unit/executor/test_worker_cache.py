"""What a worker keeps between units."""

from __future__ import annotations

from pathlib import Path

from aidocks.plan import UnitContext, WorkerCache


def test_a_value_is_made_once_and_the_least_recently_used_goes() -> None:
    cache = WorkerCache(entries=2)
    made: list[str] = []

    def value(key: str) -> str:
        return str(cache.get(key, lambda: made.append(key) or key))  # type: ignore[func-returns-value]

    assert [value(key) for key in ("a", "b", "a", "c", "a", "b")] == ["a", "b", "a", "c", "a", "b"]
    assert made == ["a", "b", "c", "b"]


def test_of_large_values_only_one_is_held_at_any_time() -> None:
    cache = WorkerCache()
    alive: set[str] = set()

    class Model:
        def __init__(self, name: str) -> None:
            assert not alive, "the former one is gone before the next is made"
            self.name = name
            alive.add(name)

        def __del__(self) -> None:
            alive.discard(self.name)

    cache.get("small", lambda: "kept")
    for name in ("a", "b", "a"):
        assert cache.get(name, lambda name=name: Model(name), large=True).name == name  # type: ignore[misc]
    assert cache.get("small", lambda: "made again") == "kept"


def test_a_model_that_was_made_anew_under_the_same_name_is_another_one(tmp_path: Path) -> None:
    context = UnitContext(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_text("old")
    read = (model / "weights").read_text
    assert context.keep("weights", model, read) == "old"
    assert context.keep("weights", model, read) == "old"
    model.rename(tmp_path / "deleted")
    model.mkdir()
    (model / "weights").write_text("new")
    assert context.keep("weights", model, read) == "new"
