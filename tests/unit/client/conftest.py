from __future__ import annotations

from tests.support.scripted_service import answer, event_frame, job, scripted

__all__ = ["answer", "event_frame", "job", "scripted"]
