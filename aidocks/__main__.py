"""`python -m aidocks` is `aidocks`."""

from __future__ import annotations

from aidocks.cli.main import main

if __name__ == "__main__":
    main()
