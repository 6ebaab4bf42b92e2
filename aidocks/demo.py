"""`aidocks demo`: optimise a real model, build a Mixture-of-Experts from it over HTTP, and ask it a question.

Every run begins by removing what an earlier one left (models, unfinished jobs), so it can be run, interrupted
and run again at any time. It succeeds only if everything that it claims has been checked.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aidocks.cli.embedded import bringup
from aidocks.cli.output import err, out, remark
from aidocks.client.http import Client
from aidocks.client.wording import duration
from aidocks.errors import AIDocksError, IllegalTransition, NotFound
from aidocks.models.registry import Registry

if TYPE_CHECKING:
    from rich.table import Table

    from aidocks.settings import Settings
    from aidocks.specs.laser_result import LaserResult
    from aidocks.specs.moe_result import MoEResult

BASE, LASER, MOE = "smollm2-135m-instruct", "smollm2-laser", "smollm2-moe"
QUESTION = "What is the capital of France?"

LASER_REQUEST: dict[str, Any] = {
    "base_model_name": BASE,
    "laser_model_name": LASER,
    "kinds": ["k_proj", "v_proj"],
    "candidates": 12,
}
MOE_REQUEST: dict[str, Any] = {
    "name": MOE,
    "base_model": BASE,
    "gate_mode": "hidden",
    "experts": [
        {
            "source_model": BASE,
            "positive_prompts": [
                "Tell me a story about a dragon.",
                "How are you today?",
                "Write a poem about the sea.",
            ],
            "negative_prompts": ["def add(a, b): return a + b"],
        },
        {
            "source_model": LASER,
            "positive_prompts": [
                "def add(a, b): return a + b",
                "What is 12 * 7?",
                "Solve the equation x^2 = 9.",
            ],
            "negative_prompts": ["How are you today?"],
        },
    ],
}


@dataclass
class _Course:
    """What happened: how long each step took, and what was found true or not."""

    seconds: dict[str, float] = field(default_factory=dict)
    checks: dict[str, bool] = field(default_factory=dict)

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        err().print(f"[bold cyan]{title}[/]")
        begin = time.monotonic()
        yield
        self.seconds[title] = time.monotonic() - begin


def run_demo(settings: Settings, keep: bool = False) -> None:
    """Run the demonstration.

    Args:
        settings: Of the installation whose registry and service are used.
        keep: Leave the service running even if it did not run before.

    Raises:
        MissingExtra: The package with the model is not installed.
        AIDocksError: A step failed, or something that the demonstration claims is not true.
    """
    course = _Course()
    registry = Registry(settings.models_dir)
    with course.step("Import SmolLM2-135M-Instruct"):
        _import_base(registry)
    with _service(settings, course, keep) as url, Client(url) as client:
        _remove_earlier(client)
        with course.step("Optimise it: POST /laser"):
            laser: LaserResult = client.laser(LASER_REQUEST).wait(progress=True)  # type: ignore[assignment]
        with course.step("Build a Mixture-of-Experts: POST /byo-moe"):
            moe: MoEResult = client.byo_moe(MOE_REQUEST).wait(progress=True)  # type: ignore[assignment]
        parents = [parent.reference for parent in client.model(MOE).parents]
    path = registry.path(MOE)
    with course.step(f"Ask {MOE}: {QUESTION}"):
        said = _ask(path)
    course.checks |= {
        "the answer is not empty": bool(said.strip()),
        "the model that answered is the MoE in the registry": moe.model == MOE
        and Path(moe.path or "") == path,
        "the MoE was made from the base and the optimised model": {BASE, LASER} <= set(parents),
        "all perplexities are finite": all(map(_finite, _perplexities(laser, moe).values())),
        "all pictures and weights are there": _files_exist(registry, laser, moe),
    }
    _tell(course, registry, laser, moe)
    wrong = [claim for claim, true in course.checks.items() if not true]
    if wrong:
        raise AIDocksError(f"The demonstration ran, but this is not so: {'; '.join(wrong)}.")


def _import_base(registry: Registry) -> None:
    from aidocks.cli.importing import import_into
    from aidocks.models.gguf_import import locate_smollm2

    if registry.exists(BASE):
        remark(f"  it is in the registry: {registry.path(BASE)}")
        return
    info = import_into(registry, BASE, locate_smollm2())
    remark(f"  {info.path}")


@contextmanager
def _service(settings: Settings, course: _Course, keep: bool) -> Iterator[str]:
    """Yield the URL of the service; stop it afterwards if it was not there before."""
    from aidocks.cli.service import start

    before = bringup().service_status(settings)
    if before.healthy:
        remark(f"the service runs: {before.url}")
        yield str(before.url)
        return
    try:
        with course.step("Start the service"):
            url = str(start(settings).url)
        remark(f"  {url}")
        yield url
    finally:
        if keep:
            remark("The service goes on; stop it with `aidocks down`.")
        else:
            bringup().stop_service(settings)


def _remove_earlier(client: Client) -> None:
    """End the jobs and delete the models of an earlier run, so that this one starts as a first one does."""
    for handle in [*client.jobs(status="running"), *client.jobs(status="queued")]:
        if handle.job.output_name in (LASER, MOE):
            try:
                handle.cancel()
            except IllegalTransition:
                continue
            for _ in handle.events():
                pass
    for name in (MOE, LASER):
        try:
            client.delete_model(name)
        except NotFound:
            continue
        remark(f"deleted {name} of an earlier run")


def _ask(path: Path) -> str:
    from aidocks.cli.ask import no_loading_bars, write_piece
    from aidocks.evaluate.generate import answer

    no_loading_bars()
    said = answer(path, QUESTION, max_new_tokens=64, on_text=write_piece)
    out().print()
    remark(f"  {said.tokens} tokens, {said.tokens_per_s:.1f} tokens/s")
    return said.text


def _perplexities(laser: LaserResult, moe: MoEResult) -> dict[str, tuple[float | None, float | None]]:
    held_out = laser.held_out
    assert held_out is not None, "every run measures it"
    found = {
        f"{BASE}, held-out text": (held_out.before, held_out.before_standard_error),
        f"{LASER}, held-out text": (held_out.after, held_out.after_standard_error),
    }
    return found | {
        f"{subject.reference} ({subject.model}), {measured.domain}": (
            measured.perplexity,
            measured.standard_error,
        )
        for subject in moe.perplexities
        for measured in subject.domains
    }


def _finite(measured: tuple[float | None, float | None]) -> bool:
    return all(number is not None and math.isfinite(number) for number in measured)


def _files_exist(registry: Registry, laser: LaserResult, moe: MoEResult) -> bool:
    if not laser.pictures or not moe.pictures:
        return False
    needed = [registry.path(LASER) / name for name in laser.pictures]
    needed += [registry.path(MOE) / name for name in moe.pictures]
    for name in (LASER, MOE):
        needed += [registry.path(name) / file.path for file in registry.manifest(name).files]
    return all(path.is_file() and path.stat().st_size > 0 for path in needed)


def _tell(course: _Course, registry: Registry, laser: LaserResult, moe: MoEResult) -> None:
    measured = _perplexities(laser, moe)
    pictures = [str(registry.path(LASER) / name) for name in laser.pictures]
    pictures += [str(registry.path(MOE) / name) for name in moe.pictures]
    out().print()
    out().print(_table("perplexity", measured, lambda found: f"{_number(found[0])} ± {_number(found[1])}"))
    accepted = [f"{matrix.name} {matrix.full_rank} → {matrix.rank}" for matrix in laser.accepted]
    out().print(f"[bold]reduced matrices[/]: {', '.join(accepted) or 'none was worth it'}", soft_wrap=True)
    out().print(_table("time", course.seconds | {"in all": sum(course.seconds.values())}, duration))
    out().print("[bold]where things are[/]")
    for place in [*(str(registry.path(name)) for name in (BASE, LASER, MOE)), *pictures]:
        out().print(f"  {place}", soft_wrap=True, markup=False)
    out().print()
    for claim, true in course.checks.items():
        out().print(f"{'[green]✓[/]' if true else '[red]✗[/]'} {claim}", soft_wrap=True)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def _table(title: str, rows: dict[str, Any], text: Callable[[Any], str]) -> Table:
    from rich.table import Table

    table = Table(
        box=None, pad_edge=False, show_header=False, title=title, title_justify="left", title_style="bold"
    )
    table.add_column()
    table.add_column(justify="right")
    for name, value in rows.items():
        table.add_row(f"  {name}", text(value))
    return table
