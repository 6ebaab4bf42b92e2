"""Actors without Ray, as those who hold their handles know them."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any


class Reference:
    """What a call returns."""

    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def future(self) -> Future[Any]:
        return self._future


class Actor:
    """A handle, whose calls are answered by whoever reads :attr:`asked`."""

    def __init__(self) -> None:
        self.asked: list[Future[Any]] = []
        self.__ray_call__ = self

    def options(self, **_: Any) -> Actor:
        return self

    def remote(self, *_: Any) -> Reference:
        self.asked.append(Future())
        return Reference(self.asked[-1])

    @staticmethod
    def reference(future: Future[Any]) -> Reference:
        return Reference(future)
