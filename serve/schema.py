"""``python -m serve.schema``: write the OpenAPI document to ``docs/openapi.json``."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from aidocks.settings import Settings
from serve.app import create_api

PATH = Path(__file__).resolve().parents[1] / "docs" / "openapi.json"


def openapi_text() -> str:
    """Return the document as it is kept in the repository; the version is not part of it."""
    with tempfile.TemporaryDirectory() as home:
        document = create_api(Settings(home=Path(home))).openapi()
    document["info"]["version"] = "0"
    schemas = document["components"]["schemas"]
    schemas["Health"]["properties"]["version"]["default"] = "0"
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    """Write the document."""
    PATH.write_text(openapi_text(), encoding="utf-8")
    sys.stdout.write(f"{PATH}\n")


if __name__ == "__main__":
    main()
