"""Numbers and events in words, the same in progress lines, tables and messages."""

from __future__ import annotations

from aidocks.jobs.model import Event, EventType


def duration(seconds: float) -> str:
    """Format seconds: ``0.61 s``, ``2m10s``, ``3h05m``."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"


def size(number: float) -> str:
    """Format bytes in decimal units, as disks and model hubs do: ``269 MB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            break
        number /= 1000
    return f"{number:.0f} {unit}" if unit == "B" or number >= 100 else f"{number:.3g} {unit}"


def rate(per_second: float) -> str:
    """Format a rate so that slow work stays readable: ``12/s``, ``4.1/min``."""
    return f"{per_second:.3g}/s" if per_second >= 0.5 else f"{60 * per_second:.2g}/min"


def sentence(event: Event) -> str | None:
    """Say what happened, or None for what only a progress bar shows and for how a job ended."""
    data = event.data
    match event.type:
        case EventType.MESSAGE:
            return str(data.get("text", ""))
        case EventType.RECOVERED:
            return f"taken up again: {data.get('units_done', 0)} units were done before"
        case EventType.WORKER_LOST:
            what = f" while it ran {data['label']}" if data.get("label") else ""
            return f"{data.get('worker', 'a worker')} died{what}; its work runs again elsewhere"
        case EventType.RETRYING:
            reason = data.get("reason") or {}
            words = [reason.get("detail") or reason.get("title"), reason.get("hint")]
            wait = duration(float(data.get("wait_s") or 0.0))
            return f"tried again in {wait}: " + " ".join(str(word) for word in words if word)
        case EventType.CANCEL_REQUESTED:
            return "cancelling"
        case _:
            return None
