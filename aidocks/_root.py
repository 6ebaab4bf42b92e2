"""Where the service's own packages (cluster, serve, train) are: in the checkout, or inside the wheel."""

from __future__ import annotations

from pathlib import Path


def service_root() -> Path:
    """Return the directory that service processes put on ``PYTHONPATH``."""
    package = Path(__file__).resolve().parent
    bundled = package / "_service"
    return bundled if (bundled / "cluster").is_dir() else package.parent
