"""What a waiting person sees of a job: a progress bar per stage, or plain lines without a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from aidocks.client.wording import duration, rate, sentence
from aidocks.jobs.model import Event, EventType
from aidocks.jobs.model import Progress as StageProgress

_TERMINAL = (EventType.SUCCEEDED, EventType.FAILED, EventType.CANCELLED)


class ProgressView(Protocol):
    """Shows a job's events."""

    def show(self, event: Event) -> None: ...


@contextmanager
def shown_progress(console: Console | None = None) -> Iterator[Callable[[Event], None]]:
    """Yield the function that shows each event on ``console`` (default: standard error)."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield PlainView(lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)).show
        return
    bars = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[count]}", justify="right"),
        TextColumn("[cyan]{task.fields[rate]}"),
        TextColumn("[cyan]{task.fields[eta]}"),
        TextColumn("[dim]{task.fields[unit]}", table_column=None),
        console=console,
        transient=True,
    )
    with bars:
        yield LiveView(bars).show


class LiveView:
    """The stage under way as a progress bar; what is finished stays above it as a line."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._task: TaskID | None = None
        self._stage: StageProgress | None = None

    def show(self, event: Event) -> None:
        if event.type is EventType.STAGE_STARTED:
            self._finish()
            self._begin(event)
        elif event.type is EventType.PROGRESS:
            self._update(StageProgress.model_validate(event.data, extra="ignore"))
        elif event.type in _TERMINAL:
            self._finish(whole=event.type is EventType.SUCCEEDED)
        elif text := sentence(event):
            self._bars.console.print(f"[dim]·[/] {escape(text)}", highlight=False)

    def _begin(self, event: Event) -> None:
        stage, total, done = event.data["stage"], event.data["total"], event.data.get("already_done", 0)
        self._stage = StageProgress(
            stage=stage,
            stage_number=event.data["stage_number"],
            done=done,
            total=total,
            fraction=done / total if total else 1.0,
        )
        self._task = self._bars.add_task(escape(stage), total=1.0, count="", rate="", eta="", unit="")
        self._update(self._stage)

    def _update(self, stage: StageProgress) -> None:
        if self._task is None:
            return
        self._stage = stage
        self._bars.update(
            self._task,
            completed=stage.fraction,
            count=f"{stage.done}/{stage.total}",
            rate=rate(stage.units_per_s) if stage.units_per_s else "",
            eta=f"eta {duration(stage.eta_s)}" if stage.eta_s else "",
            unit=escape(stage.unit or ""),
        )

    def _finish(self, whole: bool = True) -> None:
        if self._task is None or self._stage is None:
            return
        stage, mark = self._stage, "[green]✓[/]" if whole else "[red]✗[/]"
        done = stage.total if whole else stage.done
        took = f"  {duration(stage.elapsed_s)}" if stage.elapsed_s else ""
        self._bars.console.print(
            f"{mark} [bold]{escape(stage.stage)}[/] {done}/{stage.total}[dim]{took}[/]", highlight=False
        )
        self._bars.remove_task(self._task)
        self._task = None


class PlainView:
    """One line for each stage and message, and at most one line a second while a stage goes on.

    Args:
        write: Takes one line.
        clock: Returns seconds.
    """

    def __init__(self, write: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._last = float("-inf")

    def show(self, event: Event) -> None:
        if event.type is EventType.STAGE_STARTED:
            total, already = event.data["total"], event.data.get("already_done", 0)
            known = f", {already} done before" if already else ""
            self._write(f"{event.data['stage']}: {total} unit{'' if total == 1 else 's'}{known}")
        elif event.type is EventType.PROGRESS:
            now = self._clock()
            if now - self._last >= 1.0:
                self._last = now
                self._write(progress_line(StageProgress.model_validate(event.data, extra="ignore")))
        elif text := sentence(event):
            self._write(text)


def progress_line(stage: StageProgress) -> str:
    """Format one dense line, such as ``scan 017/224 (7.6%) | layers.8.mlp.down_proj | 3.1/s | eta 2m10s``."""
    width = len(str(stage.total))
    parts = [
        f"{stage.stage} {stage.done:0{width}d}/{stage.total} ({100 * stage.fraction:.1f}%)",
        stage.unit,
        rate(stage.units_per_s) if stage.units_per_s else None,
        f"eta {duration(stage.eta_s)}" if stage.eta_s else None,
    ]
    return " | ".join(part for part in parts if part)
