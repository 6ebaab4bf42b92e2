"""The way from the command line to `cluster.bringup`, which the library must not import: by name."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from aidocks._root import service_root
from aidocks.errors import MissingExtra


def bringup() -> Any:
    """Return the module ``cluster.bringup`` of this installation, whatever else is called ``cluster`` here.

    Raises:
        MissingExtra: This installation is a client only.
    """
    root = str(service_root())
    if sys.path[0] != root:
        sys.path.insert(0, root)
    try:
        return import_module("cluster.bringup")
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"The embedded service needs {error.name}, which is not installed.",
            hint="Install the service: pip install 'aidocks[service]'.",
        ) from error
