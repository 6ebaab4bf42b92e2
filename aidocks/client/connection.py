"""What the two clients share: where the service is, how long it is looked for, which operations there are."""

from __future__ import annotations

from typing import Any

from aidocks.access.local import key_for
from aidocks.client.address import is_loopback, service_url
from aidocks.client.events import Outage
from aidocks.errors import NotFound
from aidocks.operations import OPERATIONS, find_operation
from aidocks.settings import Settings


class Connection:
    """What both clients share; the arguments are described at :class:`~aidocks.client.http.Client`."""

    def __init__(
        self,
        url: str | None = None,
        timeout: float = 30.0,
        *,
        retry_s: float = 5.0,
        reconnect_s: float = 300.0,
        api_key: str | None = None,
    ) -> None:
        settings = Settings()
        self.url = (url or service_url(settings)).rstrip("/")
        self._api_key = api_key or key_for(self.url, settings)
        self._timeout = timeout
        self._retry_s = retry_s
        self._reconnect_s = reconnect_s
        self._open()

    def _open(self) -> None:
        raise NotImplementedError

    @property
    def _options(self) -> dict[str, Any]:
        # A proxy of the environment is not asked for this machine's own addresses.
        options = {"base_url": self.url, "timeout": self._timeout, "trust_env": not is_loopback(self.url)}
        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        return options | {"headers": headers}

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *(registration.method for registration in OPERATIONS)]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def _operation(self, name: str) -> str:
        """Return the operation that the unknown attribute ``name`` stands for."""
        try:
            return find_operation(name).name
        except NotFound as error:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}. {error.hint}") from None

    def _outage(self) -> Outage:
        return Outage(self.url, self._reconnect_s)
