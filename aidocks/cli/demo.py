"""`aidocks demo`."""

from __future__ import annotations

from typing import Annotated

import typer

from aidocks.cli.output import remark


def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave the service running afterwards.")] = False,
) -> None:
    """Optimise a real model, build an MoE from it over HTTP, and ask it a question."""
    from aidocks.demo import run_demo
    from aidocks.settings import Settings

    try:
        run_demo(Settings(), keep=keep)
    except KeyboardInterrupt:
        remark("\nInterrupted. `aidocks demo` can be run again at any time.")
        raise typer.Exit(130) from None
