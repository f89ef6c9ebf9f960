"""What the page shows, in named sections. Written by ROS's threads, read by the server's; no ROS in here.

Each section keeps its JSON text and a number that counts its changes. A browser is only sent sections newer than those
it has, and the text is made once however many browsers look.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping
from typing import Any


class Board:
    """Sections by name."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sections: dict[str, tuple[int, str]] = {}

    def put(self, name: str, value: object) -> bool:
        """Replaces a section; returns whether its text changed."""
        text = to_json(value)
        with self._lock:
            version, before = self._sections.get(name, (0, ""))
            if text == before:
                return False
            self._sections[name] = (version + 1, text)
        return True

    def text(self, name: str) -> str:
        """The section's JSON; ``null`` where there is none yet."""
        with self._lock:
            return self._sections.get(name, (0, "null"))[1]

    def newer(self, known: Mapping[str, int]) -> dict[str, tuple[int, str]]:
        """Sections that changed since the versions in ``known``: name → (version, JSON)."""
        with self._lock:
            return {name: pair for name, pair in self._sections.items() if known.get(name, 0) < pair[0]}


def to_json(value: object) -> str:
    """Compact JSON that a browser can read: no NaN or infinity, which are no JSON; they become null."""
    return json.dumps(_finite(value), separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
