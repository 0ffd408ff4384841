"""Messages in vLLM's own log, each said once per process."""

from __future__ import annotations

import logging
import os

_LOGGER = logging.getLogger("vllm.plugins.wph")
"""Below vLLM's logger, so that its handlers and level apply."""
_said: set[str] = set()


def is_debug() -> bool:
    return os.environ.get("WPH_LOG", "").lower() == "debug"


def say(message: str, about: str | None = None) -> None:
    """An informative line, the first time only; of those ``about`` one thing only the first."""
    _once(logging.INFO, message, about)


def warn(message: str) -> None:
    """A line about something that should be repaired, the first time only."""
    _once(logging.WARNING, message)


def debug(message: str) -> None:
    """A line for ``WPH_LOG=debug``; at level INFO, because vLLM's handler drops what is below its own level."""
    if is_debug():
        _once(logging.INFO, message)


def tell(message: str) -> None:
    """An informative line every time (timings)."""
    _LOGGER.info("wph: %s", message)


def _once(level: int, message: str, about: str | None = None) -> None:
    key = about or message
    if key not in _said:
        _said.add(key)
        _LOGGER.log(level, "wph: %s", message)
