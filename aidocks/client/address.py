"""Where the service is that a client talks to when it is not told."""

from __future__ import annotations

import json
from ipaddress import ip_address
from urllib.parse import urlsplit

from aidocks.settings import Settings


def service_url(settings: Settings | None = None) -> str:
    """Return the URL of the service to talk to.

    ``AIDOCKS_URL`` decides; without it the service that ``aidocks up`` left running in the data directory,
    wherever it listens; without that the address of the settings.
    """
    settings = settings or Settings()
    if settings.url is None and not settings.model_fields_set & {"host", "port"}:
        try:
            url = json.loads(settings.state_file.read_text()).get("url")
        except (OSError, ValueError, AttributeError):
            url = None
        if isinstance(url, str):
            return url
    # A service that listens everywhere is reached at loopback.
    return settings.service_url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//:::", "//[::1]:")


def is_loopback(url: str) -> bool:
    """Tell whether ``url`` names this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
